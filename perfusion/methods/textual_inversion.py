"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): the concept is a word, of which the embedding is trained.

The word starts at its superclass and is trained in the sentences of `backbone.prompts`, those of the paper. The
defaults are what diffusers' script is run with on Stable Diffusion: 3,000 steps of 4 pictures at 5e-4 times 4, and
AdamW's usual weight decay (the paper: 5,000 steps of 8 at 5e-3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from perfusion.backbones.base import Backbone
from perfusion.editing import EditError
from perfusion.editing.words import AddedWord
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
    masked_loss: bool = False  # weigh the error by the masks, where there are some; the paper has none


class TextualInversion(Method):
    """See the module."""

    Options = TextualInversionOptions
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
        self._token: AddedWord | None = None  # None: not attached
        self.embeddings = nn.ParameterDict()  # text encoder -> (vectors, d_e)

    def attach(self, backbone: Backbone) -> None:
        """See the seam.

        Raises:
            EditError: this method is attached already.
            TokenError: the word cannot be added to the vocabulary.
        """
        if self._token is not None:
            raise EditError(f"{self.word.placeholder}: found it attached already, expected detach() before attach()")
        self._token = backbone.add_token(self.word.placeholder, self.word.superclass, self.options.vectors)
        self.embeddings.update(self._token.embeddings())

    def detach(self) -> None:
        if self._token is not None:
            self._token.remove()
        self._token, self.embeddings = None, nn.ParameterDict()

    def parameter_groups(self) -> list[dict[str, Any]]:
        vectors = [*self.embeddings.values()]
        rates = {"lr": self.options.embedding_rate, "weight_decay": self.options.weight_decay}
        return [{"name": "embedding", "params": vectors, **rates}]

    def state(self) -> dict[str, Tensor]:
        """`embedding.<encoder>` (vectors, d_e)."""
        return {
            f"embedding.{encoder}": vectors.detach().to("cpu", torch.float32, copy=True)
            for encoder, vectors in self.embeddings.items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for encoder, vectors in self.embeddings.items():
            vectors.copy_(state[f"embedding.{encoder}"])

    def state_shapes(self, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, encoder in backbone.text_encoders().items():
            table: Any = encoder.get_input_embeddings()  # type: ignore[operator]
            shapes[f"embedding.{name}"] = (self.options.vectors, table.embedding_dim)
        return shapes

    def export(self, folder: Path) -> list[Path]:
        """`learned_embeds.safetensors`, and `learned_embeds_2.safetensors` of a second text encoder.

        Names and content, {placeholder: (vectors, d_e)}, are those of diffusers' scripts. The stock pipeline takes them
        with `load_textual_inversion(folder, use_safetensors=True)`, and of SDXL with one call for each encoder:
        `load_textual_inversion(folder, weight_name=..., text_encoder=..., tokenizer=..., use_safetensors=True)`.
        SDXL's pooled text is the superclass's here and the word's own there, see `perfusion.backbones.sdxl`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files: list[Path] = []
        for k, vectors in enumerate(self.state().values()):
            files.append(folder / ("learned_embeds.safetensors" if k == 0 else f"learned_embeds_{k + 1}.safetensors"))
            with atomic_path(files[-1]) as temporary:
                save_file({self.word.placeholder: vectors}, temporary, {"format": "pt"})
        return files


METHOD = TextualInversion
