"""Global key-locking: all keys are those of the prompt with the superclass in the concept's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from perfusion.backbones.base import Backbone
from perfusion.concept import Concept
from perfusion.editing import EditError
from perfusion.editing.reading import replace_words
from perfusion.editing.tokens import token_ids
from perfusion.editing.words import add_word
from perfusion.methods.base import Word, build
from tests.concepts import untrained_concept
from tests.pipelines import sd21_folder

B, E = 1, 9  # beginning, end and padding
P = 3  # padding, where it is not the end
pytestmark = pytest.mark.usefixtures("untouched")


@pytest.mark.parametrize(
    ("pad", "ids", "pairs", "new", "where"),
    [
        (E, [B, 4, 50, 5, E, E, E], [([50], [7])], [B, 4, 7, 5, E, E, E], [0, 1, 2, 3, 4, 5, 6]),
        # The last token of "teddy bear" stands for the word; what follows moves on.
        (E, [B, 4, 50, 5, E, E, E], [([50], [7, 8])], [B, 4, 7, 8, 5, E, E], [0, 1, 3, 4, 5, 6, 6]),
        (E, [B, 50, 51, 52, 5, E, E], [([50, 51, 52], [7])], [B, 7, 5, E, E, E, E], [0, 1, 1, 1, 2, 3, 4]),
        (E, [B, 50, 51, 5, E, E, E], [([50, 51], [6, 7, 8])], [B, 6, 7, 8, 5, E, E], [0, 2, 3, 4, 5, 6, 6]),
        (E, [B, 50, 60, 50, E], [([50], [7]), ([60], [8])], [B, 7, 8, 7, E], [0, 1, 2, 3, 4]),
        # Full to the end: the end of text stays the last token.
        (E, [B, 50, 4, 5, E], [([50], [7, 8])], [B, 7, 8, 4, E], [0, 2, 3, 4, 4]),
        (E, [B, 4, 5, E, E], [([50], [7, 8])], [B, 4, 5, E, E], [0, 1, 2, 3, 4]),
        # With padding of its own, as in SD 2.x and the second text encoder of SDXL, which pools at the end of text.
        # The end stays where it is. Longer by as much as there was padding, and by more.
        (P, [B, 4, 50, 5, E, P], [([50], [7, 8])], [B, 4, 7, 8, 5, E], [0, 1, 3, 4, 5, 5]),
        (P, [B, 4, 50, 5, E, P], [([50], [6, 7, 8])], [B, 4, 6, 7, 8, E], [0, 1, 4, 5, 5, 5]),
        (P, [B, 4, 50, 5, E], [([50], [7, 8])], [B, 4, 7, 8, E], [0, 1, 3, 4, 4]),
        # Shorter, where there was no padding.
        (P, [B, 50, 51, 5, E], [([50, 51], [7])], [B, 7, 5, E, P], [0, 1, 1, 2, 3]),
        # What pads may be a word as well.
        (P, [B, 50, P, E, P, P], [([50], [7, 8])], [B, 7, 8, P, E, P], [0, 2, 3, 4, 5, 5]),
    ],
)
def test_words_are_replaced_and_positions_follow(pad, ids, pairs, new, where) -> None:
    assert replace_words(ids, pairs, E, pad) == (new, where)


@pytest.mark.parametrize("spare", [-1, 0, 1, 10])
def test_a_prompt_with_its_superclass_reads_as_though_it_had_been_written(tmp_path: Path, spare: int) -> None:
    """By a tokenizer with padding of its own, with `spare` positions left beside the superclass."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd21_folder(tmp_path))
    assert pipe.tokenizer.pad_token_id != pipe.tokenizer.eos_token_id
    on = " on" * (pipe.tokenizer.model_max_length - 4 - spare)
    read = lambda text: pipe.tokenizer(text, padding="max_length", truncation=True).input_ids  # noqa: E731
    plain = read("teddy bear" + on)
    add_word(pipe, {"text_encoder": "tokenizer"}, "<bear*>", "teddy bear")
    bear, teddy = (token_ids(pipe.tokenizer, text) for text in ("<bear*>", "teddy bear"))
    end, pad = pipe.tokenizer.eos_token_id, pipe.tokenizer.pad_token_id
    assert replace_words(read("<bear*>" + on), [(bear, teddy)], end, pad)[0] == plain


@pytest.fixture(scope="module")
def bear(backbone: Backbone) -> Concept:
    return untrained_concept(backbone, Word("<bear*>", "teddy bear"), 0)


def draw(backbone: Backbone, *prompts: str, **settings) -> Tensor:
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    settings = {"num_inference_steps": 2, "output_type": "latent"} | settings
    return backbone.pipe(list(prompts), generator=generators, **settings).images


