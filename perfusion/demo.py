"""`python -m perfusion.demo`: learns a cat from one picture on Toyland and shows it in places where it never was."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from perfusion.cli import run_cli
from perfusion.config import TrainConfig

PROMPTS = (
    "a photo of <cat*> on the beach",
    "<cat*> wearing a hat",
    "<cat*> on a skateboard in the city",
    "a sketch of <cat*>",
    "<cat*> wearing sunglasses in the forest",
    "<cat*> in a boat at night",
    "a photo of <cat*> and a dog",
    "a mosaic of <cat*>",
)
IMAGES_PER_PROMPT = 2

USAGE = """
Learn a toy cat from one picture (+experiment=cat_oneshot), then draw it: on the beach, in a hat, as a sketch.

  python -m perfusion.demo [overrides of perfusion.train, e.g. concept.toyland.instance=4]

It takes one or two minutes on two CPU cores and needs no download: Toyland, the small model it uses, ships with
the code. Results lie in the run folder that is printed at the end.
"""


def main(argv: Sequence[str]) -> None:
    """Train `cat_oneshot` (unless that run is finished already), generate, and print where the pictures are."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE.strip())
        return
    from perfusion.training import composition

    composition.run(["+experiment=cat_oneshot", *argv], show)


def show(config: TrainConfig) -> None:
    """Train one config, draw its concept in the demo's prompts, and say where the pictures lie."""
    from perfusion.generate import GenerateConfig, generate
    from perfusion.train import train

    started = time.monotonic()
    folder = train(config)
    drawn = folder.path / "demo"
    prompts = [prompt.replace("<cat*>", config.concept.placeholder) for prompt in PROMPTS]
    generate(GenerateConfig(concept=str(folder.concept), prompt=prompts, num=IMAGES_PER_PROMPT, out=str(drawn)))
    print(
        f"\nDone in {time.monotonic() - started:.0f} s. Look at\n"
        f"  {folder.samples}  (the base model beside the concept)\n"
        f"  {drawn / 'grid.png'}  (the concept in {len(prompts)} prompts)"
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
