"""New words for a pipeline: the tokenizer takes the placeholder as one token, the text encoder gets vectors for it.

The pretrained embedding table is never copied, resized or changed. While words are added, an `ExtendedEmbedding` stands
in its place and a copy of the tokenizer stands in the tokenizer's; when the last word goes, both come back. Everything
that is known about the added words lies in that module, so it does not matter how many wrappers a pipeline has, nor in
which order words are removed.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tokenizers
import torch
from diffusers import DiffusionPipeline
from tokenizers import Regex, normalizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perfusion.editing import TokenError
from perfusion.editing.lost_words import Standing, refuse_lost_words
from perfusion.editing.superclass_prompts import Replacement

T = TypeVar("T")

_LARGE = 1000  # entries


class WordVectors(nn.Module):
    """The vectors of one added word, `weight` (vectors, d_e): float32, whatever the encoder's dtype.

    A module of its own, without submodules, so that offloading hooks can move it. `spelled` holds the ids that the
    stock tokenizer makes of the word. One that was removed keeps its place, so that those after it keep their ids.
    """

    def __init__(self, word: str, superclass: str, initial: Tensor, spelled: Sequence[int]) -> None:
        super().__init__()
        self.word, self.superclass, self.spelled = word, superclass, [*spelled]
        self.standing = Standing(word)
        self.weight = nn.Parameter(initial.detach().float().clone())

    def forward(self) -> Tensor:
        return self.weight


class ExtendedEmbedding(nn.Module):
    """An embedding table with the vectors of added words below its last row.

    Ids below `first` are looked up in `base`, bit for bit as without the wrapper; the others in the words, cast to the
    dtype of the table. `base` comes first among the submodules: transformers takes a model's dtype from its first
    parameter.
    """

    def __init__(self, base: nn.Embedding, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.base = base
        self.words = nn.ModuleList()
        self.stock_tokenizer = tokenizer
        self.first = len(tokenizer)  # id of the first added token
        self.watchers: list[RemovableHandle] = []  # hooks of the text encoder that go when the last word goes

    @property
    def weight(self) -> Tensor:
        """The pretrained table (V, d_e), without the added words."""
        return self.base.weight

    @property
    def num_embeddings(self) -> int:
        return self.base.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """(B, N) int64 to (B, N, d_e).

        Raises:
            TokenError: an added word is spelled out, by a tokenizer that does not know it.
        """
        if not torch.compiler.is_compiling():
            self._check_spelling(ids)
        added = ids >= self.first
        stock = self.base(ids.masked_fill(added, 0))
        vectors = torch.cat([word() for word in self.words]).to(stock.dtype)
        own = F.embedding((ids - self.first).clamp_min(0), vectors)
        return torch.where(added[..., None], own, stock)

    def _check_spelling(self, ids: Tensor) -> None:
        found = set(ids.flatten().tolist())
        for word in self.present():
            if not word.spelled or not found.issuperset(word.spelled):
                continue
            if bool(last_tokens(ids.view(-1, ids.shape[-1]), word.spelled).any()):
                raise TokenError(
                    f"found {word.word!r} spelled out, expected it as a token: this pipeline shares its text encoder "
                    "with one that has the concept, but took its tokenizer before; make it anew from the other's "
                    "components, which have the concept now"
                )

    def present(self) -> list[WordVectors]:
        """The words that have not been removed."""
        return [word for word in self.words if isinstance(word, WordVectors) and not word.standing.removed]

    def replacements(self) -> list[Replacement]:
        """For each word that is there, what its superclass is in its place."""
        ids: dict[str, list[int]] = {}
        first = self.first
        for word in self.words:
            assert isinstance(word, WordVectors)
            if not word.standing.removed:
                ids[word.word] = [*range(first, first + len(word.weight))]
            first += len(word.weight)
        # A superclass may be a word that was added before.
        read = lambda text: ids.get(text) or token_ids(self.stock_tokenizer, text)  # noqa: E731
        return [_replacement(self.stock_tokenizer, ids[w.word], read(w.superclass)) for w in self.present()]

    def place(self, word: WordVectors) -> None:
        """Add `word`, where one with as many vectors was removed, or last."""
        for k, other in enumerate(self.words):
            assert isinstance(other, WordVectors)
            if other.standing.removed and len(other.weight) == len(word.weight):
                self.words[k] = word
                return
        self.words.append(word)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the stock tokenizer that knows the added words, with ids in the order of their vectors.

        It raises TokenError where it would cut off one of them.
        """
        # Its lists of merges and words are only read, and copying their tens of thousands of entries takes longest.
        tables = [value for value in vars(self.stock_tokenizer).values() if isinstance(value, (dict, list))]
        known: dict[int, Any] = {id(table): table for table in tables if len(table) > _LARGE}
        if isinstance(rust := getattr(self.stock_tokenizer, "_tokenizer", None), tokenizers.Tokenizer):
            known[id(rust)] = _twin(rust)
        extended = copy.deepcopy(self.stock_tokenizer, known)
        parts: dict[int, Standing] = {}
        for word in self.words:
            assert isinstance(word, WordVectors)
            if word.standing.removed:
                _fill(extended, len(word.weight))
            else:
                parts |= dict.fromkeys(_teach(extended, word.word, len(word.weight)), word.standing)
        refuse_lost_words(extended, parts)
        return extended


