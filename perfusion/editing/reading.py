"""How text encoders read: what of their outputs is used, and how a prompt reads with other words in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def clip_states(output: Any) -> list[Tensor]:
    """The outputs of a text encoder of CLIP's kind that a pipeline may take as the encoding: (B, N, d) each."""
    hidden = getattr(output, "hidden_states", None)
    if hidden:
        return [output.last_hidden_state, hidden[-2]]
    return [output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]]


def with_text_embeds(output: Any, other: Any) -> Any:
    """The output of a CLIP text encoder with a projection, whose first part is the pooled text, with another's."""
    if isinstance(output, tuple):
        return other[0], *output[1:]
    output["text_embeds"] = other[0]
    return output


@dataclass(frozen=True)
class Reading:
    """How the text encoders of a pipeline read, and what of their outputs is used.

    Attributes:
        masked: they leave out what pads a prompt; else it is read like words.
        padding_side: where that is, if the pipeline says so; None: where the tokenizer puts it.
        states: the parts of an output that may become a pipeline's encoding, (B, N, d) each.
        pooling: the text encoder of which a pipeline also takes one vector for the whole prompt.
        pooled: an output with that vector from another output.
    """

    masked: bool = False
    padding_side: str | None = None
    states: Callable[[Any], list[Tensor]] = clip_states
    pooling: str | None = None
    pooled: Callable[[Any, Any], Any] = with_text_embeds


def replace_words(
    ids: Sequence[int], words: Sequence[tuple[Sequence[int], Sequence[int]]], end: int, pad: int
) -> tuple[list[int], list[int]]:
    """`ids` of one tokenizer with superclasses in the place of words, at the same length N, as that tokenizer would
    have read it; and for each old position the new one that stands for it.

    The last token of a word stands for the last one of its superclass, as the one at which a causal encoder has read
    all of it; the ones before it are aligned from there. Where the new text is longer than what is read, words at the
    end are cut off, and the last position is the end of text.

    Args:
        words: ids of each word, and of its superclass.
        end: id of the end of text.
        pad: id of what stands behind the end; some tokenizers (SD 2.x) have another one for it.
    """
    new: list[int] = []
    where: list[int] = []
    found = False
    length = len(ids)
    text = ids[: ids.index(end)] if end in ids else ids
    while len(where) < len(text):
        at = len(where)
        for word, superclass in words:
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


def replace_words_behind_padding(
    ids: Sequence[int], words: Sequence[tuple[Sequence[int], Sequence[int]]], end: int, pad: int
) -> tuple[list[int], list[int]]:
    """`replace_words` where what pads comes first, and the text ends with the last position."""
    length, before = len(ids), len([*takewhile(lambda i: i == pad, ids)])
    new, where = replace_words([*ids[before:], *ids[:before]], words, end, pad)
    after = length - where[length - before] if before else length - 1 - where[-1]
    new = [*new[length - after :], *new[: length - after]]
    return new, [(where[(k - before) % length] + after) % length for k in range(length)]


def with_masks(
    rows: list[list[int]], kwargs: dict[str, Any], tokenizer: PreTrainedTokenizerBase, reading: Reading
) -> dict[str, Any]:
    """The keywords of a text encoder's call with the mask for other ids: without the run of what pads them. (What pads
    may be a word as well.) Where nothing is masked it is all ones, or not looked at."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return kwargs
    left, pad = (reading.padding_side or tokenizer.padding_side) == "left", tokenizer.pad_token_id
    lengths = [len(row) for row in rows]
    if reading.masked:
        lengths = [len([*dropwhile(lambda i: i == pad, row if left else row[::-1])]) for row in rows]
    made = torch.zeros_like(mask)
    for row, length in zip(made, lengths, strict=True):
        row[len(row) - length if left else 0 : None if left else length] = 1
    others = {"position_ids": (made.cumsum(1) - 1).clamp_min(0)} if "position_ids" in kwargs else {}
    return {**kwargs, "attention_mask": made, **others}


def ids_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a call of a text encoder shall read, if it is said by ids."""
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0] if args else None
    return ids if isinstance(ids, Tensor) else None


def with_ids(ids: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with other ids."""
    return (args, {**kwargs, "input_ids": ids}) if "input_ids" in kwargs else ((ids, *args[1:]), kwargs)


def looked_up(known: Iterable[tuple[Tensor, Tensor]], part: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` (B, N, ...), each row replaced by what is known of an encoding that equals its row of `part` (B, N, d);
    and (B,) bool: which were. Of an encoding of more positions, the first and the last N - 1 count: Sana leaves out its
    instruction so."""
    found = torch.zeros(len(part), dtype=torch.bool, device=part.device)
    result, length = values.clone(), part.shape[1]
    for own, other in reversed([*known]):
        if own.shape[1] < length or own.shape[2] != part.shape[2]:
            continue
        if own.shape[1] > length:
            own, other = (torch.cat([x[:, :1], x[:, 1 - length :]], 1) for x in (own, other))
        equal = (part[:, None] == own.to(part)[None]).flatten(2).all(-1)  # (B, rows of that call)
        rows = equal.any(1) & ~found
        chosen = other.to(values)[equal.int().argmax(1)]
        result = torch.where(rows.view(-1, *[1] * (values.dim() - 1)), chosen, result)
        found |= rows
    return result, found
