"""Concepts that were trained apart, in one model: Eq. 4, in any order, each with its own strength."""

import dataclasses
import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

from perfusion.backbones.base import Backbone
from perfusion.concept import Attached, Concept, ConceptFileError
from perfusion.editing import EditError
from perfusion.editing.equations import precision_times
from perfusion.editing.gate import edited_encoding
from perfusion.editing.layer import unedited
from perfusion.methods.base import Word, build
from tests.benches import Bench, snapshot
from tests.concepts import untrained_concept
from tests.drawing import CLOSED

pytestmark = pytest.mark.usefixtures("untouched")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@torch.no_grad()
def test_concepts_come_and_leave_in_any_order_and_the_last_one_leaves_nothing(order: tuple[int, ...]) -> None:
    """All of them are Eq. 4 in float64, which knows no order."""
    bench = Bench(3, torch.float64)
    modules, state, names = snapshot(bench.unet)
    plain = bench()
    alone = {}
    for j in range(3):
        edit = bench.attach_one(j)
        alone[j] = bench()
        edit.detach()
    edits = {j: bench.attach_one(j) for j in order}
    together, found = bench(), bench.projections()
    for site in bench.sites:
        torch.testing.assert_close(found[site.name], bench.closed_form(site), rtol=1e-9, atol=1e-9)
    edits[order[0]].detach()
    edits[order[1]].detach()
    edits[order[1]].detach()  # twice is as good as once
    assert torch.equal(bench(), alone[order[2]]) and not torch.equal(together, alone[order[2]])
    edits[order[2]].detach()
    after = snapshot(bench.unet)
    assert list(after[0].values()) == list(modules.values()) and after[2] == names
    assert all(torch.equal(after[1][name], tensor) for name, tensor in state.items())
    assert torch.equal(bench(), plain) and not bench.unet._forward_pre_hooks


