"""From fronts to numbers and from numbers to verdicts, on made-up scores whose truth is known."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.aggregate import Bootstrap, Interval
from eval.record import Picture, Point
from experiments.evidence import (
    Check,
    Evidence,
    Experiment,
    Finding,
    Line,
    Verdict,
    area,
    experiments,
    gain,
    lead,
    levels,
    margin,
    non_dominated,
)
from experiments.protocol import Protocol
from experiments.runner import Wanted
from experiments.settings import BASE, Setting

DIAGONAL = np.array([[0.2, 0.8], [0.5, 0.5], [0.8, 0.2]])


def test_a_front_leaves_out_what_is_dominated() -> None:
    assert np.array_equal(non_dominated(np.array([[0.4, 0.4], *DIAGONAL[::-1], DIAGONAL[0]])), DIAGONAL)


def test_area_by_hand() -> None:
    assert area(np.array([[0.5, 0.4]])) == pytest.approx(0.2)
    assert area(DIAGONAL) == pytest.approx(0.2 * 0.8 + 0.6 * 0.5)


def test_margin_by_hand() -> None:
    assert margin(DIAGONAL, np.array([0.4, 0.4])) == pytest.approx(0.1)
    assert margin(DIAGONAL, np.array([0.6, 0.6])) == pytest.approx(-0.1)
    assert margin(DIAGONAL, np.array([0.9, 0.1])) == pytest.approx(-0.1), "beyond the right end"
    assert margin(DIAGONAL, np.array([0.0, 0.9])) == pytest.approx(-0.1), "above the left end"
    assert margin(DIAGONAL, np.array([0.5, 0.5])) == pytest.approx(0, abs=1e-9)


def test_lead_and_gain_by_hand() -> None:
    assert lead(DIAGONAL, np.array([0.4, 0.4]), 0.05) == pytest.approx(0.25)
    assert lead(DIAGONAL, np.array([0.1, 0.9]), 0) == pytest.approx(-0.1), "above the left end"
    assert lead(DIAGONAL, np.array([0.81, 0.1]), 0.02) == pytest.approx(0.11)
    assert lead(DIAGONAL, np.array([0.83, 0.1]), 0.02) == pytest.approx(-0.1), "beyond the right end"
    moved = DIAGONAL + np.array([0.05, 0])
    assert gain(moved, DIAGONAL, levels(moved, DIAGONAL)) == pytest.approx(0.05)


def test_a_front_attains_what_lies_below_its_lower_end() -> None:
    above = DIAGONAL + np.array([0, 1.0])
    assert levels(above, DIAGONAL) == pytest.approx([0.32, 0.44, 0.56, 0.68, 0.8])
    assert gain(above, DIAGONAL, levels(above, DIAGONAL)) == pytest.approx(0.8 - 0.44)
    assert gain(DIAGONAL, above, levels(DIAGONAL, above)) == pytest.approx(0.44 - 0.8)
    assert levels(np.array([[0.9, 0.1]]), DIAGONAL) == pytest.approx([0.1] * 5)


@pytest.mark.parametrize(
    ("interval", "above", "verdict"),
    [
        (Interval(0.2, 0.1, 0.3), True, Verdict.HOLDS),
        (Interval(0.2, 0.1, 0.3), False, Verdict.FAILS),
        (Interval(-0.2, -0.3, -0.1), True, Verdict.FAILS),
        (Interval(-0.2, -0.3, -0.1), False, Verdict.HOLDS),
        (Interval(0.2, -0.1, 0.3), True, Verdict.UNDECIDED),
        (Interval(0.2), True, Verdict.UNDECIDED),
        (Interval(float("nan"), float("nan"), float("nan")), True, Verdict.UNDECIDED),
    ],
)
def test_an_interval_on_one_side_decides(interval: Interval, above: bool, verdict: Verdict) -> None:
    assert Check("x", interval, above=above).verdict is verdict
    shifted = Interval(*(None if v is None else v + 5 for v in (interval.mean, interval.low, interval.high)))
    assert Check("x", shifted, threshold=5.0, above=above).verdict is verdict


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (Interval(0.0, -0.01, 0.01), Verdict.ALIKE),
        (Interval(0.015, 0.005, 0.025), Verdict.HOLDS),
        (Interval(-0.015, -0.018, -0.012), Verdict.FAILS),
        (Interval(0.01, -0.005, 0.025), Verdict.UNDECIDED),
        (Interval(-0.01, -0.025, 0.005), Verdict.UNDECIDED),
        (Interval(0.0), Verdict.UNDECIDED),
    ],
)
def test_an_interval_about_the_threshold_and_near_it_is_no_difference(interval: Interval, verdict: Verdict) -> None:
    assert Check("x", interval, alike=0.02).verdict is verdict
    shifted = Interval(*(None if v is None else v + 5 for v in (interval.mean, interval.low, interval.high)))
    assert Check("x", shifted, threshold=5.0, alike=0.02).verdict is verdict


def test_all_deciding_checks_are_needed() -> None:
    good, bad, open_ = (Check("x", Interval(v, v - 0.1, v + 0.1)) for v in (1.0, -1.0, 0.0))
    beside, none = Check("x", bad.value, decides=False), Check("x", open_.value, alike=0.2)
    found = [[good, good, beside], [good, open_], [good, open_, bad], [good, none], [none, open_], [none, bad]]
    verdicts = [Finding(checks, "").verdict for checks in found]
    holds, fails, alike, undecided = Verdict
    assert verdicts == [holds, undecided, fails, alike, undecided, fails]
    assert Finding([], "").verdict is Finding([beside], "").verdict is Verdict.UNDECIDED


@pytest.fixture(autouse=True)
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no trainings behind made-up scores."""
    monkeypatch.setattr(Evidence, "training_seconds", lambda self, training: [30.0, 40.0])


