"""Added words that a tokenizer reads, and of which the text encoder would get nothing.

Stock pipelines cut long prompts off, and only log it: a concept that stands too far back would silently not be drawn.
And a tokenizer that another pipeline took while a word was there still knows the word when it is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerBase

from perfusion.editing import TokenError


@dataclass(eq=False)
class Standing:
    """Of an added word, for all tokenizers that know it; their copies share it."""

    word: str
    removed: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Standing:
        return self


class WholeWords:
    """Stands in the place of a tokenizer's `_convert_encoding`, which is given every text that was read.

    Of that tokenizer alone, not of its class: so the tokenizer stays one of the same type, and can be copied and
    saved.

    Args:
        words: id -> the added word that it is a part of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: Mapping[int, Standing]) -> None:
        self.tokenizer, self.words = tokenizer, dict(words)

    def __call__(self, encoding: tokenizers.Encoding, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's own.

        Raises:
            TokenError: the text is cut off, and an added word is lost or only a part of it is left. Whoever asks for
                the tokens that were cut off (`return_overflowing_tokens`) loses nothing. Or there is a word in it that
                was removed.
        """
        found = (self.words[token] for token in encoding.ids if token in self.words)
        if gone := next((standing.word for standing in found if standing.removed), None):
            raise TokenError(
                f"found {gone!r}, which was detached through another pipeline that shares this text encoder, expected "
                "prompts without it; make this pipeline anew from the other's components"
            )
        if encoding.overflowing and not kwargs.get("return_overflowing_tokens"):
            lost = chain.from_iterable(part.ids for part in encoding.overflowing)
            if word := next((self.words[token].word for token in lost if token in self.words), None):
                limit = len(encoding.ids)
                length = limit + sum(part.special_tokens_mask.count(0) for part in encoding.overflowing)
                raise TokenError(
                    f"{word!r} would be cut off: found {length} tokens with beginning and end, expected {limit} at "
                    "most, which is what is read of a prompt; shorten it, or put the word further to the front"
                )
        own: Any = type(self.tokenizer)
        return own._convert_encoding(self.tokenizer, encoding, *args, **kwargs)


def refuse_lost_words(tokenizer: PreTrainedTokenizerBase, words: Mapping[int, Standing]) -> None:
    """Make `tokenizer` raise TokenError where one of `words`, by its ids, would be cut off or is gone; `WholeWords`."""
    tokenizer._convert_encoding = WholeWords(tokenizer, words)  # type: ignore[attr-defined]
