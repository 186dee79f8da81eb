"""The claims on a folder of photos, with a model such as Stable Diffusion. Likeness is CLIP-I, prompts are followed by
CLIP-T. `experiments.photo_protocols` reads which subjects and prompts there are.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from experiments.settings import ONE, SEVERAL, Setting, Training
from experiments.world import PHOTOS, World
from perfusion.config import ConceptConfig

# Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from eval.folders import References
    from eval.scorers import Scorers


@dataclass(frozen=True)
class PhotoOptions:
    """What the command line says of `world=photos`; None: the default."""

    data: str | None = None
    protocol: str | None = None
    masks: str | None = None
    backbone: str | None = None
    path: str | None = None
    layout: str | None = None
    dtype: str | None = None
    device: str | None = None
    scorer: str | None = None
    pretrained: str | None = None
    dino: str | None = None
    dino_pretrained: str | None = None

    @property
    def preset(self) -> str:
        """Of the backbone."""
        return self.backbone or "sd15"

    def words(self, prefix: str, *keys: str) -> tuple[str, ...]:
        """Those of these options that are given, as words of `perfusion.train`."""
        return tuple(f"{prefix}.{key}={value}" for key in keys if (value := getattr(self, key)) is not None)


@dataclass(frozen=True)
class PhotoSubject:
    """One thing to learn from the photos in a folder."""

    name: str
    superclass: str
    photos: str  # the folder
    first: str  # of the photos: what is learned from where one picture is to be enough
    count: int  # of the photos
    prompts: tuple[str, ...]  # templates with one `{}`
    masks: str | None = None  # `clipseg`, or a folder with a mask for each photo
    instance: None = None  # it is no toy

    @property
    def placeholder(self) -> str:
        return f"<{word(self.name)}*>"

    @property
    def description(self) -> str:
        return self.superclass

    def about(self) -> dict[str, Any]:
        return {"name": self.name, "superclass": self.superclass, "photos": self.count}

    def concept(self, given: ConceptConfig, pictures: int | None) -> ConceptConfig:
        images = self.first if pictures == ONE else self.photos
        said = {"name": self.name, "superclass": self.superclass, "placeholder": self.placeholder}
        return replace(given, **said, images=images, masks=self.masks)


@dataclass(frozen=True)
class Photos(World):
    """Photos of subjects, judged by CLIP.

    The slack of CLIP-T is a twentieth of what separates the methods of a published comparison (0.199 to 0.307), and
    what counts as slight is to it as in Toyland. Both were set before anything was measured.
    """

    kind = PHOTOS
    title = "photos"
    thing, ys = "subject", "values of CLIP-I"
    several, several_pictures = "all", "all pictures"
    x, y = "clip_t", "clip_i"
    slack, slack_means = 0.005, "a twentieth of what separates published methods"
    slight = 0.0125
    scheduler, sampler = "DDIMScheduler", "ddim"
    at_once = 4
    measured = True
    tables = True

    subjects: tuple[PhotoSubject, ...] = ()
    protocol: str = ""  # its name
    model: PhotoOptions = field(default_factory=PhotoOptions)  # which names the base model and the scorers
    workers: int = 1  # processes that share this machine's cores

    @property
    def prompts_each(self) -> int:
        return max(len(one.prompts) for one in self.subjects)

    def templates(self, *of: PhotoSubject) -> tuple[str, ...]:
        return of[0].prompts if len(of) == 1 else self.pair_prompts

    def listed_prompts(self, pairs: bool) -> list[list[str]]:
        each = self.pair_prompts if pairs else [prompt for one in self.subjects for prompt in one.prompts]
        return [[prompt] for prompt in dict.fromkeys(each)]

    def first_prompts(self, count: int) -> Photos:
        return replace(self, subjects=tuple(replace(one, prompts=one.prompts[:count]) for one in self.subjects))

    @property
    def weights(self) -> str:
        return _weights_digest(self.model.preset, self.model.path, self.model.layout, self.model.dtype)

    @property
    def folder(self) -> str:
        return f"{self.protocol}-{self.weights}"

    @property
    def threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.workers)

    @property
    def words(self) -> tuple[str, ...]:
        model = self.model.words("backbone", "path", "layout", "dtype", "device")
        # The preset asks for superclass and images; the subject's own take the places of these.
        concept = ("concept=photos", "concept.superclass=thing", "concept.images=none")
        return f"backbone={self.model.preset}", *model, *concept

    def training(self, training: Training) -> Training:
        """Published settings, and all photos where several are asked for; the kept step is chosen by the scorer."""
        training = training.usual if training.pictures == SEVERAL else training
        training = replace(training, preset=training.preset.removesuffix("_toyland"))
        words = self.model.words("callbacks.select", "scorer", "pretrained")
        if "callbacks=select" not in training.changes or words[0] in training.changes:
            return training
        return replace(training, changes=(*training.changes, *words))

    def lacks(self, settings: Sequence[Setting]) -> str | None:
        if any(setting.described for setting in settings):
            return "subjects whose looks can be told in words, as world=toyland has them"
        unmasked = any(s.training is not None and "method.masked_loss=false" in s.training.changes for s in settings)
        return "masks of the photos, masks=" if unmasked and all(one.masks is None for one in self.subjects) else None

    def references(self, subjects: Sequence[PhotoSubject]) -> References:
        from eval.folders import References

        return References(references={one.name: one.photos for one in subjects})

    def scorers(self) -> Scorers:
        return _scorers(self.model)


def word(name: str) -> str:
    """A name of letters, digits and underscores."""
    return re.sub(r"\W+", "_", name).strip("_") or "subject"


@functools.cache
def _weights_digest(*said: str | None) -> str:
    """Over the files that a model is read from, and how it is read."""
    from perfusion.training.inputs import model_digests

    content = [said, model_digests(said[1]), model_digests(said[2])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


@functools.cache
def _scorers(model: PhotoOptions) -> Scorers:
    from eval.scorers import Scorers, dino_scorer
    from perfusion.backbones.loading import resolve_device
    from perfusion.scoring.clip import ClipScorer

    assert model.scorer is not None
    device = model.device or "auto"
    clip = ClipScorer(model.scorer, model.pretrained, resolve_device(device))
    return Scorers(clip, dino_scorer(model.dino, model.dino_pretrained, device))
