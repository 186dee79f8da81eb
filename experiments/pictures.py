"""`python -m experiments.pictures`: the pictures of the README, drawn with concepts that are trained for them."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError, TrainConfig

# Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from perfusion.backbones.base import Backbone
    from perfusion.concept import Concept

USAGE = """
Draw the README's pictures on Toyland. What is missing is trained first, half a minute for each concept.

  python -m experiments.pictures                    all, into docs/images
  python -m experiments.pictures only=locks out=.   one of them: strengths, locks, two or attention
"""

CAT = ["+experiment=cat_oneshot"]
TRAINED_KEYS = [*CAT, "method.key_lock=none"]
_TEDDY = {"name": "teddy", "superclass": "teddy", "placeholder": "<teddy*>", "toyland.instance": 7}
TEDDY = [*CAT, *(f"concept.{key}={value}" for key, value in _TEDDY.items())]
BETAS = (0.6, 0.8, 1.0, 1.2, 1.4)
SCENES = (
    "a photo of {}",
    "a photo of {} on the beach",
    "{} wearing a hat",
    "{} on a skateboard in the city",
    "a sketch of {}",
    "{} in a boat at night",
)
PAIRS = (
    "a photo of {} and {}",
    "a photo of {} and {} on the beach",
    "a photo of {} next to {} in the snow",
    "{} and {} in the forest",
    "{} and {} in the city",
    "a sketch of {} and {}",
)


@dataclass
class PicturesConfig:
    """The options of `python -m experiments.pictures`."""

    out: str = "docs/images"  # folder of the PNG files
    only: str | None = None  # strengths, locks, two or attention; null: all
    root: str = "runs"  # where the concepts are trained
    seed: int = 0  # of the first picture in each row


@dataclass(frozen=True)
class Studio:
    """Draws the README's pictures, with concepts that it trains if they are not there."""

    backbone: Backbone
    root: str
    seed: int

    def concept(self, words: Sequence[str]) -> Concept:
        """The concept that `python -m perfusion.train` with these words trains; trained now if it is not there."""
        from perfusion.concept import Concept
        from perfusion.train import train
        from perfusion.training import composition

        configs: list[TrainConfig] = []
        composition.run([*words, f"run.root={self.root}"], configs.append)
        return Concept.load(train(configs[0]).concept)

    def draw(self, templates: Sequence[str], *names: str) -> list[Any]:
        """A picture of each template, filled with the names; the k-th has the same noise in every row."""
        from perfusion.drawing import sample

        prompts = [template.format(*names) for template in templates]
        seeds, config = range(self.seed, self.seed + len(prompts)), self.backbone.config
        size = config.resolution
        return sample(self.backbone.pipe, prompts, seeds, config.steps, config.guidance, progress=True, size=size)


def strengths(studio: Studio) -> list[tuple[str, list[Any]]]:
    """One concept at several β, below what the base model draws."""
    cat = studio.concept(CAT)
    rows = [("the base model: cat", studio.draw(SCENES, cat.superclass))]
    for beta in BETAS:
        with cat.attach(studio.backbone, beta=beta):
            rows.append((f"{cat.placeholder}, β = {beta}", studio.draw(SCENES, cat.placeholder)))
    return rows


def locks(studio: Studio) -> list[tuple[str, list[Any]]]:
    """The three kinds of key-locking, with the same noise."""
    cat, unlocked = studio.concept(CAT), studio.concept(TRAINED_KEYS)
    rows = []
    for name, concept, lock in (
        ("local: the superclass's keys at the word", cat, "local"),
        ("global: the keys of the whole prompt from its superclass", cat, "global"),
        ("none: keys trained as well", unlocked, "none"),
    ):
        with concept.attach(studio.backbone, key_lock=lock):
            rows.append((name, studio.draw(SCENES, concept.placeholder)))
    return rows


