"""A CLIP byte-pair tokenizer whose merges make every word of Toyland one token; other text falls back to bytes."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and CLIP's byte-pair format."""
    return sorted(ByteLevel.alphabet())


def word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that build each word from the left, one character at a time; words that share a beginning share merges.

    The earliest merge is applied first, wherever it fits: were "at" merged before "bo", "boat" could not be built. So a
    word that falls apart in some order is moved to the front until none does.
    """
    order = sorted(words, key=lambda word: (-len(word), word))
    for _ in range(len(order) ** 2):
        merges: dict[tuple[str, str], None] = {}
        for word in order:
            built, *rest = _characters(word)
            for character in rest:
                merges.setdefault((built, character))
                built += character
        ranks = {pair: rank for rank, pair in enumerate(merges)}
        broken = next((word for word in order if len(_merged(_characters(word), ranks)) > 1), None)
        if broken is None:
            return list(merges)
        order.remove(broken)
        order.insert(0, broken)
    raise ValueError("no order of merges makes every word one token")


def _characters(word: str) -> list[str]:
    return [*word[:-1], word[-1] + END_OF_WORD]


def _merged(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: the merge of lowest rank first."""
    while len(pieces) > 1:
        at = min(range(len(pieces) - 1), key=lambda i: ranks.get((pieces[i], pieces[i + 1]), len(ranks)))
        if (pieces[at], pieces[at + 1]) not in ranks:
            break
        pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]
    return pieces


def build_tokenizer(words: Sequence[str], positions: int) -> CLIPTokenizer:
    """A stock `CLIPTokenizer` of `words` with `positions` as its length; padding is the end token, as in SD 1.5."""
    alphabet = byte_alphabet()
    merges = word_merges(words)
    tokens = [*alphabet, *(c + END_OF_WORD for c in alphabet), *dict.fromkeys("".join(m) for m in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=positions,
    )
    split = [word for word in words if len(tokenizer.tokenize(word)) != 1]
    assert not split, f"these words are not one token each: {split}"
    return tokenizer