def projected(backbone: Backbone, kind: str, *prompts: str, **settings) -> list[Tensor]:
    """What every K, or every V, projection gives in a picture's first step: (2 n, N, h), the empty prompts first."""
    found: list[Tensor] = []
    hooks = [
        site.projection.register_forward_hook(lambda module, args, output: found.append(output.clone()))
        for site in backbone.edit_sites()
        if site.kind == kind
    ]
    draw(backbone, *prompts, num_inference_steps=1, **settings)
    for hook in hooks:
        hook.remove()
    return found


PROMPT, PLAIN = "a photo of a <bear*> on the beach", "a photo of a teddy bear on the beach"


def test_all_keys_are_the_superclass_prompt_s_and_no_value_is(backbone: Backbone, bear: Concept) -> None:
    plain = projected(backbone, "k", PLAIN)
    with bear.attach(backbone, key_lock="local") as attached:
        values, local = projected(backbone, "v", PROMPT), projected(backbone, "k", PROMPT)
        attached.key_lock = "global"
        keys = projected(backbone, "k", PROMPT)
        assert all(torch.equal(a, b) for a, b in zip(projected(backbone, "v", PROMPT), values, strict=True))
    length = len(backbone.pipe.tokenizer(PROMPT).input_ids) + 1  # <bear*> is one token, teddy bear two
    bear_at = backbone.pipe.tokenizer(PLAIN).input_ids.index(backbone.pipe.tokenizer("bear").input_ids[1])
    for own, theirs, locked in zip(keys, plain, local, strict=True):
        assert torch.equal(own[0], theirs[0])  # the empty prompt of guidance
        assert torch.equal(own[1, : bear_at - 1], theirs[1, : bear_at - 1])
        torch.testing.assert_close(own[1, bear_at - 1 : length], theirs[1, bear_at : length + 1])
        assert (locked[1] - own[1]).abs().max() > 1e-3


def test_a_new_word_that_learned_nothing_draws_the_superclass_s_keys(backbone: Backbone) -> None:
    """With one token for one, global locking gives the keys of the plain prompt bit for bit."""
    method = build({"name": "perfusion", "key_lock": "global"}, Word("<cat*>", "cat")).train()
    method.attach(backbone)
    concept = Concept.of(method, backbone, 0)
    method.detach()
    plain = projected(backbone, "k", "a photo of a cat on the beach")
    with concept.attach(backbone) as attached:
        assert attached.key_lock == "global"  # as its settings say
        keys = projected(backbone, "k", "a photo of a <cat*> on the beach")
    assert all(torch.equal(own, theirs) for own, theirs in zip(keys, plain, strict=True))


@pytest.mark.parametrize(("superclass", "vectors"), [("cat", 1), ("teddy bear", 2)])
def test_local_and_global_locking_agree_where_they_must(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, superclass: str, vectors: int
) -> None:
    """A concept as it starts, in a prompt that is nothing but its word, with s from the prompt that is nothing but the
    superclass: there e = i* = s, and an open gate gives W (e − i*) + W s = W s, which is the global key."""
    word = Word("<new*>", superclass)

    def keys(key_lock: str, beta: float) -> list[Tensor]:
        with untrained_concept(backbone, word, 0, vectors=vectors).attach(backbone, key_lock=key_lock, beta=beta) as a:
            a.method.load_state({**a.method.state(), **start})
            return [row[1] for row in projected(backbone, "k", "<new*>")]

    monkeypatch.setattr("perfusion.methods.perfusion.templates", lambda name: ("{}",))
    start = at_the_start(backbone, word)
    everywhere, near, closed = keys("global", -99), keys("local", -99), keys("local", 99)
    for whole, local, without in zip(everywhere, near, closed, strict=True):
        torch.testing.assert_close(local[vectors], whole[vectors], rtol=1e-4, atol=1e-5)
        assert (local[0] - whole[0]).abs().max() > 0.01  # where the concept is not
        assert (without[vectors] - whole[vectors]).abs().max() > 0.01
    monkeypatch.undo()
    for whole, local in zip(everywhere, keys("local", -99), strict=True):  # s of other prompts: elsewhere
        assert (local[vectors] - whole[vectors]).abs().max() > 0.01


def at_the_start(backbone: Backbone, word: Word) -> dict[str, Tensor]:
    """i* and its direction before training, and vectors with which the word reads as its superclass does."""
    method = build({"name": "perfusion"}, word).train()
    method.attach(backbone)
    state = method.state()
    method.detach()
    token = backbone.add_token(word.placeholder, word.superclass, None)
    vectors = {f"embedding.{name}": value.detach().clone() for name, value in token.embeddings().items()}
    token.remove()
    return {"target_input": state["target_input"], "direction": state["direction"], **vectors}


def test_prompts_without_the_concept_keep_their_keys(backbone: Backbone, bear: Concept) -> None:
    prompts = ["a cat in the snow", PROMPT]
    plain = projected(backbone, "k", *prompts[:1])
    with bear.attach(backbone, key_lock="global"):
        keys = projected(backbone, "k", *prompts)
    for own, theirs in zip(keys, plain, strict=True):
        torch.testing.assert_close(own[2], theirs[1], rtol=1e-4, atol=1e-5)


