"""Global key-locking: the keys of a prompt come from the same prompt with the superclass in the concept's place.

The denoiser sees encodings, not words. So while a concept is attached with global locking, the text encoder's calls are
watched: a prompt that names a concept is encoded once more with the superclass's tokens, and the two encodings are kept
side by side until the denoiser asks for one by the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

KEPT = 8  # outputs of a text encoder that are remembered: of prompts, of negative prompts, and some more


class Replacement(NamedTuple):
    """How one text encoder's prompts read with the superclass in a concept's place: ids of its tokenizer."""

    word: Sequence[int]
    superclass: Sequence[int]
    end: int  # of text
    pad: int  # what stands behind the end; some tokenizers (SD 2.x) have another id for it than for the end


# Of each text encoder.
Replacements = Callable[[], Mapping[str, Replacement]]


def replace_words(ids: Sequence[int], replacements: Sequence[Replacement]) -> tuple[list[int], list[int]]:
    """`ids` of one tokenizer with superclasses in the place of the words, at the same length N, as that tokenizer would
    have read it; and for each old position the new one that stands for it.

    The last token of a word stands for the last one of the other, as the one at which a causal encoder has read all of
    it; the ones before it are aligned from there. Where the new text is longer than what is read, words at the end are
    cut off, and the last position is the end of text.
    """
    if not replacements:
        return list(ids), list(range(len(ids)))
    new: list[int] = []
    where: list[int] = []
    found = False
    end, pad, length = replacements[0].end, replacements[0].pad, len(ids)
    text = ids[: ids.index(end)] if end in ids else ids
    while len(where) < len(text):
        at = len(where)
        for word, superclass, *_ in replacements:
            if list(text[at : at + len(word)]) == list(word):
                shift = len(superclass) - len(word)
                where += [max(len(new), len(new) + shift + k) for k in range(len(word))]
                new += superclass
                found = True
                break
        else:
            where.append(len(new))
            new.append(text[at])
    if not found:
        return list(ids), list(range(length))
    where += [len(new) + k for k in range(length - len(text))]
    new = [*new[: length - 1], end] if len(text) < length else new[:length]
    return new + [pad] * (length - len(new)), [min(position, length - 1) for position in where]


class SuperclassPrompts:
    """Pairs of encodings of prompts, with the concepts' words and with their superclasses.

    Args:
        encoders: name -> text encoder, in the order in which the denoiser's context puts their outputs side by side.
    """

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        self.words: list[Replacements] = []
        self._encoders = dict(encoders)
        self._known: dict[str, deque[tuple[Tensor, Tensor]]] = {name: deque(maxlen=KEPT) for name in encoders}
        self._inside = False
        self._hooks = [
            encoder.register_forward_hook(self._watch(name), with_kwargs=True) for name, encoder in encoders.items()
        ]

    def close(self) -> None:
        """Watch no longer, and forget; idempotent."""
        for hook in self._hooks:
            hook.remove()
        for pairs in self._known.values():
            pairs.clear()

    def forget(self) -> None:
        """Let go of all encodings, which are of other words than now."""
        for pairs in self._known.values():
            pairs.clear()

    def of(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The encodings with superclasses for `context` (B, N, d), in its dtype; and (B,) bool: which rows are known.

        Rows that the text encoder did not make lately are not known, and are given back as they are.
        """
        widths = [_width(encoder) for encoder in self._encoders.values()]
        parts, known = [], torch.ones(len(context), dtype=torch.bool, device=context.device)
        for name, part in zip(self._encoders, context.split(widths, -1), strict=True):
            found = torch.zeros_like(known)
            result = part.clone()
            for own, other in reversed(self._known[name]):
                if own.shape[1:] != part.shape[1:]:
                    continue
                equal = (part[:, None] == own.to(part)[None]).flatten(2).all(-1)  # (B, rows of that call)
                rows = equal.any(1) & ~found
                result = torch.where(rows[:, None, None], other.to(part)[equal.int().argmax(1)], result)
                found |= rows
            parts.append(result)
            known &= found
        return torch.cat(parts, -1), known

    def _watch(self, name: str) -> Callable[..., None]:
        def watch(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0] if args else None
            if self._inside or not isinstance(ids, Tensor):
                return
            replacements = [word()[name] for word in self.words]
            made = [replace_words(row, replacements) for row in ids.tolist()]
            if all(new == row for (new, _), row in zip(made, ids.tolist(), strict=True)):
                self._known[name] += [(own, own) for own in _states(output)]
                return
            new_ids, where = (ids.new_tensor(part) for part in zip(*made, strict=True))
            kwargs = {**kwargs, "input_ids": new_ids}
            if kwargs.get("attention_mask") is not None:
                kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
            self._inside = True
            try:
                other = encoder(**kwargs)
            finally:
                self._inside = False
            for own, changed in zip(_states(output), _states(other), strict=True):
                aligned = changed.gather(1, where[..., None].expand_as(changed))
                self._known[name].append((own, aligned))

        return watch


def _states(output: Any) -> list[Tensor]:
    """The outputs of a CLIP text encoder that a pipeline may take as the encoding: (B, N, d) each."""
    hidden = getattr(output, "hidden_states", None)
    if hidden:
        return [output.last_hidden_state, hidden[-2]]
    return [output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]]


def _width(encoder: Any) -> int:
    return encoder.config.hidden_size
