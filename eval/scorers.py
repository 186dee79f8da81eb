"""The models that score pictures, chosen from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from eval.dino import DinoScorer
from eval.folders import ImageFolder
from perfusion import toyland
from perfusion.backbones.loading import resolve_device
from perfusion.manifest import ImageRecord
from perfusion.scoring.clip import ClipScorer, ScorerError, fingerprint, named_scorer
from perfusion.toyland.reader import Reader

AUTO, NONE = "auto", "none"
READER = Path(toyland.__file__).with_name("weights") / "reader"


class Embedder(Protocol):
    """What CLIP and DINO have in common."""

    name: str

    def image_embeddings(self, images: Sequence[Image.Image]) -> Tensor:
        """n pictures of any size to (n, d), rows of length 1."""
        ...

    def fingerprint(self) -> str:
        """A hash of the weights."""
        ...


@dataclass(frozen=True)
class Scorers:
    """The models that score pictures: CLIP, and where they are wanted DINO and the attribute reader."""

    clip: ClipScorer
    dino: Embedder | None = None
    reader: Reader | None = None

    @cached_property
    def identity(self) -> dict[str, str]:
        """Hashes of the models' weights: scores by the same weights can be compared."""
        reader = {} if self.reader is None else {"reader": fingerprint(self.reader)}
        return {kind: scorer.fingerprint() for kind, scorer in self._embedders.items()} | reader

    @property
    def names(self) -> dict[str, str]:
        """The names of the models."""
        return {kind: scorer.name for kind, scorer in self._embedders.items()}

    @property
    def _embedders(self) -> dict[str, Embedder]:
        return {"clip": self.clip} if self.dino is None else {"clip": self.clip, "dino": self.dino}


def clip_scorer(name: str | None, pretrained: str | None, device: str, folders: Sequence[ImageFolder]) -> ClipScorer:
    """The CLIP model called `name`; None is Toyland's own, for pictures of Toyland alone. Raises ScorerError: there is
    none by that name, or none was named for pictures of other models; BackboneError: no such device."""
    of_toyland = all(_of_toyland(record) for folder in folders for record in folder.records)
    foreign = None if of_toyland else "not all pictures are Toyland's"
    return named_scorer(name, pretrained, resolve_device(device), foreign)


def dino_scorer(name: str | None, pretrained: str | None, device: str) -> DinoScorer | None:
    """The DINO model called `name`, if any. ScorerError, BackboneError: as `clip_scorer`."""
    if name is None:
        if pretrained is not None:
            raise ScorerError(f"dino_pretrained={pretrained}: of which model? Give dino=<timm name>")
        return None
    return DinoScorer(name, pretrained, resolve_device(device))


def attribute_reader(choice: str, folders: Sequence[ImageFolder], instances: bool) -> Reader | None:
    """The attribute reader: `none`, a folder, or `auto`, the shipped one wherever a picture is Toyland's, as those are
    where the command line names a toy (`instances`). Raises ScorerError: it cannot be loaded."""
    if choice != AUTO:
        return None if choice == NONE else load_reader(choice)
    there = instances or any(_of_toyland(record) for folder in folders for record in folder.records)
    return load_reader() if there else None


def _of_toyland(record: ImageRecord) -> bool:
    return record.backbone == "toyland" or record.instance is not None


def load_reader(folder: str | Path | None = None) -> Reader:
    """The reader in `folder`; default: the one that ships with the project. Raises ScorerError: it is not there,
    damaged, or of another version of the world."""
    path = READER if folder is None else Path(folder).expanduser()
    if not path.is_dir():
        how = "run `make toyland`, or leave it out with reader=none" if folder is None else "expected a reader's folder"
        raise ScorerError(f"{path}: the attribute reader is not there; {how}")
    try:
        return Reader.load(path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ScorerError(f"{path}: the attribute reader cannot be loaded: {error}") from error
