"""A concept that is left out of a picture (β = inf) while it is attached: prompts read its superclass in its place.

`PromptGate` takes its edit away; this takes its word away. Together they give the base model's picture exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from perfusion.editing.superclass_prompts import Replacements, replace_words


class LeftOut:
    """Has the text encoders read prompts with the superclass in the concept's place, in the rows where it is left out.

    Encodings that were made before (`prompt_embeds`) stay what they are.

    Args:
        encoders: name -> text encoder.
        words: what the concept's superclass is in its word's place, for each text encoder.
        kept: which of a number of rows have the concept: (rows,) bool. Asked only where a prompt names it.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], words: Replacements, kept: Callable[[int], Tensor]) -> None:
        self._words, self._kept = words, kept
        self._hooks = [
            encoder.register_forward_pre_hook(self._replace(name), with_kwargs=True)
            for name, encoder in encoders.items()
        ]

    def close(self) -> None:
        """Let prompts be read as they are; idempotent."""
        for hook in self._hooks:
            hook.remove()

    def _replace(self, name: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
        def replace(
            encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0] if args else None
            if not isinstance(ids, Tensor):
                return None
            own = ids.tolist()
            plain = [replace_words(row, [self._words()[name]])[0] for row in own]
            if plain == own:
                return None
            kept = self._kept(len(own)).tolist()
            read = ids.new_tensor([row if stays else other for row, other, stays in zip(own, plain, kept, strict=True)])
            return ((), {**kwargs, "input_ids": read}) if "input_ids" in kwargs else ((read, *args[1:]), kwargs)

        return replace