class AddedToken(ABC):
    """A word added to every tokenizer and text encoder of a backbone, with trainable embeddings."""

    placeholder: str

    @abstractmethod
    def embeddings(self) -> dict[str, nn.Parameter]:
        """Name of the text encoder -> its vectors for the word, (vectors, d_e) float32."""

    @abstractmethod
    def encoders(self) -> dict[str, nn.Module]:
        """Name -> text encoder, in the order in which their outputs stand side by side in the denoiser's context."""

    @abstractmethod
    def replacements(self) -> dict[str, Replacement]:
        """Name of the text encoder -> what the superclass is in the word's place, as its tokenizer has them now."""

    @abstractmethod
    def remove(self) -> None:
        """Put tokenizers and embedding tables back exactly as they were."""


class AddedWord(AddedToken):
    """A word that `add_word` put into a pipeline."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        towers: Mapping[str, str],
        placeholder: str,
        superclass: str,
        words: Mapping[str, WordVectors],
    ) -> None:
        self.placeholder, self.superclass = placeholder, superclass
        self._pipe, self._towers, self._words = pipe, dict(towers), dict(words)

    def embeddings(self) -> dict[str, nn.Parameter]:
        return {encoder: word.weight for encoder, word in self._words.items()}

    def encoders(self) -> dict[str, nn.Module]:
        return {encoder: getattr(self._pipe, encoder) for encoder in self._towers}

    def replacements(self) -> dict[str, Replacement]:
        tokenizers = {encoder: getattr(self._pipe, name) for encoder, name in self._towers.items()}
        return {
            encoder: _replacement(
                tokenizer, token_ids(tokenizer, self.placeholder), token_ids(tokenizer, self.superclass)
            )
            for encoder, tokenizer in tokenizers.items()
        }

    def remove(self) -> None:
        """Put tokenizers and tables back as they were, but for words that others added. Twice is as good as once."""
        for encoder, word in self._words.items():
            table = getattr(self._pipe, encoder).get_input_embeddings()
            if not isinstance(table, ExtendedEmbedding) or all(w is not word for w in table.present()):
                continue
            word.standing.removed = True
            if table.present():
                setattr(self._pipe, self._towers[encoder], table.tokenizer())
            else:
                _put(getattr(self._pipe, encoder), table.base)
                setattr(self._pipe, self._towers[encoder], table.stock_tokenizer)
                for watcher in table.watchers:
                    watcher.remove()


def add_word(
    pipe: DiffusionPipeline,
    towers: Mapping[str, str],
    placeholder: str,
    superclass: str,
    vectors: int | None = 1,
    watchers: Mapping[str, Callable[..., Any]] | None = None,
) -> AddedWord:
    """Add `placeholder` to tokenizers and text encoders of `pipe`, starting at the embedding of `superclass`.

    Args:
        towers: attribute of the text encoder in the pipeline -> attribute of its tokenizer.
        vectors: how many; all start alike, at the mean over the superclass's tokens, and their positions tell them
            apart. None: as many as the superclass has tokens, and each starts at its token, so that the placeholder
            reads as the superclass does.
        watchers: of text encoders, forward hooks (with keywords) that stay as long as there are words in them.

    Raises:
        TokenError: see `check_pipeline`; nothing is changed then.
    """
    if vectors is not None and vectors < 1:
        raise TokenError(f"vectors of {placeholder!r}: found {vectors}, expected at least 1")
    check_pipeline(pipe, towers, placeholder, superclass)
    words: dict[str, WordVectors] = {}
    for encoder_name, tokenizer_name in towers.items():
        encoder, tokenizer = getattr(pipe, encoder_name), getattr(pipe, tokenizer_name)
        table = encoder.get_input_embeddings()
        with torch.no_grad():
            ids = torch.tensor(token_ids(tokenizer, superclass), device=table.weight.device)
            initial = table(ids).float()
            if vectors is not None:
                initial = initial.mean(0).expand(vectors, -1)
        if not isinstance(table, ExtendedEmbedding):
            table = ExtendedEmbedding(table, tokenizer)
            _put(encoder, table)
            if watchers and encoder_name in watchers:
                table.watchers.append(encoder.register_forward_hook(watchers[encoder_name], with_kwargs=True))
        spelled = table.stock_tokenizer(placeholder, add_special_tokens=False).input_ids
        # Not to be told from other text: "dog1", which reads as "dog 1", or what the tokenizer does not know.
        with_digits = placeholder.isalnum() and not placeholder.isalpha()
        if with_digits or table.stock_tokenizer.unk_token_id in spelled:
            spelled = []
        words[encoder_name] = WordVectors(placeholder, superclass, initial, spelled)
        table.place(words[encoder_name])
        setattr(pipe, tokenizer_name, table.tokenizer())
    return AddedWord(pipe, towers, placeholder, superclass, words)


def check_pipeline(pipe: DiffusionPipeline, towers: Mapping[str, str], placeholder: str, superclass: str) -> None:
    """Raise TokenError unless `placeholder` can be added to `pipe`: see `check_word`; and its text encoders, which
    other pipelines may share, must not have it."""
    for encoder, tokenizer in towers.items():
        check_word(getattr(pipe, tokenizer), placeholder, superclass)
        table = getattr(pipe, encoder).get_input_embeddings()
        words = table.present() if isinstance(table, ExtendedEmbedding) else []
        if any(word.word.lower() == placeholder.lower() for word in words):
            raise TokenError(
                f"concept.placeholder: {placeholder!r} is attached already, to another pipeline that shares this text "
                "encoder; make this pipeline anew from the other's components, which have the concept, or detach it "
                "there first"
            )


def check_word(tokenizer: PreTrainedTokenizerBase, placeholder: str, superclass: str) -> None:
    """Raise TokenError unless `placeholder` can be added and `superclass` can be read.

    A placeholder is new (upper or lower case makes no word new for CLIP), without spaces and not empty; a superclass is
    one or several words that the tokenizer knows, whole or in pieces.
    """
    if not placeholder or placeholder.split() != [placeholder]:
        raise TokenError(
            f"concept.placeholder: found {placeholder!r}, expected one word without spaces, such as '<cat*>'"
        )
    pieces = tokenizer.tokenize(placeholder)
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
    if not superclass.strip():
        raise TokenError(f"concept.superclass: found {superclass!r}, expected one or several words, such as 'cat'")
    token_ids(tokenizer, superclass)


def token_ids(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """The ids of `word` as they stand inside a sentence.

    Raises:
        TokenError: the tokenizer finds nothing in it that it knows.
    """
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        raise TokenError(f"{word!r}: the tokenizer does not know this word; it reads {tokenizer.tokenize(word)}")
    return ids


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


def last_tokens(ids: Tensor, word: Sequence[int]) -> Tensor:
    """(B, N) bool: where an occurrence of the id sequence `word` ends in `ids` (B, N)."""
    marks = torch.zeros_like(ids, dtype=torch.bool)
    if len(word) <= ids.shape[1]:
        windows = ids.unfold(1, len(word), 1)  # (B, N - n + 1, n)
        marks[:, len(word) - 1 :] = (windows == ids.new_tensor(word)).all(-1)
    return marks


def _replacement(tokenizer: PreTrainedTokenizerBase, word: Sequence[int], superclass: Sequence[int]) -> Replacement:
    end: Any = tokenizer.eos_token_id
    pad: Any = tokenizer.pad_token_id
    return Replacement(word, superclass, end, end if pad is None else pad)


def _teach(tokenizer: PreTrainedTokenizerBase, word: str, vectors: int) -> list[int]:
    """Make `tokenizer` read `word`, in upper or lower case, as one token per vector, with the next free ids: these.

    A word that ends in letters is not found inside longer words. A word of several vectors is written out by the
    normalizer, as `<w>_0 <w>_1 ...`: so every caller of the tokenizer gets all of it.
    """
    first = len(tokenizer)
    before, after = word[0].isalnum(), word[-1].isalnum()
    if vectors == 1:
        names = [word]
    else:
        names = [f"{word.lower()}_{i}" for i in range(vectors)]
        pattern = "(?i)" + r"(?<!\w)" * before + re.escape(word) + r"(?!\w)" * after + r"(?!_\d)"
        written_out = normalizers.Replace(Regex(pattern), " ".join(names))
        rust: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        rust.normalizer = normalizers.Sequence([written_out, *([rust.normalizer] if rust.normalizer else [])])
    # Normalized: matched after lower-casing, as all text is.
    whole = vectors == 1 and (before or after)
    added: Any = [tokenizers.AddedToken(name, normalized=True, single_word=whole) for name in names]
    tokenizer.add_tokens(added)
    ids = tokenizer.convert_tokens_to_ids(names)
    expected = [*range(first, first + vectors)]
    assert ids == expected, f"{names} got the ids {ids}, expected them from {first} on"
    return expected


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


def _put(encoder: PreTrainedModel, table: nn.Module) -> None:
    """Make `table` the module that `encoder` looks its tokens up in."""
    encoder.set_input_embeddings(table)
    assert encoder.get_input_embeddings() is table and any(module is table for module in encoder.modules()), (
        f"{type(encoder).__name__} did not take the new embedding"
    )
