"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): the concept is a word, of which the embedding is trained.

The word starts at its superclass and is trained in the sentences of `backbone.prompts`, those of the paper. The
defaults are what diffusers' script is run with on Stable Diffusion: 3,000 steps of 4 pictures at 5e-4 times 4, and
AdamW's usual weight decay (the paper: 5,000 steps of 8 at 5e-3).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from perfusion.backbones.base import Backbone
from perfusion.config import ConfigError
from perfusion.files import atomic_path
from perfusion.methods.base import Method, MethodOptions, Word, check_bounds


@dataclass
class TextualInversionOptions(MethodOptions):
    """What is commonly run on Stable Diffusion."""

    name: str = "textual_inversion"
    steps: int = 3000
    batch_size: int = 4
    embedding_rate: float = 2e-3
    weight_decay: float = 1e-2  # AdamW's
    vectors: int = 1  # of the concept's word
    direction_only: bool = False  # these keep the norm of their superclass's
    masked_loss: bool = False  # weigh the error by the masks, where there are some; the paper has none


class TextualInversion(Method):
    """A new word's embedding alone, trained while the model stays as it is."""

    Options = TextualInversionOptions
    newer = (*Method.newer, "direction_only")
    options: TextualInversionOptions

    def __init__(self, options: TextualInversionOptions, word: Word) -> None:
        super().__init__(options, word)
        check_bounds(
            options,
            {
                "embedding_rate": (options.embedding_rate > 0, "more than 0"),
                "weight_decay": (options.weight_decay >= 0, "at least 0"),
                "vectors": (options.vectors >= 1, "at least 1"),
            },
        )
        if options.vectors > 1 and word.placeholder != word.placeholder.lower():
            # Stock pipelines look for each vector's token in the prompt as it is spelled, of which CLIP reads small
            # letters: all but the first vector would be lost in them.
            raise ConfigError(
                f"concept.placeholder: found {word.placeholder!r} and method.vectors={options.vectors}, expected a "
                f"word of small letters, such as {word.placeholder.lower()!r}"
            )

    def put(self, backbone: Backbone, undo: ExitStack) -> None:
        """Add the word; raises as `add_word`."""
        self.add_word(undo, self.options.vectors)

    def parameter_groups(self) -> list[dict[str, Any]]:
        vectors = [*self.embeddings.values()]
        rates = {"lr": self.options.embedding_rate, "weight_decay": self.options.weight_decay}
        return [{"name": "embedding", "params": vectors, **rates}]

    def tensors(self) -> dict[str, Tensor]:
        """`embedding.<encoder>` (vectors, d_e)."""
        return self.word_tensors()

    def state_shapes(self, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        return self.word_shapes(backbone, self.options.vectors)

    def export(self, folder: Path) -> list[Path]:
        """`learned_embeds.safetensors`, and `learned_embeds_2.safetensors` of a second text encoder.

        Names and content, {placeholder: (vectors, d_e)}, are those of diffusers' scripts. The stock pipeline takes them
        with `load_textual_inversion(folder, use_safetensors=True)`, and of SDXL with one call for each encoder:
        `load_textual_inversion(folder, weight_name=..., text_encoder=..., tokenizer=..., use_safetensors=True)`.
        SDXL's pooled text is the superclass's here and the word's own there, see `perfusion.backbones.sdxl`.
        A pipeline that has no such function gets no files.
        """
        if not hasattr(self.backbone.pipe, "load_textual_inversion"):
            return []
        folder.mkdir(parents=True, exist_ok=True)
        files: list[Path] = []
        for k, vectors in enumerate(self.state().values()):
            files.append(folder / ("learned_embeds.safetensors" if k == 0 else f"learned_embeds_{k + 1}.safetensors"))
            with atomic_path(files[-1]) as temporary:
                save_file({self.word.placeholder: vectors}, temporary, {"format": "pt"})
        return files


METHOD = TextualInversion