@torch.no_grad()
def test_each_concept_has_its_own_strength_also_per_sample() -> None:
    bench = Bench(2, torch.float64)
    for j in range(2):
        bench.attach_one(j)
    front = torch.tensor([0.2, 0.9], dtype=torch.float64)
    bench.gates[0].beta, bench.gates[1].beta = front, 0.4
    bench.gates[1].tau = torch.tensor([0.3])
    together = bench()
    for k, beta in enumerate(front.tolist()):
        bench.gates[0].beta = beta
        torch.testing.assert_close(together[k], bench()[k], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(together[0], bench()[0])


@torch.no_grad()
def test_locked_and_trained_keys_can_be_mixed() -> None:
    bench = Bench(2, torch.float64, trained_keys=True)
    bench.all_outputs[1] |= {site.name: None for site in bench.sites if site.kind == "k"}
    for j in range(2):
        bench.attach_one(j)
    found = bench.projections()
    for site in bench.sites:
        torch.testing.assert_close(found[site.name], bench.closed_form(site), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("degrees", [2.0, 0.1, 0.0])
@torch.no_grad()
def test_concepts_that_point_the_same_way_stay_stable(degrees: float) -> None:
    """In float32; what they share is taken out of the encoding once, not twice and not a thousandfold."""
    bench = Bench(2)
    one, two = bench.gates
    turn = torch.tensor(degrees).deg2rad()
    two.move(
        one.target_inputs * turn.cos() + two.target_inputs * turn.sin(),
        one.directions * turn.cos() + two.directions * turn.sin(),
    )
    alone = edited_encoding([one], bench.context)
    both = bench.encoding()
    assert both.remainder.isfinite().all()
    if degrees == 0:
        torch.testing.assert_close(both.remainder, alone.remainder, rtol=1e-3, atol=1e-3)
    assert both.remainder.norm() < 2 * bench.context.norm()
    assert one.similarity(both.remainder).abs().max() < 1e-2  # nothing of it is left


# --- concepts in a pipeline -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(backbone: Backbone) -> tuple[Concept, Concept]:
    words = (Word("<bear*>", "teddy bear"), Word("<mug*>", "mug"))
    bear, mug = (untrained_concept(backbone, word, seed) for seed, word in enumerate(words))
    return bear, mug


def draw_latents(backbone: Backbone, prompt: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return backbone.pipe(prompt, generator=generator, num_inference_steps=2, output_type="latent").images


BOTH = "a photo of a <bear*> and a <mug*> on the beach"


def test_two_concepts_in_one_picture_in_either_order(backbone: Backbone, pair: tuple[Concept, Concept]) -> None:
    bear, mug = pair
    with bear.attach(backbone), mug.attach(backbone):
        one = draw_latents(backbone, BOTH)
    with mug.attach(backbone.pipe), bear.attach(backbone.pipe):
        other = draw_latents(backbone, BOTH)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    with bear.attach(backbone):
        without = draw_latents(backbone, BOTH.replace("<mug*>", "mug"))
    assert (one - without).abs().max() > 0.01
    mug_gone = mug.attach(backbone)
    with bear.attach(backbone):
        mug_gone.detach()
        assert torch.equal(draw_latents(backbone, BOTH.replace("<mug*>", "mug")), without)


TWICE = "<bear*> and <bear*> next to <polar*>"


def test_two_of_one_superclass_and_one_twice_in_a_prompt(backbone: Backbone, pair: tuple[Concept, Concept]) -> None:
    """Each has its part in every K and V wherever its word stands, and in the picture; even these, whose i* are one."""
    bear, _ = pair
    other = untrained_concept(backbone, Word("<polar*>", "teddy bear"), 5)
    with bear.attach(backbone) as first:
        with pytest.warns(UserWarning, match="nearly one"):
            second = other.attach(backbone)
        with second:
            ids = backbone.pipe.tokenizer(TWICE, padding="max_length").input_ids  # type: ignore[attr-defined]
            places = {a: [k for k, i in enumerate(ids) if i == id_of(backbone, a)] for a in (first, second)}
            assert [len(found) for found in places.values()] == [2, 1]
            open_both, whole = edited(backbone, TWICE), draw_latents(backbone, TWICE)
            pictures = [whole]
            for attached, at in places.items():
                own, attached.beta = attached.beta, CLOSED
                for name, (plain, found) in edited(backbone, TWICE).items():
                    assert torch.equal(plain, open_both[name][0])  # the prompt is read as before
                    share = (open_both[name][1] - found)[at].abs().amax(-1)
                    assert (share > 0.01).all(), f"{name}: {attached.concept.placeholder} adds {share}"
                    assert ((open_both[name][1] - plain)[at].abs().amax(-1) > 0.01).all(), name
                pictures.append(draw_latents(backbone, TWICE))
                attached.beta = float("inf")
                pictures.append(draw_latents(backbone, TWICE))
                attached.beta = own
            assert torch.equal(draw_latents(backbone, TWICE), whole)
            second.detach()
            pictures.append(draw_latents(backbone, TWICE.replace("<polar*>", "teddy bear")))
    for one, two in itertools.combinations(pictures[:-1], 2):
        assert (one - two).abs().max() > 0.01
    torch.testing.assert_close(pictures[-1], pictures[-2], rtol=1e-3, atol=1e-3)  # left out is as good as not there


def id_of(backbone: Backbone, attached: Attached) -> int:
    """Of a concept's word with one vector."""
    tokenizer = backbone.pipe.tokenizer  # type: ignore[attr-defined]
    return tokenizer.convert_tokens_to_ids(attached.concept.placeholder)


@torch.no_grad()
def edited(backbone: Backbone, prompt: str) -> dict[str, tuple[Tensor, Tensor]]:
    """For each site what the projection of the prompt is without the edit, and with it: (N, h) each."""
    context = backbone.encode([prompt], None).context
    sites = {site.name: site.projection for site in backbone.edit_sites()}
    return {name: (unedited(layer)(context)[0], layer(context)[0]) for name, layer in sites.items()}


def test_concepts_with_other_covariances_do_not_mix(backbone: Backbone, pair: tuple[Concept, Concept]) -> None:
    bear, mug = pair
    foreign = dataclasses.replace(mug, covariance="everyday:10000:0.01", source="mug.safetensors")
    message = r"mug\.safetensors: found the covariance everyday:10000:0\.01 .* expected everyday:50:0\.01"
    with bear.attach(backbone), pytest.raises(ConceptFileError, match=message):
        foreign.attach(backbone)
    with foreign.attach(backbone):  # alone it is welcome
        pass


def test_twins_are_warned_of(backbone: Backbone, pair: tuple[Concept, Concept]) -> None:
    bear, mug = pair
    twin = dataclasses.replace(bear, placeholder="<twin*>")
    with bear.attach(backbone):
        with pytest.warns(UserWarning, match=r"<twin\*> and <bear\*> are nearly one .* angle of their i\* 0\.0°"):
            attached = twin.attach(backbone)
        assert draw_latents(backbone, "<bear*> and <twin*>").isfinite().all()
        attached.detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mug.attach(backbone).detach()


@pytest.mark.parametrize("degrees", [5, 15])
def test_near_twins_are_warned_of_and_others_are_not(
    backbone: Backbone, pair: tuple[Concept, Concept], degrees: int
) -> None:
    """The angle is that of the C⁻¹ metric."""
    bear, _ = pair
    factor, turn = backbone.second_moment(), math.radians(degrees)
    one = bear.tensors["target_input"].double()
    other = torch.randn(len(one), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = precision_times(factor, one)
    other -= (other @ direction) / (one @ direction) * one
    other *= ((one @ direction) / (other @ precision_times(factor, other))).sqrt()
    turned = math.cos(turn) * one + math.sin(turn) * other
    near = {"target_input": turned.float(), "direction": precision_times(factor, turned).float()}
    twin = dataclasses.replace(bear, placeholder="<twin*>", tensors={**bear.tensors, **near})
    exact = dataclasses.replace(bear, tensors={**bear.tensors, "direction": direction.float()})
    with warnings.catch_warnings(record=True) as found, exact.attach(backbone):
        warnings.simplefilter("always")
        twin.attach(backbone).detach()
    said = [str(warning.message) for warning in found]
    expected = "<twin*> and <bear*> are nearly one to the text encoder: angle of their i* 5.0°, expected 10° or more"
    assert [text.startswith(expected) for text in said] == ([True] if degrees == 5 else [])


def test_a_concept_in_training_is_alone(backbone: Backbone, pair: tuple[Concept, Concept]) -> None:
    method = build({"name": "perfusion"}, Word("<new*>", "cat"))
    with pair[0].attach(backbone), pytest.raises(EditError, match="found an edit, expected none"):
        method.attach(backbone)
    method.attach(backbone)
    with pytest.raises(EditError, match="found an edit, expected none"):
        pair[0].attach(backbone)
    method.detach()