def two(studio: Studio) -> list[tuple[str, list[Any]]]:
    """Two concepts that were trained apart, in one picture."""
    cat, teddy = studio.concept(CAT), studio.concept(TEDDY)
    rows = [("the base model: cat and teddy", studio.draw(PAIRS, cat.superclass, teddy.superclass))]
    with cat.attach(studio.backbone), teddy.attach(studio.backbone):
        rows.append((f"{cat.placeholder} alone", studio.draw(SCENES, cat.placeholder)))
        rows.append((f"{teddy.placeholder} alone", studio.draw(SCENES, teddy.placeholder)))
        both = studio.draw(PAIRS, cat.placeholder, teddy.placeholder)
        rows.append((f"{cat.placeholder} and {teddy.placeholder}", both))
    return rows


def attention(studio: Studio) -> list[tuple[str, list[Any]]]:
    """Where the cross-attention looks for the concept's word, with locked and with trained keys, and for "cat"."""
    cat, unlocked = studio.concept(CAT), studio.concept(TRAINED_KEYS)
    rows = []
    for name, word, concept in (
        ("the base model: cat", cat.superclass, None),
        (f"{cat.placeholder}, keys locked", cat.placeholder, cat),
        (f"{unlocked.placeholder}, keys trained as well", unlocked.placeholder, unlocked),
    ):
        with concept.attach(studio.backbone) if concept else nullcontext():
            drawn = [looked_at(studio, template.format(word), word, k) for k, template in enumerate(SCENES)]
        rows.append((name, [picture for picture, _ in drawn]))
        rows.append((f"{name}: attention to this word", [where for _, where in drawn]))
    return rows


def looked_at(studio: Studio, prompt: str, word: str, number: int) -> tuple[Any, Any]:
    """The `number`-th picture of a row, and how much attention its places paid to `word`: the mean over all
    cross-attention layers, heads and steps, the most of a picture in yellow."""
    import torch
    from matplotlib import colormaps
    from PIL import Image

    from perfusion.editing.tokens import last_tokens, token_ids

    pipe: Any = studio.backbone.pipe
    ids = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    (position,) = last_tokens(ids, token_ids(pipe.tokenizer, word))[0].nonzero()[0].tolist()
    with watched(pipe.unet, position) as maps:
        (picture,) = Studio(studio.backbone, studio.root, studio.seed + number).draw([prompt])
    each = [torch.nn.functional.interpolate(one[None, None], picture.size[::-1], mode="bilinear") for one in maps]
    mean = torch.cat(each).mean(0)[0]
    colours = colormaps["inferno"]((mean / mean.max()).numpy())[..., :3]
    return picture, Image.fromarray((255 * colours).astype("uint8"))


@contextmanager
def watched(unet: Any, position: int) -> Iterator[list[Any]]:
    """Grows by the attention (h, w) that each cross-attention layer pays at each step to one position of the prompt, in
    the second half of a batch, the one with the prompt; mean over heads."""
    from diffusers.models.attention_processor import AttnProcessor

    maps: list[Any] = []
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    before = [layer.processor for layer in layers]

    def watch(scores: Any, *args: Any) -> Any:
        found = scores(*args)  # (B · heads, h · w, N)
        side = math.isqrt(found.shape[1])
        maps.append(found[len(found) // 2 :, :, position].mean(0).view(side, side).detach().float().cpu())
        return found

    try:
        for layer in layers:
            layer.set_processor(AttnProcessor())  # which computes them
            layer.get_attention_scores = functools.partial(watch, layer.get_attention_scores)
        yield maps
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)
            del layer.get_attention_scores


PICTURES = {"strengths": strengths, "locks": locks, "two": two, "attention": attention}


def main(argv: Sequence[str]) -> None:
    """Command line entry point."""
    config = parse_key_values(argv, PicturesConfig, USAGE)
    if config.only is not None and config.only not in PICTURES:
        raise ConfigError(f"only: found {config.only!r}, expected one of {', '.join(PICTURES)}")
    from perfusion.backbones import backbone_class, backbone_config
    from perfusion.contact_sheet import captioned_sheet
    from perfusion.files import atomic_path

    chosen = backbone_config("toyland")
    studio = Studio(backbone_class(chosen.name).load(chosen), config.root, config.seed)
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        if config.only in (None, name):
            sheet = captioned_sheet(picture(studio))
            with atomic_path(out / f"{name}.png") as temporary:
                sheet.save(temporary, "PNG", optimize=True)
            print(f"written to {out / f'{name}.png'}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
