"""What the claims of the paper are tried on. A world says which subjects there are and which prompts, how they are
trained and drawn, by which two scores fronts are drawn and claims are judged, and which differences of them count.

`experiments.protocol` has Toyland's toys, `experiments.photos` a folder of photos.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from eval.score_kinds import BY_NAME
from eval.tables import Reported
from experiments.settings import PERFUSION, Setting, Training, preset_value
from perfusion.config import ConceptConfig

if TYPE_CHECKING:
    from eval.folders import References
    from eval.scorers import Scorers

TOYLAND, PHOTOS = "toyland", "photos"  # kinds
_SAID = ("slack", "slack_means", "slight", "title", "thing", "ys", "several", "several_pictures")  # in texts of claims


class Subject(Protocol):
    """One thing to learn, by a name that is unique in its world."""

    @property
    def name(self) -> str: ...
    @property
    def superclass(self) -> str: ...
    @property
    def placeholder(self) -> str: ...  # the word that stands for it in prompts
    @property
    def instance(self) -> int | None: ...  # of a toy: the seed of its looks
    @property
    def description(self) -> str: ...  # its superclass, behind all that the world knows of its looks

    def about(self) -> dict[str, Any]:
        """What results say of it, in JSON values."""
        ...

    def concept(self, given: ConceptConfig, pictures: int | None) -> ConceptConfig:
        """The part of a run's config that says what is learned, from so many pictures (None: as many as usual)."""
        ...


@dataclass(frozen=True)
class World(abc.ABC):
    """What the claims are tried on."""

    kind: ClassVar[str]  # the word of the command line, `world=<kind>`
    title: ClassVar[str]  # what texts call it
    thing: ClassVar[str]  # what texts call a subject
    ys: ClassVar[str]  # what texts call values of `y`
    several: ClassVar[str]  # how many pictures a training on several has, in a text
    several_pictures: ClassVar[str]  # the same as a label
    x: ClassVar[str]  # the score of fronts that goes to the right: how well the prompt is followed
    y: ClassVar[str]  # that which goes up: the likeness
    slack: ClassVar[float]  # of `x`, within which two settings follow the text alike
    slack_means: ClassVar[str]  # why, in words
    slight: ClassVar[float]  # of `x`, which counts as a slight loss
    scheduler: ClassVar[str]  # of diffusers
    sampler: ClassVar[str]  # its short name, for folders
    at_once: ClassVar[int]  # pictures in one batch
    budget: ClassVar[float | None] = None  # seconds that a training of Perfusion may take, if that is to be held
    measured: ClassVar[bool] = False  # whether times are measured, rather than known beforehand
    tables: ClassVar[bool] = False  # whether results are also written as tables in LaTeX
    subjects: tuple[Any, ...] = ()
    pair_prompts: tuple[Any, ...] = ()  # of two subjects together
    published: tuple[Reported, ...] = ()  # what others report
    seeds: tuple[int, ...] = (0,)
    steps: int = 50
    guidance: float = 6.0

    @property
    @abc.abstractmethod
    def prompts_each(self) -> int:
        """How many prompts a subject has, at most."""

    @abc.abstractmethod
    def templates(self, *of: Any) -> tuple[str, ...]:
        """The prompts of one subject, or of two together, with a `{}` for each."""

    @abc.abstractmethod
    def listed_prompts(self, pairs: bool) -> list[list[str]]:
        """All prompts of single subjects, or of pairs: alternatives, of which a subject has the first that suits it."""

    @abc.abstractmethod
    def first_prompts(self, count: int) -> World:
        """The same world with so many prompts of each subject."""

    @property
    @abc.abstractmethod
    def weights(self) -> str:
        """12 hexadecimal digits over the weights of the base model. Raises ConfigError: they are not there."""

    @abc.abstractmethod
    def training(self, training: Training) -> Training:
        """A claim's training as it is done here; two that are the same here become equal. Of what it gives, the same
        again."""

    @abc.abstractmethod
    def references(self, subjects: Sequence[Any]) -> References:
        """What pictures of these subjects are held against."""

    @abc.abstractmethod
    def scorers(self) -> Scorers:
        """The models that score pictures, loaded once in a process."""

    # --- the same in all worlds, where they do not say otherwise ---

    @property
    def folder(self) -> str:
        """The name of the folder of all that is made in it."""
        return self.weights

    @property
    def threads(self) -> int:
        """Of each worker."""
        return 1

    @property
    def words(self) -> tuple[str, ...]:
        """Words of `perfusion.train` for all trainings: which model, and what kind of concept."""
        return ()

    def autocast(self, device: Any) -> AbstractContextManager[Any]:
        """The arithmetic that pictures are drawn in."""
        return nullcontext()

    def lacks(self, settings: Sequence[Setting]) -> str | None:
        """What these settings need that the world has not, in words; None: nothing."""
        return None

    def smaller(self, concepts: int, prompts: int, seeds: int, steps: int) -> World:
        """The first of its subjects and prompts, and so many seeds and steps."""
        some = replace(self, subjects=self.subjects[:concepts], pair_prompts=self.pair_prompts[:prompts], steps=steps)
        return replace(some.first_prompts(prompts), seeds=tuple(range(self.seeds[0], self.seeds[0] + seeds)))

    @property
    def pairs(self) -> tuple[tuple[Any, Any], ...]:
        """Each subject beside the next one of another superclass, and in one pair at most: two of one superclass are
        hardly told apart in a picture, and not at all in its prompt's superclasses."""
        pairs, free = [], [*self.subjects]
        while free:
            one = free.pop(0)
            if other := next((another for another in free if another.superclass != one.superclass), None):
                free.remove(other)
                pairs.append((one, other))
        return tuple(pairs)

    def partner(self, subject: Any) -> Any:
        """The other one of a subject's pair."""
        return next(other for pair in self.pairs if subject in pair for other in pair if other != subject)

    def seeds_of(self, times: int) -> tuple[int, ...]:
        """The seeds of an experiment that draws so many times as many pictures as others."""
        return tuple(range(self.seeds[0], self.seeds[0] + times * len(self.seeds)))

    def setting(self, setting: Setting) -> Setting:
        """`training`, of a setting."""
        return setting if setting.training is None else replace(setting, training=self.training(setting.training))

    def said(self, text: str) -> str:
        """A text of a claim, with this world's words in the places of `{x}`, `{thing}` and the like; `{beta}` is that
        with which Perfusion is trained."""
        words = {name: getattr(self, name) for name in _SAID}
        beta = float(preset_value(self.training(PERFUSION), "beta"))
        return text.format(x=BY_NAME[self.x].title, y=BY_NAME[self.y].title, beta=f"{beta:g}", **words)


def filled(template: str, *phrases: str) -> str:
    """`template` with phrases in the places of its `{}`, in their order."""
    for phrase in phrases:
        template = template.replace("{}", phrase, 1)
    return template
