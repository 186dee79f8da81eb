"""Keep the step at which the concept looks like itself and still does what prompts say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL.Image import Image
from torch import Tensor

from perfusion.backbones.base import Backbone
from perfusion.config import ConfigError
from perfusion.contact_sheet import image_grid
from perfusion.data.images import Examples
from perfusion.data.prompts import fill, validation_prompts
from perfusion.drawing import sample
from perfusion.files import atomic_path
from perfusion.scoring.clip import named_scorer
from perfusion.scoring.metrics import clip_scores
from perfusion.training.module import PersonalizationModule

FOLDER = "progress"
_STRIP_SIDE = 128  # pixels of one picture in a strip, at most


class SelectBestStep(Callback):
    """Has the training validated every k steps, and ends it with the state that scored best.

    The score is the harmonic mean of CLIP-I, against the training pictures, and CLIP-T, as in Perfusion. The noise of a
    prompt is the same at every step, so scores differ by what was learned alone; of equal ones the first counts.
    Samples are drawn in eval mode, that is with the method's settings for sampling, and without touching any generator
    that training draws from. All that was found so far is in the checkpoints, so a resumed run chooses like one that
    never stopped.

    Args:
        every: k, in optimizer steps; the last step counts, too, step 0 does not.
        scorer, pretrained: the scoring model, see `ClipScorer`; default: Toyland's own, on Toyland alone.
        prompts: templates with one `{}` for the concept; default: the validation prompts that go with the backbone.
        steps: denoising steps of a sample: fewer than for a good picture are enough to choose by.
        guidance: default: the backbone's.
        batch_size: samples in one call of the denoiser.
        seed: of the first prompt's sample; the others follow on.

    Raises:
        ConfigError: `every` below 1, no prompts.
        ScorerError: in `setup`, see `named_scorer`.
        TokenError: in `setup`, a prompt is so long that the placeholder would be cut off.
    """

    def __init__(
        self,
        every: int = 25,
        scorer: str | None = None,
        pretrained: str | None = None,
        prompts: Sequence[str] | None = None,
        steps: int = 16,
        guidance: float | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if every < 1:
            raise ConfigError(f"every: found {every}, expected at least 1 step")
        if prompts is not None and not prompts:
            raise ConfigError("prompts: found none, expected templates such as 'a photo of a {}', or null")
        self.every, self.steps, self.guidance = every, steps, guidance
        self.batch_size, self.seed = batch_size, seed
        self.scorer_name, self.pretrained = scorer, pretrained
        self.templates = None if prompts is None else tuple(prompts)
        self.prompts: list[str] = []
        self.best_step: int | None = None
        self.best_scores: dict[str, float] = {}
        self._best_state: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the scorer and look at the pictures and prompts, before the first step can be lost to a mistake."""
        method, backbone = _trained(pl_module).method, _trained(pl_module).backbone
        templates = self.templates or validation_prompts(backbone.config.prompts)
        self.prompts = [fill(template, method.word.placeholder) for template in templates]
        backbone.check_prompts(self.prompts)
        foreign = None if backbone.family == "toyland" else f"this is {backbone.family} (or callbacks=none)"
        self.scorer = named_scorer(self.scorer_name, self.pretrained, backbone.device, foreign, "callbacks.select.")
        self.texts = self.scorer.text_embeddings([fill(template, method.word.superclass) for template in templates])
        examples: Examples = trainer.datamodule.examples  # type: ignore[attr-defined]
        self.references = self.scorer.image_embeddings(examples.pictures())
        _trained(pl_module).validation = self
        every = min(self.every, trainer.max_steps)
        trainer.val_check_interval = every * trainer.accumulate_grad_batches  # counts batches
        trainer.check_val_every_n_epoch = (
            1  # in it: a step that has begun while a checkpoint is saved counts for nothing
        )

    def draw(self, backbone: Backbone, numbers: Sequence[int]) -> list[Image]:
        """Pictures of some of the prompts, in the backbone's present state."""
        return sample(
            backbone.pipe,
            [self.prompts[k] for k in numbers],
            [self.seed + k for k in numbers],
            self.steps,
            backbone.config.guidance if self.guidance is None else self.guidance,
            self.batch_size,
            size=backbone.config.resolution,
            exact=False,  # the batches are the same at every step
        )

    def scores(self, images: Sequence[Image]) -> dict[str, float]:
        """`clip_i`, `clip_t` and their `harmonic` mean, of pictures of the first prompts."""
        return clip_scores(self.scorer.image_embeddings(images), self.references, self.texts[: len(images)])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Lightning validates a training that is told to stop, whatever the interval: so the last step counts, too."""
        trainer.should_stop |= trainer.global_step >= trainer.max_steps

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, step = _trained(pl_module), trainer.global_step
        if trainer.sanity_checking:
            return
        if trainer.is_global_zero:
            _save_strip(Path(trainer.default_root_dir) / FOLDER / f"step-{step:05d}.png", module.drawn)
        if not self.best_scores or module.scores["harmonic"] > self.best_scores["harmonic"]:
            self.best_step, self.best_scores = step, module.scores
            self._best_state = {name: tensor.float().cpu() for name, tensor in module.method.state().items()}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._best_state:
            _trained(pl_module).method.load_state(self._best_state)

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_step": self.best_step,
            "best_scores": dict(self.best_scores),
            "best_state": dict(self._best_state),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_step = state_dict["best_step"]
        self.best_scores, self._best_state = dict(state_dict["best_scores"]), dict(state_dict["best_state"])

    def summary(self) -> Mapping[str, Any]:
        """What metrics.json says of the choice: the step that was kept and its scores; nothing before the first."""
        return {} if self.best_step is None else {"step_kept": self.best_step, "scores": dict(self.best_scores)}


def _trained(module: LightningModule) -> PersonalizationModule:
    assert isinstance(module, PersonalizationModule), "expected a PersonalizationModule"
    return module


def _save_strip(path: Path, images: Sequence[Image]) -> None:
    """The samples side by side, small."""
    small = [image.copy() for image in images]
    for image in small:
        image.thumbnail((_STRIP_SIDE, _STRIP_SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image_grid(small, len(small)).save(temporary)