class MadeUp:
    """Stands for a runner: every setting has the scores that `truth` gives it, and some noise."""

    def __init__(
        self, experiment: Experiment, truth: Callable[[Setting], Sequence[float] | np.ndarray], noise: int = 0
    ) -> None:
        whole = Protocol()
        prompts, pair_prompts = whole.prompts[:4], whole.pair_prompts[:4]
        self.protocol = replace(whole, subjects=whole.subjects[:12], prompts=prompts, pair_prompts=pair_prompts)
        self.points: dict[Wanted, Point] = {}
        for wanted in experiment.wanted(self.protocol):
            means = truth(wanted.setting)
            toys = " + ".join(toy.name for toy in wanted.subjects)
            # The noise of a toy, prompt and seed is the same for all settings but for a little, as in pictures.
            shared = np.random.default_rng([noise, *(ord(letter) for letter in toys)])
            own = np.random.default_rng([noise, len(self.points)])
            pictures, pairs = [], []
            for k, template in enumerate(self.protocol.templates(*wanted.subjects)):
                for seed in self.protocol.seeds_of(wanted.times):
                    off = 0.1 * shared.standard_normal(2) + 0.02 * own.standard_normal(2)
                    scores = dict(zip(("prompt", "identity"), np.asarray(means[:2]) + off, strict=True))
                    scores |= {"clip_t": scores["prompt"] / 4, "clip_i": scores["identity"]}
                    pictures.append(Picture(Path(f"{len(pictures)}.png"), template, seed, "t", scores))
                n = wanted.times
                pairs += [(k * n, k * n + j, means[2] + 0.001 * own.standard_normal()) for j in range(1, n)]
            setting: dict[str, Any] = {**dict(wanted.setting.dials), "setting": wanted.setting.name}
            self.points[wanted] = Point(wanted.setting.label, toys, setting, tuple(pictures), tuple(pairs))

    def seconds(self, wanted: Wanted) -> float:
        return 20.0


def evidence_of(experiment: Experiment, runner: Any, resamples: int) -> Evidence:
    world = runner.protocol
    return Evidence(runner, experiment.groups(world), experiment.times(world), Bootstrap(resamples))


def judged(experiment: Experiment, truth: Callable[[Setting], Sequence[float] | np.ndarray], seed: int = 0) -> Verdict:
    runner: Any = MadeUp(experiment, truth, seed)
    return experiment.judge(evidence_of(experiment, runner, 80)).verdict


def perfusion_front(setting: Setting) -> np.ndarray:
    """A trade by β, the same in all experiments, that ends in the base model."""
    if setting.label == BASE:
        return np.array([0.95, 0.2, 0.1])
    beta = dict(setting.dials).get("beta", 0.5)
    return np.array([0.4 + 0.5 * beta, 0.9 - 0.5 * beta, 0.1])


