"""Added words that a tokenizer would cut off at its limit.

Stock pipelines cut long prompts off, and only log it: a concept that stands too far back would silently not be drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerBase

from perfusion.backbones.base import TokenError


class WholeWords:
    """Stands in the place of a tokenizer's `_convert_encoding`, which is given every text that was read.

    Of that tokenizer alone, not of its class: so the tokenizer stays one of the same type, and can be copied and
    saved.

    Args:
        words: id -> the added word that it is a part of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: Mapping[int, str]) -> None:
        self.tokenizer, self.words = tokenizer, dict(words)

    def __call__(self, encoding: tokenizers.Encoding, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's own.

        Raises:
            TokenError: the text is cut off, and an added word is lost or only a part of it is left. Whoever asks for
                the tokens that were cut off (`return_overflowing_tokens`) loses nothing.
        """
        if encoding.overflowing and not kwargs.get("return_overflowing_tokens"):
            lost = chain.from_iterable(part.ids for part in encoding.overflowing)
            if word := next((self.words[token] for token in lost if token in self.words), None):
                limit = len(encoding.ids)
                length = limit + sum(part.special_tokens_mask.count(0) for part in encoding.overflowing)
                raise TokenError(
                    f"{word!r} would be cut off: found {length} tokens with beginning and end, expected {limit} at "
                    "most, which is what is read of a prompt; shorten it, or put the word further to the front"
                )
        own: Any = type(self.tokenizer)
        return own._convert_encoding(self.tokenizer, encoding, *args, **kwargs)


def refuse_cut_words(tokenizer: PreTrainedTokenizerBase, words: Mapping[int, str]) -> None:
    """Make `tokenizer` raise TokenError where it would cut off a word of `words` (id -> word); see `WholeWords`."""
    tokenizer._convert_encoding = WholeWords(tokenizer, words)  # type: ignore[attr-defined]
