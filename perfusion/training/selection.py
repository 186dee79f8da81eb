"""Keep the step at which the concept looks like itself and still does what prompts say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from perfusion.backbones.base import Backbone
from perfusion.config import ConfigError
from perfusion.contact_sheet import image_grid
from perfusion.data.prompts import fill
from perfusion.files import atomic_path
from perfusion.methods.base import Method
from perfusion.sampling import sample
from perfusion.scoring.clip import named_scorer
from perfusion.scoring.metrics import clip_scores
from perfusion.training.samples import sample_templates

FOLDER = "progress"
_STRIP_SIDE = 128  # pixels of one picture in a strip, at most


class SelectBestStep(Callback):
    """Every k steps samples prompts with the concept and scores them; training ends with the state that scored best.

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
        steps: int = 25,
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
        self.best_step: int | None = None
        self.best_scores: dict[str, float] = {}
        self._best_state: dict[str, Tensor] = {}
        self._seen = 0  # the step that was looked at last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the scorer and look at the pictures and prompts, before the first step can be lost to a mistake."""
        method, backbone = _parts(pl_module)
        word = method.word
        templates = self.templates or sample_templates(backbone.config.prompts)
        self._prompts = [fill(template, word.placeholder) for template in templates]
        backbone.check_prompts(self._prompts)
        foreign = None if backbone.family == "toyland" else f"this is {backbone.family} (or callbacks=none)"
        scorer = named_scorer(self.scorer_name, self.pretrained, backbone.device, foreign, "callbacks.select.")
        self._scorer = scorer
        self._texts = scorer.text_embeddings([fill(template, word.superclass) for template in templates])
        self._references = scorer.image_embeddings(trainer.datamodule.examples.pictures())  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if step == self._seen or not due or step == 0:  # accumulated batches end more than once at the same step
            return
        self._seen = step
        method, backbone = _parts(pl_module)
        scores: dict[str, float] = {}
        if trainer.is_global_zero:
            images = self._sample(method, backbone)
            _save_strip(Path(trainer.default_root_dir) / FOLDER / f"step-{step:05d}.png", images)
            scores = self._score(images)
        scores = trainer.strategy.broadcast(scores)  # so that all processes, whose states are the same, choose alike
        if not self.best_scores or scores["harmonic"] > self.best_scores["harmonic"]:
            self.best_step, self.best_scores = step, scores
            self._best_state = {name: tensor.float().cpu() for name, tensor in method.state().items()}
        pl_module.log_dict(scores, logger=False, batch_size=1)  # for callbacks that watch a metric
        for logger in trainer.loggers:
            logger.log_metrics(scores, step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._best_state:
            _parts(pl_module)[0].load_state(self._best_state)

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_step": self.best_step,
            "best_scores": dict(self.best_scores),
            "best_state": dict(self._best_state),
            "seen": self._seen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_step, self._seen = state_dict["best_step"], state_dict["seen"]
        self.best_scores, self._best_state = dict(state_dict["best_scores"]), dict(state_dict["best_state"])

    def summary(self) -> Mapping[str, Any]:
        """What metrics.json says of the choice: the step that was kept and its scores; nothing before the first."""
        return {} if self.best_step is None else {"step_kept": self.best_step, "scores": dict(self.best_scores)}

    def _sample(self, method: Method, backbone: Backbone) -> list[Image.Image]:
        training = method.training
        method.eval()
        try:
            return sample(
                backbone.pipe,
                self._prompts,
                [self.seed + k for k in range(len(self._prompts))],
                self.steps,
                backbone.config.guidance if self.guidance is None else self.guidance,
                self.batch_size,
                size=backbone.config.resolution,
                exact=False,  # the batches are the same at every step
            )
        finally:
            method.train(training)

    def _score(self, images: Sequence[Image.Image]) -> dict[str, float]:
        return clip_scores(self._scorer.image_embeddings(images), self._references, self._texts)


def _parts(module: LightningModule) -> tuple[Method, Backbone]:
    method, backbone = module.method, module.backbone
    assert isinstance(method, Method) and isinstance(backbone, Backbone), "expected a PersonalizationModule"
    return method, backbone


def _save_strip(path: Path, images: Sequence[Image.Image]) -> None:
    """The samples side by side, small."""
    small = [image.copy() for image in images]
    for image in small:
        image.thumbnail((_STRIP_SIDE, _STRIP_SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image_grid(small, len(small)).save(temporary)
