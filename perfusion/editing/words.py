"""New words in a pipeline: what its tokenizers and text encoders make of a prompt that has them.

All that is known about the words of a text encoder lies in one `Words`. It stands in the place of the encoder's
embedding table, and the pipeline has a copy of the tokenizer that knows the words, so it does not matter how many
pipelines share an encoder, nor in which order words leave. With the last one the table and the tokenizer come back; the
pretrained table is never copied, resized or changed.

There are three reasons to read a prompt with superclasses in the place of words:

- a concept is left out of a picture (β = inf): its word is its superclass from the start (`AddedWord.leave_out`);
- the keys of a concept are locked globally: K reads the prompt with the superclass, so that both encodings are kept
  until the denoiser asks for the one by the other (`AddedWord.lock_keys`, `superclass_context`);
- a text encoder also gives one vector for the whole prompt, by which concepts would pass the edit (`Words.pools`).

Some text encoders read a prompt without what pads it (T5, Gemma, ChatGLM), and some denoisers look at its other
positions alone. A superclass of more or fewer tokens than its word then asks for another mask, here and there
(`Reading.masked`, `superclass_mask`).
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perfusion.editing import EditError, TokenError
from perfusion.editing.reading import (
    Reading,
    ids_of,
    looked_up,
    replace_words,
    replace_words_behind_padding,
    with_ids,
    with_masks,
)
from perfusion.editing.tokens import Standing, WholeWords, check_word, last_tokens, spelled, taught, token_ids

_LOADERS = ("load_textual_inversion", "unload_textual_inversion")
_CLEANER = "_clean_caption"  # of pipelines that take symbols out of prompts
KEPT = 8  # outputs of a text encoder that are remembered: of prompts, of negative prompts, and some more


class WordVectors(nn.Module):
    """The vectors of one added word, `weight` (vectors, d_e): float32, whatever the encoder's dtype.

    A module of its own, without submodules, so that offloading hooks can move it. One that was removed keeps its place
    in `Words`, so that those after it keep their ids.
    """

    def __init__(self, word: str, superclass: Sequence[int], spelled: Sequence[int], initial: Tensor) -> None:
        super().__init__()
        self.standing = Standing(word)
        self.superclass = [*superclass]  # ids
        self.spelled = [*spelled]  # ids that the stock tokenizer makes of the word; empty: they may be other text
        self.left_out: Callable[[int], Sequence[bool]] | None = None  # see `AddedWord.leave_out`
        self.keys_locked = False  # see `AddedWord.lock_keys`
        self.weight = nn.Parameter(initial.detach().float().clone())

    def forward(self) -> Tensor:
        return self.weight


class Words(nn.Module):
    """The words that were added to one text encoder, below the last row of its embedding table.

    Ids below `first` are looked up in `base`, bit for bit as without the words; the others in their vectors, cast to
    the dtype of the table. `base` comes first among the submodules: transformers takes a model's dtype from its first
    parameter.

    Args:
        tokenizer: the encoder's own.
        pools: the encoder also gives one vector for the whole prompt. It is that of the prompt with superclasses in the
            words' places then.
    """

    def __init__(
        self, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reading: Reading, pools: bool
    ) -> None:
        super().__init__()
        table: Any = encoder.get_input_embeddings()
        self.base: nn.Embedding = table
        self.words = nn.ModuleList()
        self.stock_tokenizer, self.reading, self.pools = tokenizer, reading, pools
        self.first = len(tokenizer)  # id of the first added token
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=KEPT)  # encodings with words, with superclasses
        self._masks: deque[tuple[Tensor, Tensor]] = deque(maxlen=KEPT)  # encodings with superclasses, their masks
        self._hooks: list[RemovableHandle] = [
            encoder.register_forward_pre_hook(self._before, with_kwargs=True),
            encoder.register_forward_hook(self._after, with_kwargs=True),
        ]
        self.put(encoder)

    def put(self, encoder: PreTrainedModel) -> None:
        """Stand in the place of the encoder's embedding table, wherever it has it: T5 has it twice."""
        encoder.resize_token_embeddings = _refuse_resizing  # type: ignore[method-assign]
        self._places = [
            (module, name, child)
            for module in encoder.modules()
            for name, child in module.named_children()
            if isinstance(child, nn.Embedding) and child.weight is self.base.weight and module is not self
        ]
        for module, name, _ in self._places:
            setattr(module, name, self)
        assert encoder.get_input_embeddings() is self, f"{type(encoder).__name__} did not take the new embedding"

    def take_out(self, encoder: PreTrainedModel) -> None:
        """Give the encoder its own table back."""
        del encoder.resize_token_embeddings
        for module, name, child in self._places:
            setattr(module, name, child)

    def put_again(self, encoder: PreTrainedModel) -> None:
        """`put`, after `take_out`, where table and tokenizer may have grown meanwhile: the words get other ids, and
        tokenizers that know the old ones refuse them from now on."""
        self.base = encoder.get_input_embeddings()  # type: ignore[assignment]
        self.first = len(self.stock_tokenizer)
        for word in self.words:
            assert isinstance(word, WordVectors)
            former, word.standing = word.standing, copy.copy(word.standing)
            former.removed = True
        self.forget()
        self.put(encoder)

    def close(self, encoder: PreTrainedModel) -> None:
        """Leave the encoder as it was before."""
        self.take_out(encoder)
        for hook in self._hooks:
            hook.remove()

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
        """(B, N) int64 to (B, N, d_e)."""
        added = ids >= self.first
        stock = self.base(ids.masked_fill(added, 0))
        vectors = torch.cat([word() for word in self.words]).to(stock.dtype)
        own = F.embedding((ids - self.first).clamp_min(0), vectors)
        return torch.where(added[..., None], own, stock)

    def present(self) -> dict[WordVectors, list[int]]:
        """The words that have not been removed, and their ids."""
        found: dict[WordVectors, list[int]] = {}
        first = self.first
        for word in self.words:
            assert isinstance(word, WordVectors)
            ids = [*range(first, first + len(word.weight))]
            first += len(ids)
            if not word.standing.removed:
                found[word] = ids
        return found

    def place(self, word: WordVectors) -> None:
        """Add `word`, where one with as many vectors was removed, or last."""
        self.forget()
        for k, other in enumerate(self.words):
            assert isinstance(other, WordVectors)
            if other.standing.removed and len(other.weight) == len(word.weight):
                self.words[k] = word
                return
        self.words.append(word)

    def drop_last_removed(self) -> None:
        """Forget removed words behind which there is no other, whose places nobody needs."""
        while self.words[-1].standing.removed:  # type: ignore[union-attr]
            del self.words[-1]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the stock tokenizer that knows the added words, with ids in the order of their vectors.

        It raises TokenError where it would cut off one of them.
        """
        present = self.present()
        words: Any = self.words
        known = taught(
            self.stock_tokenizer,
            [(word.standing.word if word in present else None, len(word.weight)) for word in words],
        )
        parts = {i: word.standing for word, ids in present.items() for i in ids}
        WholeWords(known, parts).watch()
        return known

    def forget(self) -> None:
        """Let go of all encodings, which are of other words than now."""
        self._pairs.clear()

    def with_superclasses(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """The encodings with superclasses for `part` (B, N, d_e) of a context, in its dtype; and (B,) bool: which rows
        are known. Rows that the encoder did not make lately are not, and are given back as they are."""
        return looked_up(self._pairs, part, part)

    def with_own_masks(self, part: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Likewise `mask` (B, N) of a context whose `part` (B, N, d_e) this encoder made, with the masks of prompts
        that were read with superclasses."""
        return looked_up(self._masks, part, mask)

    def _before(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A prompt is read by the encoder with the superclasses of concepts that are left out.

        Raises:
            TokenError: an added word is spelled out, by a tokenizer that does not know it.
        """
        ids = ids_of(args, kwargs)
        if ids is None:
            return None
        words = self.present()
        if not torch.compiler.is_compiling():
            _refuse_spelled(ids, words)
        left_out = {
            word: word.left_out(len(ids))
            for word, own in words.items()
            if word.left_out is not None and bool(last_tokens(ids, own).any())
        }
        if not left_out:
            return None
        rows = [
            self._replaced([row], [word for word, out in left_out.items() if out[k]])[0][0]
            for k, row in enumerate(ids.tolist())
        ]
        more = with_masks(rows, kwargs, self.stock_tokenizer, self.reading) if self.reading.masked else kwargs
        return with_ids(ids.new_tensor(rows), args, more)

    def _after(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A prompt has been read: read it once more with superclasses, if that is asked for; keep the pair of encodings
        where keys are locked, and replace the pooled output."""
        ids = ids_of(args, kwargs)
        words = self.present()
        mask = kwargs.get("attention_mask")
        if self.reading.masked and mask is not None and any(word.left_out is not None for word in words):
            self._masks.extend((own, mask) for own in self.reading.states(output))
        locked = [word for word in words if word.keys_locked]
        if ids is None or not (locked or (self.pools and bool((ids >= self.first).any()))):
            return None
        rows = ids.tolist()
        plain, where = self._replaced(rows, locked)
        read = output if plain == rows else self._read(encoder, plain, args, kwargs)
        if locked:
            positions = ids.new_tensor(where)[..., None]
            for own, other in zip(self.reading.states(output), self.reading.states(read), strict=True):
                self._pairs.append((own, other.gather(1, positions.expand_as(other))))
        if not self.pools:
            return None
        pooled = rows
        for _ in words:  # a superclass may be an added word, too
            pooled, _ = self._replaced(pooled, words)
        if pooled == rows:
            return None
        if pooled != plain:
            read = self._read(encoder, pooled, args, kwargs)
        return self.reading.pooled(output, read)

    @torch.no_grad()
    def _read(self, encoder: nn.Module, rows: list[list[int]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the encoder would have given for other ids. `forward` has no hooks, so nothing watches this call."""
        ids: Any = ids_of(args, kwargs)
        kwargs = with_masks(rows, kwargs, self.stock_tokenizer, self.reading)
        args, kwargs = with_ids(ids.new_tensor(rows), args, kwargs)
        return encoder.forward(*args, **kwargs)

    def _replaced(self, rows: list[list[int]], words: Iterable[WordVectors]) -> tuple[list[list[int]], list[list[int]]]:
        """`replace_words` of every row."""
        present = self.present()
        end: Any = self.stock_tokenizer.eos_token_id
        pad: Any = self.stock_tokenizer.pad_token_id
        pairs = [(present[word], word.superclass) for word in words]
        side = self.reading.padding_side or self.stock_tokenizer.padding_side
        replaced = replace_words_behind_padding if side == "left" else replace_words
        made = [replaced(row, pairs, end, end if pad is None else pad) for row in rows]
        return [new for new, _ in made], [where for _, where in made]


class AddedWord:
    """A word that `add_word` put into all text encoders of a pipeline and their tokenizers."""

    def __init__(self, pipe: DiffusionPipeline, towers: Mapping[str, str], reading: Reading) -> None:
        self._pipe, self._towers, self._reading = pipe, dict(towers), reading
        self._words: dict[str, tuple[Words, WordVectors]] = {}

    def embeddings(self) -> dict[str, nn.Parameter]:
        """Name of the text encoder -> its vectors for the word, (vectors, d_e) float32."""
        return {encoder: word.weight for encoder, (_, word) in self._words.items()}

    def leave_out(self, left_out: Callable[[int], Sequence[bool]] | None) -> None:
        """Have the word read as its superclass in some rows of prompts.

        Encodings that were made before (`prompt_embeds`) stay what they are.

        Args:
            left_out: which rows of a number of them. It is asked only where a prompt has the word. None: in no row.
        """
        for _, word in self._words.values():
            word.left_out = left_out

    @property
    def tables(self) -> list[Words]:
        """The words of all text encoders, in the order in which their outputs stand side by side in the denoiser's
        context, for `superclass_context`."""
        return [table for table, _ in self._words.values()]

    def lock_keys(self, locked: bool) -> None:
        """Whether prompts are also read with the superclass in the word's place."""
        for table, word in self._words.values():
            word.keys_locked = locked
            table.forget()

    def remove(self) -> None:
        """Put tokenizers and tables back as they were, but for words that others added. Twice is as good as once."""
        for encoder, (table, word) in self._words.items():
            if word.standing.removed:
                continue
            word.standing.removed = True
            table.forget()
            if table.present():
                table.drop_last_removed()
                setattr(self._pipe, self._towers[encoder], table.tokenizer())
            else:
                table.close(getattr(self._pipe, encoder))
                setattr(self._pipe, self._towers[encoder], table.stock_tokenizer)
                for name in (*_LOADERS, _CLEANER):
                    vars(self._pipe).pop(name, None)

    def _add(self, encoder: str, word: WordVectors) -> None:
        module, tokenizer = getattr(self._pipe, encoder), self._towers[encoder]
        table = module.get_input_embeddings()
        if not isinstance(table, Words):
            pools = encoder == self._reading.pooling
            table = Words(module, getattr(self._pipe, tokenizer), self._reading, pools)
        self._words[encoder] = table, word  # first: what fails from here on is taken back by `remove`
        table.place(word)
        setattr(self._pipe, tokenizer, table.tokenizer())
        for name in _LOADERS:
            if name not in vars(self._pipe) and hasattr(self._pipe, name):
                setattr(self._pipe, name, functools.partial(_on_stock, self._pipe, self._towers, name))
        if hasattr(self._pipe, _CLEANER):
            setattr(self._pipe, _CLEANER, functools.partial(_cleaned, self._pipe, table))


def add_word(
    pipe: DiffusionPipeline,
    towers: Mapping[str, str],
    placeholder: str,
    superclass: str,
    vectors: int | None = 1,
    reading: Reading | None = None,
) -> AddedWord:
    """Add `placeholder` to tokenizers and text encoders of `pipe`, starting at the embedding of `superclass`.

    Args:
        towers: attribute of the text encoder in the pipeline -> attribute of its tokenizer.
        vectors: how many; all start alike, at the mean over the superclass's tokens, and their positions tell them
            apart. None: as many as the superclass has tokens, and each starts at its token, so that the placeholder
            reads as the superclass does.
        reading: of the text encoders; None: as CLIP's do.

    Raises:
        TokenError: see `check_pipeline`; nothing is changed then.
    """
    if vectors is not None and vectors < 1:
        raise TokenError(f"vectors of {placeholder!r}: found {vectors}, expected at least 1")
    check_pipeline(pipe, towers, placeholder, superclass)
    added = AddedWord(pipe, towers, reading or Reading())
    with ExitStack() as undo:
        undo.callback(added.remove)
        for encoder, name in towers.items():
            tokenizer = getattr(pipe, name)
            table = getattr(pipe, encoder).get_input_embeddings()
            ids = token_ids(tokenizer, superclass)
            with torch.no_grad():
                initial = table(torch.tensor(ids, device=table.weight.device)).float()
                if vectors is not None:
                    initial = initial.mean(0).expand(vectors, -1)
            stock = table.stock_tokenizer if isinstance(table, Words) else tokenizer
            word = WordVectors(placeholder, ids, spelled(stock, placeholder), initial)
            added._add(encoder, word)
        undo.pop_all()
    return added


def check_pipeline(pipe: DiffusionPipeline, towers: Mapping[str, str], placeholder: str, superclass: str) -> None:
    """Raise TokenError unless `placeholder` can be added to `pipe`: see `check_word`; and its text encoders, which
    other pipelines may share, must not have it."""
    for encoder, tokenizer in towers.items():
        check_word(getattr(pipe, tokenizer), placeholder, superclass)
        table = getattr(pipe, encoder).get_input_embeddings()
        words = table.present() if isinstance(table, Words) else ()
        if any(word.standing.word.lower() == placeholder.lower() for word in words):
            raise TokenError(
                f"concept.placeholder: {placeholder!r} is attached already, to another pipeline that shares this text "
                "encoder; make this pipeline anew from the other's components, which have the concept, or detach it "
                "there first"
            )


def _on_stock(pipe: Any, towers: Mapping[str, str], name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a loader of textual inversions, which makes tables and tokenizers larger, with the stock ones in place, and
    put the words in again below what it added."""
    tables = {encoder: getattr(pipe, encoder).get_input_embeddings() for encoder in towers}
    tables = {encoder: table for encoder, table in tables.items() if isinstance(table, Words)}
    stock: dict[int, Any] = {}
    for encoder, table in tables.items():
        stock[id(getattr(pipe, towers[encoder]))] = table.stock_tokenizer
        table.take_out(getattr(pipe, encoder))
        setattr(pipe, towers[encoder], table.stock_tokenizer)
    try:
        return getattr(type(pipe), name)(
            pipe, *(stock.get(id(a), a) for a in args), **{key: stock.get(id(a), a) for key, a in kwargs.items()}
        )
    finally:
        for encoder, table in tables.items():
            table.put_again(getattr(pipe, encoder))
            setattr(pipe, towers[encoder], table.tokenizer())


def _cleaned(pipe: Any, table: Words, caption: str) -> str:
    """What the pipeline makes of a caption. Raises TokenError if that takes an added word apart."""
    cleaned = getattr(type(pipe), _CLEANER)(pipe, caption)
    for standing in (word.standing for word in table.present()):
        if standing.word.lower() in caption.lower() and standing.word.lower() not in cleaned:
            raise TokenError(
                f"clean_caption=True would make {cleaned!r} of {caption!r}, without {standing.word!r}; expected "
                "clean_caption=False"
            )
    return cleaned


def _refuse_resizing(*args: Any, **kwargs: Any) -> Any:
    raise EditError(
        "this text encoder has the word of a concept below its embedding table, which cannot become larger meanwhile: "
        "load textual inversions with the pipeline that the concept was attached to, or before attaching"
    )


def superclass_context(words: Sequence[Words], context: Tensor) -> Tensor:
    """`context` (B, N, d) with superclasses in the place of words whose keys are locked; zeros, which stand for no
    prompt in SDXL, stay.

    Args:
        words: of each text encoder, in the order in which their outputs stand side by side in the context.

    Raises:
        EditError: a row of it is not known. (Inside a compiled graph, which cannot raise, it stays as it is.)
    """
    parts = context.split([table.embedding_dim for table in words], -1)
    found = [table.with_superclasses(part) for table, part in zip(words, parts, strict=True)]
    unknown = ~torch.stack([known for _, known in found]).all(0) & (context != 0).flatten(1).any(1)
    if not torch.compiler.is_compiling() and bool(unknown.any()):
        raise EditError(
            "key_lock=global: found an encoding that the pipeline's text encoder did not just make (prompt_embeds from "
            "elsewhere, or scaled; or clip_skip), of which it is not known how it reads with the superclass; expected "
            "a prompt; or use key_lock=local"
        )
    return torch.cat([part for part, _ in found], -1)


def superclass_mask(words: Sequence[Words], context: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask (B, N) that holds for `context` (B, N, d), where some of its prompts were read with superclasses of
    other lengths than their words; `mask` itself where none was."""
    if mask is None or mask.dim() != 2 or len(words) != 1 or not words[0].reading.masked:
        return mask
    changed, _ = words[0].with_own_masks(context, mask)
    return mask if torch.equal(changed, mask) else changed


def _refuse_spelled(ids: Tensor, words: Iterable[WordVectors]) -> None:
    found = set(ids.flatten().tolist())
    for word in words:
        if not word.spelled or not found.issuperset(word.spelled):
            continue
        if bool(last_tokens(ids.view(-1, ids.shape[-1]), word.spelled).any()):
            raise TokenError(
                f"found {word.standing.word!r} spelled out, expected it as a token: this pipeline shares its text "
                "encoder with one that has the concept, but took its tokenizer before; make it anew from the other's "
                "components, which have the concept now"
            )
