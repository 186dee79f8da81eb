"""DreamBooth (Ruiz et al. 2023, arXiv 2208.12242): the whole denoiser is trained, and holds on to its superclass.

**The word.** The paper names the concept by a rare word before its superclass, "sks cat". Here the placeholder stands
for these two words: it is added to the tokenizer with the vectors of their tokens, frozen, so `<cat*>` is encoded bit
for bit as "sks cat" is. An exported pipeline needs no new word: its prompts say "sks cat".

**The text encoder** is trained, too, with `train_text_encoder`: all of it but the table of tokens, so that "sks" and
"cat" stay the words that the placeholder stands for. (diffusers' script trains the table as well.)

**Memory.** The frozen weights stay beside the trained ones, so that `detach` is exact: 4 bytes more for each weight of
the denoiser in training (3.4 GB for Stable Diffusion 1.5, beside 13.8 GB of weights, gradients and AdamW's moments),
and a second copy in the backbone's dtype while a concept is attached for drawing. A concept file holds all of it in
half precision: 1.7 GB. A checkpoint holds 12 bytes for each weight; `callbacks.checkpoint.every` says how often one is
written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perfusion.backbones.base import Backbone
from perfusion.backbones.saving import save_pipeline
from perfusion.editing.places import Place, base_module
from perfusion.methods.base import Word, check_bounds
from perfusion.methods.prior import PriorMethod, PriorOptions
from perfusion.methods.weights import check_unedited, parameter_places, put_copies, standing

_DENOISER = "denoiser"  # its name in a state


@dataclass
class DreamBoothOptions(PriorOptions):
    """Values that are commonly used for Stable Diffusion 1.5, with prior preservation."""

    name: str = "dreambooth"
    steps: int = 800  # 400 without prior pictures
    batch_size: int = 1
    identifier: str = "sks"  # rare word that names the concept, before its superclass
    denoiser_rate: float = 5e-6
    train_text_encoder: bool = False
    text_encoder_rate: float = 2e-6
    weight_decay: float = 0.01  # AdamW's


class DreamBooth(PriorMethod):
    """The whole denoiser, trained on a rare word beside the superclass, with pictures of the superclass as prior."""

    Options = DreamBoothOptions
    options: DreamBoothOptions

    def __init__(self, options: DreamBoothOptions, word: Word) -> None:
        super().__init__(options, word)
        bounds = {
            "identifier": (bool(options.identifier.strip()), "a rare word, such as 'sks'"),
            "denoiser_rate": (options.denoiser_rate >= 0, "at least 0"),
            "text_encoder_rate": (options.text_encoder_rate >= 0, "at least 0"),
            "weight_decay": (options.weight_decay >= 0, "at least 0"),
        }
        check_bounds(options, bounds)

    def clear(self) -> None:
        super().clear()
        self.weights = nn.ModuleDict()  # part of the model -> ParameterList, in the order of its places
        self._frozen: list[nn.Parameter] = []  # the model's own, likewise

    @property
    def phrase(self) -> str:
        """What the placeholder stands for."""
        return f"{self.options.identifier} {self.word.superclass}"

    def put(self, backbone: Backbone, undo: ExitStack) -> None:
        """Put weights of its own in the places of those that are trained, and add the word.

        Raises:
            EditError: other concepts have changed the weights that it replaces; or it shall be trained, and the
                backbone is not in float32.
            TokenError: the placeholder is a word already, or the identifier cannot be read.
        """
        check_unedited(backbone, self.word.placeholder)
        for dtype in (None, torch.bfloat16):
            backbone.fingerprint(dtype)  # of the frozen weights, which it remembers
        for part, places in self._places(backbone).items():
            self._frozen += [place.now for place in places]
            self.weights[part] = put_copies(places, f"the concept {self.word.placeholder}", self.training, undo)
        self.add_word(undo, vectors=None, reads_as=self.phrase, trained=False)

    def aside(self) -> AbstractContextManager[None]:
        return standing(self._frozen, [place for places in self._places(self.backbone).values() for place in places])

    def _places(self, backbone: Backbone) -> dict[str, list[Place]]:
        """Part of the model -> the places of all its weights that are trained."""
        parts = {_DENOISER: [*parameter_places(backbone.denoiser)]}
        if self.options.train_text_encoder:
            for name, encoder in backbone.text_encoders().items():
                table = base_module(encoder.get_input_embeddings())  # type: ignore[operator]
                parts[name] = [place for place in parameter_places(encoder) if place.parent is not table]
        return parts

    def _named(self, backbone: Backbone) -> Iterator[tuple[str, nn.Parameter]]:
        """Names in a state, and what stands in these places now."""
        for part, places in self._places(backbone).items():
            for place in places:
                yield f"{part}.{place.name}", place.now

    def parameter_groups(self) -> list[dict[str, Any]]:
        rates = {**dict.fromkeys(self.weights, self.options.text_encoder_rate), _DENOISER: self.options.denoiser_rate}
        return [
            {"name": part, "params": [*own.parameters()], "lr": rates[part], "weight_decay": self.options.weight_decay}
            for part, own in self.weights.items()
        ]

    def tensors(self) -> dict[str, Tensor]:
        """`denoiser.<name>`: all weights of the denoiser; `<text encoder>.<name>` where text encoders are trained."""
        return dict(self._named(self.backbone))

    def state_shapes(self, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._named(backbone)}

    def export(self, folder: Path) -> list[Path]:
        """A whole pipeline, for `DiffusionPipeline.from_pretrained(folder)`; the denoiser is in half precision, as in a
        concept file. Its prompts say `phrase` instead of the placeholder."""
        return save_pipeline(self.backbone.pipe, folder, half=self.backbone.denoiser)


METHOD = DreamBooth
