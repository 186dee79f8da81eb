"""Added words: read as one, trainable, and gone without a trace."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from perfusion.editing import TokenError
from perfusion.editing.tokens import TokenMemory, check_word, last_tokens, token_ids
from perfusion.editing.words import Words, add_word
from tests.pipelines import tiny_pipeline

TOWERS = {"text_encoder": "tokenizer"}


@pytest.fixture(scope="module")
def shared() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture
def pipe(shared: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    """The shared pipeline, checked to be left as it was found."""
    tokenizer, table = shared.tokenizer, shared.text_encoder.get_input_embeddings()
    state = {name: value.clone() for name, value in shared.text_encoder.state_dict().items()}
    vocabulary = dict(tokenizer.get_vocab())
    yield shared
    table = shared.text_encoder.get_input_embeddings()
    while isinstance(table, Words):  # left by a test: the next one starts afresh
        table.close(shared.text_encoder)
        shared.tokenizer = table.stock_tokenizer
        table = table.base
    assert shared.tokenizer is tokenizer and tokenizer.get_vocab() == vocabulary
    after = shared.text_encoder.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)


def context(pipe: StableDiffusionPipeline, *prompts: str) -> Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(list(prompts), torch.device("cpu"), 1, False)[0]


def set_vectors(word, value: Tensor | float) -> None:
    with torch.no_grad():
        for vectors in word.embeddings().values():
            vectors.copy_(torch.as_tensor(value))


@pytest.mark.parametrize("phrase", ["teddy bear", "cat", "sks teddy bear"])
def test_a_word_with_the_vectors_of_a_phrase_reads_as_it(pipe: StableDiffusionPipeline, phrase: str) -> None:
    prompts = ["a photo of {} on the beach", "{}", "a {}, sleeping"]
    expected = context(pipe, *(prompt.format(phrase) for prompt in prompts))
    word = add_word(pipe, TOWERS, "<toy*>", phrase, vectors=None)
    (vectors,) = word.embeddings().values()
    assert len(vectors) == len(token_ids(pipe.tokenizer, phrase))
    assert torch.equal(context(pipe, *(prompt.format("<toy*>") for prompt in prompts)), expected)
    set_vectors(word, 1.0)
    assert not torch.equal(context(pipe, *(prompt.format("<toy*>") for prompt in prompts)), expected)
    word.remove()


@pytest.mark.parametrize(
    "prompt",
    ["a photo of <cat*>", "<cat*>", "a <cat*>, sleeping", "my <CAT*>'s hat", "a photo (<Cat*>).", "a<cat*>in the snow"],
)
@pytest.mark.parametrize("vectors", [1, 3])
def test_the_placeholder_is_read_whole(pipe: StableDiffusionPipeline, prompt: str, vectors: int) -> None:
    word = add_word(pipe, TOWERS, "<cat*>", "cat", vectors)
    first = len(pipe.tokenizer) - vectors
    ids = torch.tensor([pipe.tokenizer(prompt).input_ids])
    assert [int(i) for i in ids[0] if i >= first] == list(range(first, first + vectors))
    assert int(last_tokens(ids, token_ids(pipe.tokenizer, "<cat*>")).sum()) == 1
    word.remove()


def test_a_placeholder_of_letters_is_not_found_inside_words(pipe: StableDiffusionPipeline) -> None:
    for vectors in (1, 2):
        word = add_word(pipe, TOWERS, "sks", "cat", vectors)
        first = len(pipe.tokenizer) - vectors
        assert sum(i >= first for i in pipe.tokenizer("a sks, one SKS cat").input_ids) == 2 * vectors
        assert all(i < first for i in pipe.tokenizer("asks sksa sks_").input_ids)
        word.remove()


def test_a_placeholder_of_letters_leaves_other_text_alone_that_reads_like_it(pipe: StableDiffusionPipeline) -> None:
    """Spelled out it would be the tokens of "cat 1"."""
    before = context(pipe, "a cat 1")
    added = add_word(pipe, TOWERS, "cat1", "cat")
    table = pipe.text_encoder.get_input_embeddings()
    assert torch.equal(context(pipe, "a cat 1"), before)
    assert [word.spelled for word in table.present()] == [[]]
    added.remove()
    added = add_word(pipe, TOWERS, "catdog", "cat")  # nothing else reads like it
    assert all(word.spelled for word in pipe.text_encoder.get_input_embeddings().present())
    added.remove()


def test_only_prompts_with_the_word_change(pipe: StableDiffusionPipeline) -> None:
    prompts = ["a photo of a dog", "", "teddy bear on the beach"]
    before = context(pipe, *prompts)
    word = add_word(pipe, TOWERS, "<cat*>", "cat")
    assert torch.equal(context(pipe, *prompts), before)
    start = context(pipe, "a photo of <cat*>")
    set_vectors(word, 1.0)
    assert torch.equal(context(pipe, *prompts), before)
    assert not torch.equal(context(pipe, "a photo of <cat*>"), start)
    word.remove()
    assert torch.equal(context(pipe, *prompts), before)


def test_words_leave_in_any_order(pipe: StableDiffusionPipeline) -> None:
    cat, dog = add_word(pipe, TOWERS, "<cat*>", "cat", 2), add_word(pipe, TOWERS, "<dog*>", "dog")
    set_vectors(dog, 0.5)
    both = context(pipe, "<dog*> in the snow")
    assert not torch.equal(both, context(pipe, "<cat*> in the snow"))
    cat.remove()
    assert torch.equal(context(pipe, "<dog*> in the snow"), both)
    assert "<dog*>" in pipe.tokenizer.tokenize("<cat*> <dog*>") and "<cat*>_0" not in pipe.tokenizer.get_vocab()
    cat.remove()  # once more changes nothing
    assert torch.equal(context(pipe, "<dog*> in the snow"), both)
    dog.remove()
    assert not isinstance(pipe.text_encoder.get_input_embeddings(), Words)


@pytest.mark.parametrize(
    ("placeholder", "superclass", "message"),
    [
        ("", "cat", "concept.placeholder: found '', expected one word"),
        ("  ", "cat", "concept.placeholder: found '  ', expected one word"),
        ("my cat", "cat", "concept.placeholder: found 'my cat', expected one word without spaces"),
        ("cat", "cat", r"'cat' is already a word .* such as '<cat\*>'"),
        ("Dog", "cat", "'Dog' is already a word"),
        ("<|endoftext|>", "cat", "is already a word"),
        ("<taken>", "cat", "'<taken>' is already a word"),
        ("<TAKEN>", "cat", "'<TAKEN>' is already a word"),
        ("<two>", "cat", "'<two>' is already a word"),
        ("<cat*>", "", "concept.superclass: found ''"),
        ("<cat*>", " ", "concept.superclass: found ' '"),
        ("é", "cat", "'é' stands for a byte or a part of a word in the tokenizer's vocabulary; .* such as '<é\\*>'"),
        ("É", "cat", "stands for a byte or a part of a word"),
        ("Ġ", "cat", "stands for a byte or a part of a word"),
        ("<e\u0301*>", "cat", "which the tokenizer reads as '<é\\*>', expected a word that it leaves as it is"),
        ("<" + "x" * 64, "cat", "found '<x+' of 65 characters, expected at most 64, all of them printable"),
        ("<\u200b>", "cat", "all of them printable"),
        ("<x*>", "cat " * 33, "of 132 characters, expected at most 128"),
        ("<x*>", "!?" * 60, r"which is \d+ tokens, expected 32 at most"),
    ],
)
def test_words_that_cannot_be_added_are_refused(
    pipe: StableDiffusionPipeline, placeholder: str, superclass: str, message: str
) -> None:
    words = [add_word(pipe, TOWERS, "<taken>", "cat"), add_word(pipe, TOWERS, "<two>", "cat", vectors=2)]
    with pytest.raises(TokenError, match=message):
        check_word(pipe.tokenizer, placeholder, superclass)
    tokenizer = pipe.tokenizer
    with pytest.raises(TokenError, match=message):
        add_word(pipe, TOWERS, placeholder, superclass)
    with pytest.raises(TokenError, match="vectors of '<cat\\*>': found 0, expected at least 1"):
        add_word(pipe, TOWERS, "<cat*>", "cat", vectors=0)
    assert pipe.tokenizer is tokenizer
    for word in words:
        word.remove()


def test_every_occurrence_is_marked_at_its_end() -> None:
    ids = torch.tensor([[9, 1, 2, 3, 1, 2], [1, 2, 1, 2, 9, 9], [2, 1, 3, 9, 9, 1]])
    marks = last_tokens(ids, [1, 2])
    assert marks.tolist() == [
        [False, False, True, False, False, True],
        [False, True, False, True, False, False],
        [False] * 6,
    ]
    assert not last_tokens(ids, [1] * 7).any()


def test_a_text_is_read_once_until_the_tokenizer_knows_more(pipe: StableDiffusionPipeline) -> None:
    memory, asked = TokenMemory(), []

    def read(text: str) -> list[int]:
        asked.append(text)
        return pipe.tokenizer(text).input_ids

    texts = ["a photo of <cat*>", "a cat"]
    before = memory.read(pipe.tokenizer, texts * 2, read)
    assert asked == texts and before[:2] == before[2:]
    word = add_word(pipe, TOWERS, "<cat*>", "cat")  # another tokenizer
    after = memory.read(pipe.tokenizer, texts, read)
    assert asked == texts * 2 and len(after[0]) < len(before[0]) and after[1] == before[1]
    pipe.tokenizer.add_tokens(["beach-ball"])  # the same one, with another word
    memory.read(pipe.tokenizer, texts[1:], read)
    pipe.tokenizer.model_max_length -= 1
    memory.read(pipe.tokenizer, texts[1:], read)
    pipe.tokenizer.model_max_length += 1
    assert asked[4:] == texts[1:] * 2
    word.remove()


def test_the_memory_of_texts_is_bounded(pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenMemory, "LIMIT", 3)
    memory = TokenMemory()
    for number in range(10):
        assert memory.read(pipe.tokenizer, [str(number), "again"], str) == [str(number), "again"]
        assert len(memory._known) <= 3


@pytest.mark.parametrize("own", [[], ["<mine>", "<yours>"]])
def test_a_taught_tokenizer_reads_the_rest_as_before(own: list[str]) -> None:
    """Also the words that a person added before."""
    pipe = tiny_pipeline()
    pipe.tokenizer.add_tokens(own)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    stock, texts = pipe.tokenizer, ["a photo of a teddy bear", f"Xyzzy, the {' '.join(own)} cat!", ""]
    before = stock(texts).input_ids
    word = add_word(pipe, TOWERS, "<cat*>", "cat", vectors=2)
    taught = pipe.tokenizer
    assert taught is not stock and taught(texts).input_ids == before == stock(texts).input_ids
    assert taught("a <cat*>").input_ids[2:-1] == [len(stock), len(stock) + 1]
    assert "<cat*>_0" not in stock.get_vocab()
    word.remove()
    assert pipe.tokenizer is stock


@pytest.mark.parametrize("placeholder", ["<é*>", "<É*>", "猫*", "<ß*>", "x" * 64])
def test_other_letters_are_taken(pipe: StableDiffusionPipeline, placeholder: str) -> None:
    for vectors in (1, 2):
        word = add_word(pipe, TOWERS, placeholder, "cat", vectors)
        first = len(pipe.tokenizer) - vectors
        assert sum(i >= first for i in pipe.tokenizer(f"a photo of {placeholder} in the snow").input_ids) == vectors
        word.remove()


def test_a_word_that_cannot_be_added_leaves_no_trace(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog = add_word(pipe, TOWERS, "<dog*>", "dog")
    known = dict(pipe.tokenizer.added_tokens_encoder)

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("perfusion.editing.tokens._teach", fail)
        with pytest.raises(RuntimeError):
            add_word(pipe, TOWERS, "<cat*>", "cat")
    table = pipe.text_encoder.get_input_embeddings()
    assert len(table.words) == 1 and dict(pipe.tokenizer.added_tokens_encoder) == known
    dog.remove()
