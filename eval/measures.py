"""What can be measured of pictures, by its name in score files, with what tables and figures say of it."""

from __future__ import annotations

from dataclasses import dataclass

from perfusion.config import ConfigError


@dataclass(frozen=True)
class Measure:
    """One score. All are at least as good when they are higher, but for those that say otherwise."""

    name: str  # key in score files
    title: str  # in tables and on axes
    about: str  # one sentence
    higher: bool = True


ALL = (
    Measure("clip_i", "CLIP-I", "mean cosine of CLIP embeddings over all pairs of a generated and a reference picture"),
    Measure("clip_t", "CLIP-T", "mean cosine of a picture and its prompt, the superclass in the concept's place"),
    Measure("clip_t_scaled", "CLIP-T scaled", "mean of 2.5 · max(cosine, 0), the convention of CustomConcept101"),
    Measure("harmonic", "harmonic mean", "of CLIP-I and CLIP-T of a concept; 0 unless both are above 0"),
    Measure("dino", "DINO", "as CLIP-I, with embeddings of a DINO model"),
    Measure("identity", "identity", "share of the toy's own looks (colours, pattern, eyes) that are read in a picture"),
    Measure("prompt", "prompt accuracy", "share of what the prompt asks for beside the concept that is read in it"),
    Measure("superclass", "superclass", "share of pictures in which a thing of the concept's superclass is read"),
    Measure("diversity", "diversity", "mean of 1 − cosine over pairs of pictures of one prompt and one training"),
    Measure("drift", "drift", "mean of 1 − cosine to the base model's picture, prompts without the concept", False),
    Measure("drift_mse", "drift (MSE)", "mean squared difference from the same pictures, on [0, 1]", False),
)
BY_NAME = {measure.name: measure for measure in ALL}


def measure(name: str, key: str) -> Measure:
    """The measure called `name`; `key` is the option that named it. ConfigError if there is none."""
    if name not in BY_NAME:
        raise ConfigError(f"{key}: found {name!r}, expected one of {', '.join(BY_NAME)}")
    return BY_NAME[name]


def ordered(names: set[str]) -> list[Measure]:
    """The measures of these names, in the order of tables."""
    return [measure for measure in ALL if measure.name in names]
