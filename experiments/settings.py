"""What the experiments train and how they draw it; equal settings are trained and drawn once for all of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from perfusion.config import CONF, RunConfig, TrainConfig

if TYPE_CHECKING:
    from experiments.world import Subject

EXPERIMENT = "trained"  # names the folder of the runs
SEED = 0  # of all trainings
SAMPLE_STEPS = 4  # of samples.png, at which nobody looks here
_NEVER = 10**6  # a training takes less than a minute: one that was stopped starts anew
BASE = "base"
ONE, SEVERAL = 1, 5  # pictures that a subject is learned from; a world with photos takes all of them for several
_SAID = {ONE: ", 1 picture", SEVERAL: ", 5 pictures"}  # in labels


@dataclass(frozen=True)
class Training:
    """A method and its settings, to be trained on any subject."""

    label: str  # what manifests, tables and figures call it
    preset: str  # a file of conf/method; other worlds than Toyland have the one without `_toyland` in its place
    changes: tuple[str, ...] = ()  # words of `python -m perfusion.train`
    shares: tuple[float, ...] = ()  # of its steps, after which the concept is kept beside the one at the end
    pictures: int | None = None  # ONE or SEVERAL; None: as many as its world usually has
    joint: bool = False  # the two subjects of a pair are trained together, see `experiments.joint`

    def changed(self, label: str, *words: str, pictures: int | None = None) -> Training:
        """This training with further words on its command line, or with another number of pictures."""
        return replace(self, label=label, changes=(*self.changes, *words), pictures=pictures or self.pictures)

    @property
    def usual(self) -> Training:
        """The same in a world that usually has so many pictures, which its label need not say there."""
        said = "" if self.pictures is None else _SAID[self.pictures]
        return replace(self, label=self.label.replace(said, "", 1), pictures=None)


@dataclass(frozen=True)
class Setting:
    """One point of a front: a training, and what the dials of its method are set to while it draws."""

    training: Training | None  # None: the base model, with the superclass's word
    dials: tuple[tuple[str, Any], ...] = ()  # names and values; not a mapping, so that settings can be keys of one
    share: float = 1.0  # of the training's steps that have been taken
    described: bool = False  # all looks of the subject are told beside the superclass's word; of the base model alone

    @property
    def label(self) -> str:
        if self.training is not None:
            return self.training.label
        return f"{BASE}, told all looks" if self.described else BASE

    @property
    def name(self) -> str:
        """A name for people, unique among the settings of a training."""
        if self.training is None:
            return "described" if self.described else "the-superclass"
        parts = [f"{name}-{value:g}" if isinstance(value, float) else str(value) for name, value in self.dials]
        parts += [f"share-{self.share:.2f}"] if self.share != 1 else []
        return "-".join(parts) or "as-trained"


PERFUSION = Training("perfusion", "perfusion_toyland")
ONE_PICTURE = PERFUSION.changed("perfusion, 1 picture", pictures=ONE)
FIVE_PICTURES = PERFUSION.changed("perfusion, 5 pictures", pictures=SEVERAL)
TRAINED_KEYS = PERFUSION.changed("perfusion, trained keys", "method.key_lock=none")
TEXTUAL_INVERSION = Training("textual_inversion", "textual_inversion_toyland", shares=(1 / 3, 2 / 3))
DREAMBOOTH = Training("dreambooth", "dreambooth_toyland", shares=(1 / 3, 2 / 3))
CUSTOM_DIFFUSION = Training("custom_diffusion", "custom_diffusion_toyland", shares=(1 / 3, 2 / 3))
JOINT_CUSTOM_DIFFUSION = replace(CUSTOM_DIFFUSION, label="custom_diffusion, trained together", joint=True)
LORA = Training("lora", "lora_toyland")
METHODS = (PERFUSION, TEXTUAL_INVERSION, DREAMBOOTH, CUSTOM_DIFFUSION, LORA)

# With τ 0.15 and a word's own i*, the gate is open to 0.95, 0.88, 0.73, 0.5, 0.27 and 0.12. Below these it opens at the
# words beside it, too.
BETAS = (0.55, 0.7, 0.85, 1.0, 1.15, 1.3)  # Perfusion's front
FEW_BETAS = (0.7, 0.85, 1.0)  # of them, where two variants are compared
SCALES = (0.2, 0.4, 0.7, 1.0)  # LoRA's front
BASE_MODEL = Setting(None)
DESCRIBED = Setting(None, described=True)


def by_beta(training: Training, betas: Sequence[float] = BETAS, **others: Any) -> tuple[Setting, ...]:
    """A front of Perfusion: β swept, other dials set."""
    return tuple(Setting(training, (("beta", beta), *others.items())) for beta in betas)


def dial(training: Training, betas: Sequence[float] = BETAS) -> tuple[Setting, ...]:
    """The front of a training by the one dial of its method: β or scale in pictures, else how long it was trained."""
    if training.preset == PERFUSION.preset:
        return by_beta(training, betas)
    if training.preset == LORA.preset:
        return tuple(Setting(training, (("scale", scale),)) for scale in SCALES)
    return tuple(Setting(training, share=share) for share in (*training.shares, 1.0))


def preset_value(training: Training, key: str) -> Any:
    """What a training's preset says of one of the method's options."""
    return OmegaConf.select(OmegaConf.load(CONF / "method" / f"{training.preset}.yaml"), key)


def step_of(share: float, steps: int) -> int:
    """The step that a share of a training ends with."""
    return max(1, round(share * steps))


def snapshot_file(run: Path, step: int) -> Path:
    """The concept in a run's folder as it was after `step`; `experiments.snapshots` keeps it there."""
    return run / "snapshots" / f"step-{step:05d}.safetensors"


@functools.cache
def config_of(training: Training, subject: Subject, root: Path, words: tuple[str, ...] = ()) -> TrainConfig:
    """The config of a run, which `python -m perfusion.train from=<its folder>` trains as well; all trainings of a world
    have some `words` of it in common. Raises ConfigError: a preset, key or value that cannot be."""
    config = copy.deepcopy(_composed((f"method={training.preset}", "callbacks=none", *words, *training.changes)))
    callbacks = {**config.callbacks}
    callbacks["checkpoint"]["every"] = _NEVER
    if training.shares:
        kept = {"_target_": "experiments.snapshots.KeepSteps", "shares": [*training.shares], "seed": SEED}
        callbacks["snapshots"] = kept
    return replace(
        config,
        experiment=EXPERIMENT,
        seed=SEED,
        backbone=replace(config.backbone, steps=SAMPLE_STEPS),
        concept=subject.concept(config.concept, training.pictures),
        trainer={**config.trainer, "enable_progress_bar": False},
        callbacks=callbacks,
        run=RunConfig(root=str(root)),
    )


@functools.cache
def _composed(words: tuple[str, ...]) -> TrainConfig:
    # Takes long to import, and `--help` does without.
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    from perfusion.training.composition import checked_config, explained, prepared

    try:
        with initialize_config_dir(str(CONF), job_name="perfusion.train", version_base="1.3"):
            return checked_config(compose("train", [prepared(word) for word in words]))
    except HydraException as error:
        raise explained(error) from error