# For each experiment: whether a setting is on the side that the claim favours.
SIDES: dict[str, Callable[[Setting], bool]] = {
    "pareto": lambda s: s.label == "perfusion",
    "key_lock": lambda s: s.label == "perfusion",
    "mask": lambda s: s.label == "perfusion, 5 pictures",
    "train_bias": lambda s: s.label == "perfusion",
    "temperature": lambda s: "tau" not in dict(s.dials),
    "lock_types": lambda s: ("key_lock", "global") in s.dials,
    "multi_concept": lambda s: s.label == "perfusion",
    "one_shot": lambda s: s.label == "perfusion",
    "covariance": lambda s: s.label == "perfusion",
    "edited_layers": lambda s: s.label == "lora",
    "removal": lambda s: "gated" in s.label,
    "preservation": lambda s: "answers" in s.label,
    "word_norm": lambda s: "norm kept" in s.label,
    "vectors": lambda s: "vectors" in s.label,
}
KNOWN = {experiment.id: experiment for experiment in experiments()}
OPEN = (Verdict.UNDECIDED, Verdict.ALIKE)


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize(("better", "verdict"), [(0.15, Verdict.HOLDS), (-0.15, Verdict.FAILS)])
def test_each_claim_holds_or_fails_by_its_numbers(name: str, better: float, verdict: Verdict) -> None:
    def truth(setting: Setting) -> np.ndarray:
        return perfusion_front(setting) + (better if setting.label != BASE and SIDES[name](setting) else 0)

    assert judged(KNOWN[name], truth) is verdict


@pytest.mark.parametrize("name", [name for name in SIDES if name not in ("one_shot", "pareto", "multi_concept")])
def test_without_a_difference_a_claim_mostly_neither_holds_nor_fails(name: str) -> None:
    """One in twenty 95 % intervals misses the truth: three of sixteen do by chance in one test of 23."""
    verdicts = [judged(KNOWN[name], perfusion_front, seed) for seed in range(16)]
    assert sum(verdict in OPEN for verdict in verdicts) >= 14


@pytest.mark.parametrize("name", ["mask", "vectors"])
def test_variants_that_follow_prompts_alike_make_no_difference(name: str) -> None:
    verdicts = [judged(KNOWN[name], perfusion_front, seed) for seed in range(8)]
    assert verdicts.count(Verdict.ALIKE) >= 6


def test_more_pictures_are_drawn_where_the_world_has_too_few() -> None:
    assert [KNOWN["lock_types"].times(replace(Protocol(), seeds=tuple(range(n)))) for n in (1, 2, 4)] == [2, 1, 1]
    assert KNOWN["mask"].times(Protocol()) == 1


@pytest.mark.parametrize("name", ["temperature", "train_bias", "key_lock"])
def test_another_place_on_the_same_front_is_no_gain(name: str) -> None:
    """A gate that is further open at the same β gives other points of one front."""

    def truth(setting: Setting) -> np.ndarray:
        strength = 1.0 if setting.label == BASE else 0.8 * dict(setting.dials)["beta"]
        strength *= 1.0 if SIDES[name](setting) or setting.label == BASE else 0.8
        return np.array([0.35 + 0.6 * strength, 0.9 - 0.7 * strength, 0.1])

    assert sum(judged(KNOWN[name], truth, seed) in OPEN for seed in range(8)) >= 7


def test_one_setting_beyond_the_front_is_enough_for_a_method() -> None:
    """Its best trade-off lies far inside the front, and one setting has more identity than Perfusion reaches."""

    def truth(setting: Setting) -> np.ndarray:
        if setting.label == "dreambooth":
            return np.array([0.3, 1.1, 0.1]) if setting.share == 1 else np.array([0.55, 0.6, 0.1])
        return perfusion_front(setting) - (0 if setting.label in ("perfusion", BASE) else 0.15)

    runner: Any = MadeUp(KNOWN["pareto"], truth)
    evidence = Evidence(runner, KNOWN["pareto"].groups(runner.protocol), 1, Bootstrap(80))
    finding = KNOWN["pareto"].judge(evidence)
    verdicts = {check.what: check.verdict for check in finding.checks if "DreamBooth" in check.what}
    (all_of_them,) = (what for what in verdicts if what.startswith("identity") and "above all settings" in what)
    assert finding.verdict is verdicts[all_of_them] is Verdict.FAILS
    (best,) = (what for what in verdicts if "best trade-off" in what)
    assert verdicts[best] is Verdict.HOLDS
    assert "all settings of DreamBooth" in finding.key


def test_a_lead_needs_no_more_prompt_accuracy_than_there_is() -> None:
    """All methods have a setting that follows every prompt; Perfusion's has more identity."""

    def truth(setting: Setting) -> np.ndarray:
        if setting.label == BASE:
            return np.array([0.98, 0.2, 0.1])
        if setting.label == "perfusion":
            return np.array([0.98, 0.9 - 0.2 * (dict(setting.dials).get("beta", 0)), 0.1])
        return np.array([0.98 if setting.share != 1 else 0.8, 0.5, 0.1])

    assert judged(KNOWN["pareto"], truth) is judged(KNOWN["multi_concept"], truth) is Verdict.HOLDS


