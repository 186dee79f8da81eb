"""What a tokenizer makes of a word, and tokenizers that have learned new ones."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import tokenizers
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from perfusion.editing import TokenError

T = TypeVar("T")

_LARGE = 1000  # entries
_SPACE = "▁"  # SentencePiece's
_NO_SPACE, _MARK = "\ue000", "\ue001"  # for private use, so in no text

# What a word may have at most.
MAX_PLACEHOLDER = 64  # characters
MAX_SUPERCLASS = 128
MAX_SUPERCLASS_TOKENS = 32  # of the 75 of a prompt


def check_spelling(placeholder: str, superclass: str) -> None:
    """Raise TokenError for words that no tokenizer is asked about: long ones, ones that cannot be shown, and none."""
    if not placeholder or placeholder.split() != [placeholder]:
        raise TokenError(
            f"concept.placeholder: found {_shown(placeholder)}, expected one word without spaces, such as '<cat*>'"
        )
    if not superclass.strip():
        raise TokenError(f"concept.superclass: found {superclass!r}, expected one or several words, such as 'cat'")
    for key, word, most in (
        ("placeholder", placeholder, MAX_PLACEHOLDER),
        ("superclass", superclass, MAX_SUPERCLASS),
    ):
        if len(word) > most or not word.isprintable():
            raise TokenError(
                f"concept.{key}: found {_shown(word)} of {len(word):,} characters, expected at most {most}, all of "
                "them printable"
            )


def _shown(word: str) -> str:
    return repr(word if len(word) <= MAX_SUPERCLASS else f"{word[:MAX_PLACEHOLDER]}…")


def check_word(tokenizer: PreTrainedTokenizerBase, placeholder: str, superclass: str) -> None:
    """Raise TokenError unless `placeholder` can be added and `superclass` can be read.

    A placeholder is new (upper or lower case makes no word new for CLIP), without spaces and not empty, and stays as it
    is when the tokenizer normalizes text; a superclass is one or several words that the tokenizer knows, whole or in
    pieces.
    """
    check_spelling(placeholder, superclass)
    pieces = min(tokenizer.tokenize(placeholder), tokenizer.tokenize(f" {placeholder}"), key=len)
    added: Any = tokenizer.added_tokens_encoder
    unknown = any(piece == tokenizer.unk_token for piece in pieces) and placeholder != tokenizer.unk_token
    whole = len(pieces) < 2 or all(piece in added for piece in pieces)  # a word of several vectors is several tokens
    if whole and not unknown:
        bare = placeholder.strip("<|*>")
        fresh = f"<{bare}*>" if placeholder.lower() != f"<{bare}*>".lower() else f"<my-{bare}*>"
        raise TokenError(
            f"concept.placeholder: {placeholder!r} is already a word of the tokenizer's vocabulary; expected a new "
            f"one, such as {fresh!r}"
        )
    if _is_entry(tokenizer, placeholder):
        raise TokenError(
            f"concept.placeholder: {placeholder!r} stands for a byte or a part of a word in the tokenizer's "
            f"vocabulary; expected a new one, such as '<{placeholder}*>'"
        )
    if (normal := _normalized(tokenizer, placeholder)) not in (placeholder, placeholder.lower()):
        raise TokenError(
            f"concept.placeholder: found {placeholder!r}, which the tokenizer reads as {normal!r}, expected a word "
            "that it leaves as it is, such as '<cat*>'"
        )
    if len(ids := token_ids(tokenizer, superclass)) > MAX_SUPERCLASS_TOKENS:
        raise TokenError(
            f"concept.superclass: found {superclass!r}, which is {len(ids)} tokens, expected "
            f"{MAX_SUPERCLASS_TOKENS} at most"
        )


def _is_entry(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    """Whether the vocabulary has `word` as it is, or in small letters, also where text that has it is read otherwise:
    "é" is the name of a byte, and the letter é is two bytes."""
    *ids, unknown = tokenizer.convert_tokens_to_ids([word, word.lower(), _NO_SPACE])  # type: ignore[misc]
    return any(i is not None and i not in (unknown, tokenizer.unk_token_id) for i in ids)


def _normalized(tokenizer: PreTrainedTokenizerBase, word: str) -> str:
    rust = getattr(tokenizer, "_tokenizer", None)
    known = isinstance(rust, tokenizers.Tokenizer) and rust.normalizer is not None
    return rust.normalizer.normalize_str(word) if known else word.lower()  # type: ignore[union-attr]


def token_ids(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """The ids of `word` as they stand inside a sentence, where a space comes before it.

    Raises:
        TokenError: the tokenizer finds nothing in it that it knows.
    """
    ids = tokenizer(f" {word}", add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        raise TokenError(f"{word!r}: the tokenizer does not know this word; it reads {tokenizer.tokenize(word)}")
    return ids


def spelled(stock: PreTrainedTokenizerBase, placeholder: str) -> list[int]:
    """The ids that a tokenizer without the word makes of it; none where that is not to be told from other text: "dog1",
    which reads as "dog 1", or what the tokenizer does not know."""
    ids = stock(f" {placeholder}", add_special_tokens=False).input_ids
    with_digits = placeholder.isalnum() and not placeholder.isalpha()
    return [] if with_digits or stock.unk_token_id in ids else ids


def last_tokens(ids: Tensor, word: Sequence[int]) -> Tensor:
    """(B, N) bool: where an occurrence of the id sequence `word` ends in `ids` (B, N)."""
    marks = torch.zeros_like(ids, dtype=torch.bool)
    if len(word) <= ids.shape[1]:
        windows = ids.unfold(1, len(word), 1)  # (B, N - n + 1, n)
        marks[:, len(word) - 1 :] = (windows == ids.new_tensor(word)).all(-1)
    return marks


class TokenMemory:
    """What a tokenizer made of the latest texts: training asks for the same few thousand again and again.

    It forgets everything when it is asked about another tokenizer, or about one that has been changed since.
    """

    LIMIT = 4096  # texts; then it starts anew

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = ()
        self._known: dict[str, Any] = {}

    def read(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], one: Callable[[str], T]) -> list[T]:
        """`one(text)` for each text, or what it gave the last time."""
        words: Any = tokenizer.added_tokens_encoder
        added = frozenset(words.items())
        state = (tokenizer, len(tokenizer), added, tokenizer.model_max_length, tokenizer.padding_side)
        same = bool(self._state) and self._state[0] is tokenizer and self._state[1:] == state[1:]
        if not same or len(self._known) + len(texts) > self.LIMIT:
            self._state, self._known = state, {}
        return [self._known[text] if text in self._known else self._keep(text, one(text)) for text in texts]

    def _keep(self, text: str, made: T) -> T:
        self._known[text] = made
        return made


@dataclass(eq=False)
class Standing:
    """Of an added word, for all tokenizers that know it; their copies share it."""

    word: str
    removed: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Standing:
        return self


class WholeWords:
    """Refuses prompts of which the text encoder would get no word, or only a part of it.

    Stock pipelines cut long prompts off, and only log it. And a tokenizer that another pipeline took while a word was
    there still knows the word when it is gone.

    This stands in the place of a tokenizer's `_convert_encoding`, or `truncate_sequences` of one in Python, which are
    given every text that was read: of that tokenizer alone, not of its class, so that it stays one of the same type,
    and can be copied and saved.

    Args:
        words: id -> the added word that it is a part of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: Mapping[int, Standing]) -> None:
        self.tokenizer, self.words = tokenizer, dict(words)

    def watch(self) -> None:
        """Stand in that place."""
        name = "_convert_encoding" if hasattr(self.tokenizer, "_convert_encoding") else "truncate_sequences"
        vars(self.tokenizer)[name] = self

    def __call__(self, encoding: Any, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's own.

        Raises:
            TokenError: the text is cut off, and an added word is lost or only a part of it is left. Whoever asks for
                the tokens that were cut off (`return_overflowing_tokens`) loses nothing. Or there is a word in it that
                was removed.
        """
        own: Any = type(self.tokenizer)
        if not isinstance(encoding, tokenizers.Encoding):
            left, pair, overflowing = own.truncate_sequences(self.tokenizer, encoding, *args, **kwargs)
            special: Any = self.tokenizer.num_special_tokens_to_add()
            self._check([*left, *[-1] * special], overflowing, len(encoding) + special)
            return left, pair, overflowing
        lost = [] if kwargs.get("return_overflowing_tokens") else encoding.overflowing
        length = len(encoding.ids) + sum(part.special_tokens_mask.count(0) for part in lost)
        self._check(encoding.ids, [*chain.from_iterable(part.ids for part in lost)], length)
        return own._convert_encoding(self.tokenizer, encoding, *args, **kwargs)

    def _check(self, ids: Sequence[int], lost: Sequence[int], length: int) -> None:
        """Of a text of `length` tokens, `ids` are read and others `lost`."""
        found = (self.words[token] for token in ids if token in self.words)
        if gone := next((standing.word for standing in found if standing.removed), None):
            raise TokenError(
                f"found {gone!r}, which was detached through another pipeline that shares this text encoder, expected "
                "prompts without it; make this pipeline anew from the other's components"
            )
        if word := next((self.words[token].word for token in lost if token in self.words), None):
            raise TokenError(
                f"{word!r} would be cut off: found {length} tokens with beginning and end, expected {len(ids)} at "
                "most, which is what is read of a prompt; shorten it, or put the word further to the front"
            )


def taught(stock: PreTrainedTokenizerBase, words: Sequence[tuple[str | None, int]]) -> PreTrainedTokenizerBase:
    """A copy of `stock` that knows new words.

    Args:
        words: each with its number of vectors, for which it takes as many ids, the next that are free. None in a word's
            place: its ids are used up, and no text has them.
    """
    # Its lists of merges and words are only read, and copying their tens of thousands of entries takes longest.
    tables = [value for value in vars(stock).values() if isinstance(value, (dict, list))]
    known: dict[int, Any] = {id(table): table for table in tables if len(table) > _LARGE}
    if isinstance(rust := getattr(stock, "_tokenizer", None), tokenizers.Tokenizer):
        known[id(rust)] = _twin(rust)
    tokenizer = copy.deepcopy(stock, known)
    for word, vectors in words:
        if word is None:
            _fill(tokenizer, vectors)
        else:
            _teach(tokenizer, word, vectors)
    return tokenizer


def _teach(tokenizer: PreTrainedTokenizerBase, word: str, vectors: int) -> None:
    """Make `tokenizer` read `word`, in upper or lower case, as one token per vector, with the next free ids.

    A word that ends in letters is not found inside longer words. A word of several vectors is written out by the
    normalizer, as `<w>_0 <w>_1 ...`: so every caller of the tokenizer gets all of it. Where spaces are parts of tokens,
    the one before the word is taken out, as it would be a token of its own; and the word is in small letters, which
    such pipelines make of all text.
    """
    first, spaces = len(tokenizer), keeps_spaces(tokenizer)
    before, after = word[0].isalnum(), word[-1].isalnum()
    if vectors == 1 and not spaces:
        names = [word]
    else:
        mark = _MARK * (vectors == 1 and (before or after))  # no word of a text has it, nor is a part of one
        names = [f"{word.lower()}_{i}" for i in range(vectors)] if vectors > 1 else [mark + word.lower()]
        pattern = (
            f"(?<!{_MARK})" + r"(?<!\w)" * before + re.escape(word) + r"(?!\w)" * after + r"(?!_\d)" * (vectors > 1)
        )
        write = (
            _write_out if isinstance(getattr(tokenizer, "_tokenizer", None), tokenizers.Tokenizer) else _write_out_first
        )
        write(tokenizer, f"(?i){' ?' * spaces}{pattern}", ("" if spaces else " ").join(names), spaces)
    # Normalized: matched after lower-casing, as all text is.
    whole = vectors == 1 and (before or after) and not spaces
    added: Any = [tokenizers.AddedToken(name, normalized=True, single_word=whole) for name in names]
    tokenizer.add_tokens(added)
    ids = tokenizer.convert_tokens_to_ids(names)
    if ids != [*range(first, first + vectors)]:
        raise TokenError(f"{word!r}: found its tokens {_shown(' '.join(names))} in the vocabulary, expected new ones")


def _write_out(tokenizer: Any, pattern: str, text: str, spaces: bool) -> None:
    """Have `text` stand for what `pattern` finds, before a tokenizer looks for added tokens."""
    rust = tokenizer.backend_tokenizer
    steps = [normalizers.Replace(Regex(pattern), text)]
    if spaces and tokenizer.tokenize("a")[0].startswith(_SPACE):
        # It puts a space before whatever follows an added token: here not where the text has none.
        steps.insert(0, normalizers.Replace(Regex(rf"{pattern}(?=\S)"), text + _NO_SPACE))
        removed = pre_tokenizers.Split(_SPACE + _NO_SPACE, "removed")
        rust.pre_tokenizer = pre_tokenizers.Sequence([rust.pre_tokenizer, removed])
    rust.normalizer = normalizers.Sequence([*steps, *([rust.normalizer] if rust.normalizer else [])])


def _write_out_first(tokenizer: Any, pattern: str, text: str, spaces: bool) -> None:
    """`_write_out` for a tokenizer that has no part in Rust: ChatGLM's."""
    before, found = tokenizer.tokenize, re.compile(rf"{pattern}(?P<next>\S)?")

    def tokenize(prompt: str, **kwargs: Any) -> list[str]:
        pieces: list[str] = []
        for piece in before(
            found.sub(lambda match: text + (_NO_SPACE + match["next"] if match["next"] else ""), prompt), **kwargs
        ):
            if piece.removeprefix(_SPACE).startswith(_NO_SPACE):
                piece = piece.removeprefix(_SPACE).removeprefix(_NO_SPACE)
                if pieces and pieces[-1] == _SPACE:
                    pieces.pop()
            pieces += [piece] if piece else []
        return pieces

    tokenizer.tokenize = tokenize


def keeps_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a space is a part of the token behind it, as with SentencePiece (T5, Gemma), and not of CLIP's."""
    return any(token.startswith(_SPACE) for token in tokenizer.tokenize(" a a"))


def _fill(tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Use up the next `count` ids, with what no text has."""
    first = len(tokenizer)
    tokenizer.add_tokens([tokenizers.AddedToken(f"\ufdd0{first + k}", normalized=False) for k in range(count)])  # type: ignore[list-item]
    assert len(tokenizer) == first + count


def _twin(rust: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that can be taught words of its own, around the same vocabulary and merges, which never change."""
    twin = tokenizers.Tokenizer(rust.model)
    for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        setattr(twin, step, getattr(rust, step))
    twin.encode_special_tokens = rust.encode_special_tokens
    added = rust.get_added_tokens_decoder()
    twin.add_tokens([token for _, token in sorted(added.items())])
    return twin if twin.get_added_tokens_decoder() == added else copy.deepcopy(rust)