def test_a_negative_prompt_with_the_concept_is_locked_too(backbone: Backbone, bear: Concept) -> None:
    with bear.attach(backbone, key_lock="global"):
        keys = projected(backbone, "k", "a cat in the snow", negative_prompt=[PROMPT])
        expected = projected(backbone, "k", PROMPT)
    for own, theirs in zip(keys, expected, strict=True):
        torch.testing.assert_close(own[0], theirs[1], rtol=1e-4, atol=1e-5)


def test_several_concepts_are_all_replaced_and_must_agree(backbone: Backbone, bear: Concept) -> None:
    mug = untrained_concept(backbone, Word("<mug*>", "mug"), 1)
    plain = projected(backbone, "k", "a mug and a teddy bear")
    with bear.attach(backbone, key_lock="global") as first, mug.attach(backbone) as second:
        with pytest.raises(EditError, match="global and with local key-locking attached together"):
            draw(backbone, "a <mug*> and a <bear*>")
        second.key_lock = "global"
        keys = projected(backbone, "k", "a <mug*> and a <bear*>")
        first.key_lock = second.key_lock = "local"
        local = draw(backbone, PROMPT)
    with mug.attach(backbone), bear.attach(backbone):
        torch.testing.assert_close(draw(backbone, PROMPT), local, rtol=1e-3, atol=1e-3)
    for own, theirs in zip(keys, plain, strict=True):
        torch.testing.assert_close(own[1, :4], theirs[1, :4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("later", [False, True], ids=["set while attaching", "set later"])
def test_when_the_one_that_was_locked_globally_leaves_the_others_stay_locked_locally(
    backbone: Backbone, bear: Concept, later: bool
) -> None:
    mug = untrained_concept(backbone, Word("<mug*>", "mug"), 1)
    with bear.attach(backbone):
        local = draw(backbone, PROMPT)
        other = mug.attach(backbone, key_lock=None if later else "global")
        other.key_lock = "global"
        other.detach()
        assert torch.equal(draw(backbone, PROMPT), local)
        with pytest.raises(EditError):
            mug.attach(backbone, key_lock="global", beta=float("nan"))
        assert torch.equal(draw(backbone, PROMPT), local)


def test_switching_back_gives_the_same_picture(backbone: Backbone, bear: Concept) -> None:
    with bear.attach(backbone) as attached:
        local = draw(backbone, PROMPT)
        attached.key_lock = "global"
        whole = draw(backbone, PROMPT)
        assert torch.equal(draw(backbone, PROMPT), whole) and not torch.equal(whole, local)
        attached.key_lock = "local"
        assert torch.equal(draw(backbone, PROMPT), local)


@pytest.mark.parametrize("beta", [0.5, 0.95, 3.0])
@pytest.mark.parametrize("scale", [1.001, 0.6])
def test_encodings_from_elsewhere_are_refused(backbone: Backbone, bear: Concept, beta: float, scale: float) -> None:
    """However far the gate is open."""
    with bear.attach(backbone, key_lock="global", beta=beta):
        encoded = backbone.pipe.encode_prompt(PROMPT, torch.device("cpu"), 1, False)[0]
        with pytest.raises(EditError, match="key_lock=global: found an encoding that the pipeline's text encoder did"):
            draw_embeddings(backbone, encoded * scale)
        assert draw_embeddings(backbone, encoded).isfinite().all()  # as it came from the text encoder
        assert draw_embeddings(backbone, torch.zeros_like(encoded)).isfinite().all()


def draw_embeddings(backbone: Backbone, encoded: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return backbone.pipe(
        prompt_embeds=encoded, generator=generator, num_inference_steps=1, output_type="latent", guidance_scale=1.0
    ).images


def test_trained_keys_cannot_be_locked(backbone: Backbone, bear: Concept) -> None:
    free = untrained_concept(backbone, Word("<free*>", "cat"), 2, key_lock="none")
    with free.attach(backbone) as attached:
        assert attached.key_lock == "none"
        with pytest.raises(EditError, match="found 'global', expected none, since it was trained with keys"):
            attached.key_lock = "global"
    with bear.attach(backbone) as attached, pytest.raises(EditError, match="found 'none', expected local or global"):
        attached.key_lock = "none"


def test_training_with_global_locking_is_training_with_local_locking(backbone: Backbone) -> None:
    """And what is drawn in between, in eval mode, is drawn as the concept will be."""
    states = []
    for key_lock in ("local", "global"):
        method = build({"name": "perfusion", "key_lock": key_lock}, Word("<cat*>", "cat")).train()
        method.attach(backbone)
        states.append({name: value.shape for name, value in method.state().items()})
        assert method.key_lock == "local"
        assert method.eval().key_lock == key_lock and method.train().key_lock == "local"
        method.detach()
    assert states[0] == states[1]
    assert not any(isinstance(m, nn.Module) and m._forward_hooks for m in backbone.pipe.text_encoder.modules())