def test_intervals_over_few_toys_miss_the_truth_as_seldom_as_they_say() -> None:
    """Of numbers with a normal distribution over toys: 5 % of 400, give or take three standard deviations of that."""
    missed = {4: 0, 8: 0}
    for n in missed:
        for trial in range(400):
            rng = np.random.default_rng([n, trial])
            values = rng.normal(size=n)
            draws = values[rng.integers(n, size=(200, n))].mean(1)
            runner: Any = None
            line = Line(np.full((1, 2), values.mean()), np.broadcast_to(draws[:, None, None], (200, 1, 2)), True)
            groups: Any = [None] * n
            interval = Evidence(runner, groups, 1, Bootstrap(200)).number(lambda a: a[0, 0], line)
            assert interval.low is not None and interval.high is not None
            missed[n] += not interval.low <= 0 <= interval.high
    assert all(0.017 * 400 <= count <= 0.083 * 400 for count in missed.values()), missed


def test_a_short_front_on_another_decides_nothing() -> None:
    """A method that gives up identity and wins prompt accuracy has not moved its front."""

    def truth(setting: Setting) -> np.ndarray:
        if setting.label == BASE:
            return np.array([0.95, 0.05, 0.1])
        return np.array([0.9, 0.1, 0.1]) if setting.label == "perfusion" else np.array([0.2, 0.8, 0.1])

    assert judged(KNOWN["key_lock"], truth) in OPEN


@pytest.mark.parametrize(("own", "verdict"), [(0.6, Verdict.HOLDS), (0.5, Verdict.UNDECIDED), (0.4, Verdict.FAILS)])
def test_likeness_counts_where_the_text_is_followed(own: float, verdict: Verdict) -> None:
    """Others have more where they do not, and one setting with 0.5 where they do."""

    def truth(setting: Setting) -> np.ndarray:
        if setting.label == BASE:
            return np.array([1.0, 0.1, 0.1])
        if setting.label == "perfusion":
            return np.array([0.98, own, 0.1]) if dict(setting.dials)["beta"] == 0.85 else np.array([0.8, 0.7, 0.1])
        follows = setting.share == 1 and dict(setting.dials).get("scale", 0.7) == 0.7
        return np.array([0.98, 0.5, 0.1]) if follows else np.array([0.9, 0.9, 0.1])

    assert judged(KNOWN["likeness"], truth) is verdict


def test_a_slight_loss_is_what_one_shot_claims() -> None:
    assert judged(KNOWN["one_shot"], perfusion_front) is Verdict.HOLDS


def test_one_picture_of_each_prompt_says_nothing_of_diversity() -> None:
    experiment = KNOWN["lock_types"]
    runner: Any = MadeUp(experiment, perfusion_front)
    runner.points = {wanted: replace(point, pairs=()) for wanted, point in runner.points.items()}
    finding = experiment.judge(evidence_of(experiment, runner, 20))
    assert finding.verdict is Verdict.UNDECIDED and finding.key == "diversity not comparable with global locking"


def test_one_concept_with_one_seed_decides_nothing() -> None:
    experiment = KNOWN["mask"]
    runner: Any = MadeUp(experiment, lambda setting: (0.9 if SIDES["mask"](setting) else 0.1, 0.5, 0.1))
    runner.protocol = replace(runner.protocol, subjects=runner.protocol.subjects[:1])
    for wanted, point in runner.points.items():
        runner.points[wanted] = replace(point, pictures=tuple(p for p in point.pictures if p.seed == 0), pairs=())
    evidence = evidence_of(experiment, runner, 20)
    finding = experiment.judge(evidence)
    assert finding.verdict is Verdict.UNDECIDED and all(check.value.low is None for check in finding.checks)


def test_the_registry() -> None:
    found = experiments()
    assert [one.id for one in found] == [
        "pareto", "key_lock", "one_shot", "mask", "train_bias", "temperature", "size", "multi_concept", "lock_types",
        "covariance", "edited_layers", "removal", "kept_step", "preservation", "word_norm", "vectors", "likeness",
    ]  # fmt: skip
    assert [one.id for one in found if not one.of_paper] == [
        "covariance", "edited_layers", "removal", "kept_step", "preservation", "word_norm", "vectors", "likeness",
    ]  # fmt: skip
    assert len({one.place for one in found}) == len(found)
    assert all(one.claim and one.source and one.test for one in found)
