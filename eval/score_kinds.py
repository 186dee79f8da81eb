"""The kinds of scores that pictures get, by their names in score files, with what tables and figures say of them."""

from __future__ import annotations

from dataclasses import dataclass

from perfusion.config import ConfigError


@dataclass(frozen=True)
class ScoreKind:
    """One score. All are at least as good when they are higher, but for those that say otherwise."""

    name: str  # key in score files
    title: str  # in tables and on axes
    about: str  # one sentence
    higher: bool = True


ALL = (
    ScoreKind(
        "clip_i", "CLIP-I", "mean cosine of CLIP embeddings over all pairs of a generated and a reference picture"
    ),
    ScoreKind("clip_t", "CLIP-T", "mean cosine of a picture and its prompt, the superclass in the concept's place"),
    ScoreKind("clip_t_scaled", "CLIP-T scaled", "mean of 2.5 · max(cosine, 0), the convention of CustomConcept101"),
    ScoreKind("harmonic", "harmonic mean", "of CLIP-I and CLIP-T of a concept; 0 unless both are above 0"),
    ScoreKind("dino", "DINO", "as CLIP-I, with embeddings of a DINO model"),
    ScoreKind(
        "identity", "identity", "share of the toy's own looks (colours, pattern, eyes) that are read in a picture"
    ),
    ScoreKind("prompt", "prompt accuracy", "share of what the prompt asks for beside the concept that is read in it"),
    ScoreKind("superclass", "superclass", "share of pictures in which a thing of the concept's superclass is read"),
    ScoreKind("diversity", "diversity", "mean of 1 − cosine over pairs of pictures of one prompt and one training"),
    ScoreKind("drift", "drift", "mean of 1 − cosine to the base model's picture, prompts without the concept", False),
    ScoreKind("drift_mse", "drift (MSE)", "mean squared difference from the same pictures, on [0, 1]", False),
)
BY_NAME = {kind.name: kind for kind in ALL}


def score_kind(name: str, key: str) -> ScoreKind:
    """The score called `name`; `key` is the option that named it. ConfigError if there is none."""
    if name not in BY_NAME:
        raise ConfigError(f"{key}: found {name!r}, expected one of {', '.join(BY_NAME)}")
    return BY_NAME[name]


def ordered(names: set[str]) -> list[ScoreKind]:
    """The scores of these names, in the order of tables."""
    return [kind for kind in ALL if kind.name in names]
