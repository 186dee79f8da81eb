"""Toyland's finished models, loaded as anyone would load them, and pictures of its pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from perfusion.bars import Bar
from perfusion.scoring.clip import LOCAL_DIR, ClipScorer
from perfusion.toyland.build.train_words import token_ids
from perfusion.toyland.captions import Caption
from perfusion.toyland.reader import Reader

STEPS, GUIDANCE = 25, 4.0  # of DDIM
BATCH = 16


class Scorer(ClipScorer):
    """The open_clip model that the builder trained."""

    def encode(self, captions: Sequence[Caption]) -> Tensor:
        """The text tower's last states (n, N, d), of which `text_embeddings` pools one for each caption."""
        states: list[Tensor] = []
        hook = self._model.ln_final.register_forward_hook(lambda module, given, out: states.append(out))
        try:
            self.text_embeddings([c.text for c in captions])
        finally:
            hook.remove()
        return torch.cat(states)


class Toyland:
    """The finished models of a folder that the builder wrote.

    Args:
        processes: that `draw` shares the work out to, each with one thread: many threads on models this small are
            slower, and stall when a neighbour takes a core. With one, everything happens in this process.
        steps: of DDIM for each picture.
    """

    def __init__(self, weights: Path, processes: int = 1, steps: int = STEPS) -> None:
        self.folder = weights / "pipeline"
        self.steps = steps
        self.pipe = load_pipeline(self.folder)
        self.reader = Reader.load(weights / "reader")
        self.scorer = Scorer(f"{LOCAL_DIR}{weights / 'scorer'}")
        self._workers = None
        if processes > 1:
            self._workers = ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,))

    def encode(self, captions: Sequence[Caption]) -> Tensor:
        """What the UNet is told by each caption: (n, 24, d). Word i of a caption is token i + 1."""
        return encode(self.pipe, captions)

    def draw(self, prompts: Sequence[str] | Tensor, seed: int, what: str = "") -> list[Image.Image]:
        """`generate`, in as many processes as there are: the same pictures, in the same order."""
        if self._workers is None:
            return generate(self.pipe, prompts, seed, what, self.steps)
        return generate(self.folder, prompts, seed, what, self.steps, self._workers.map)


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The pipeline in a folder, silent."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def encode(pipe: Any, captions: Sequence[Caption]) -> Tensor:
    """Encodings (n, 24, d) of n captions."""
    return pipe.text_encoder(token_ids(pipe.tokenizer, captions)).last_hidden_state


def generate(
    pipe: Any, prompts: Sequence[str] | Tensor, seed: int, what: str = "", steps: int = STEPS, run: Any = map
) -> list[Image.Image]:
    """One picture per prompt, or per encoded prompt of a tensor (n, N, d); the same `seed`, the same pictures.

    Args:
        pipe: a pipeline, or the folder of one.
        what: the progress bar's name; none without.
        run: draws the batches, in this process or elsewhere.
    """
    parts = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    seeds = range(seed * 1_000_000, seed * 1_000_000 + len(parts))
    drawn = run(_draw, repeat(pipe), parts, seeds, repeat(steps))
    return list(chain.from_iterable(Bar(drawn, total=len(parts), desc=what, disable=not what)))


def _draw(pipe: Any, prompts: Sequence[str] | Tensor, seed: int, steps: int) -> list[Image.Image]:
    pipe = _loaded_once(pipe) if isinstance(pipe, Path) else pipe
    given = {"prompt_embeds": prompts} if isinstance(prompts, Tensor) else {"prompt": list(prompts)}
    generator = torch.Generator().manual_seed(seed)
    return pipe(num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator, **given).images


_loaded_once = cache(load_pipeline)  # of a process that draws batch after batch
