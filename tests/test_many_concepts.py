"""Concepts that were trained apart, in one model: Eq. 4, in any order, each with its own strength."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from perfusion.backbones.base import Backbone
from perfusion.concept import Attached, Concept
from perfusion.concept_format import ConceptFileError
from perfusion.editing import EditError
from perfusion.editing.equations import precision_times
from perfusion.editing.gate import JointGate, PromptGate
from perfusion.editing.layer import Edit, EditedProjection, attach_edit, unedited
from perfusion.editing.places import EditSite
from perfusion.methods.base import Word, build
from tests.benches import BETA, TAU, Bench, snapshot
from tests.concepts import tiny_backbone, untrained_concept
from tests.drawing import CLOSED


class Apart:
    """The J concepts of a `Bench`, each with a gate and target outputs of its own."""

    def __init__(self, count: int, dtype: torch.dtype = torch.float64, trained_keys: tuple[bool, ...] = ()) -> None:
        self.bench = Bench(count, dtype, trained_keys=any(trained_keys))
        keys = trained_keys or (False,) * count
        whole = self.bench.gate
        self.gates, self.outputs = [], []
        for j in range(count):
            rows = slice(j, j + 1)
            parts = (whole.target_inputs[rows], whole.directions[rows] * 3.0**j, whole.superclass_inputs[rows])
            self.gates.append(PromptGate(*parts, BETA, TAU))
            self.outputs.append({site.name: self._own(site, rows, keys[j]) for site in self.bench.sites})

    def _own(self, site: EditSite, rows: slice, trained_keys: bool) -> nn.Parameter | None:
        joint = self.bench.outputs[site.name]
        if joint is None or (site.kind == "k" and not trained_keys):
            return None
        return nn.Parameter(joint.detach()[rows])

    def attach(self, j: int, join: bool = True) -> Edit:
        return attach_edit(self.bench.sites, self.bench.unet, self.gates[j], self.outputs[j], join=join)


@pytest.mark.parametrize("count", range(2, 9))
@torch.no_grad()
def test_concepts_attached_one_by_one_equal_equation_4_in_float64(count: int) -> None:
    apart = Apart(count)
    for j in range(count):
        apart.attach(j)
    found = apart.bench.projections()
    for site in apart.bench.sites:
        torch.testing.assert_close(found[site.name], apart.bench.closed_form(site), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_order_does_not_matter() -> None:
    results = []
    for order in itertools.permutations(range(3)):
        apart = Apart(3)
        for j in order:
            apart.attach(j)
        results.append(apart.bench())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@torch.no_grad()
def test_concepts_leave_in_any_order_and_the_last_one_leaves_nothing(order: tuple[int, ...]) -> None:
    apart = Apart(3)
    modules, state, names = snapshot(apart.bench.unet)
    plain = apart.bench()
    alone = {}
    for j in range(3):
        edit = apart.attach(j)
        alone[j] = apart.bench()
        edit.detach()
    edits = [apart.attach(j) for j in range(3)]
    together = apart.bench()
    edits[order[0]].detach()
    edits[order[1]].detach()
    edits[order[1]].detach()  # twice is as good as once
    assert torch.equal(apart.bench(), alone[order[2]]) and not torch.equal(together, alone[order[2]])
    edits[order[2]].detach()
    after = snapshot(apart.bench.unet)
    assert list(after[0].values()) == list(modules.values()) and after[2] == names
    assert all(torch.equal(after[1][name], tensor) for name, tensor in state.items())
    assert torch.equal(apart.bench(), plain) and not apart.bench.unet._forward_pre_hooks


@torch.no_grad()
def test_each_concept_has_its_own_strength_also_per_sample() -> None:
    apart = Apart(2)
    for j in range(2):
        apart.attach(j)
    front = torch.tensor([0.2, 0.9], dtype=torch.float64)
    apart.gates[0].beta, apart.gates[1].beta = front, 0.4
    apart.gates[1].tau = torch.tensor([[0.3]])
    together = apart.bench()
    for k, beta in enumerate(front.tolist()):
        apart.gates[0].beta = beta
        torch.testing.assert_close(together[k], apart.bench()[k], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(together[0], apart.bench()[0])


@torch.no_grad()
def test_nothing_stale_is_reused() -> None:
    apart = Apart(2)
    for j in range(2):
        apart.attach(j)
    gate, (name, own) = apart.gates[1], next((n, o) for n, o in apart.outputs[1].items() if o is not None)
    changes = {
        "beta": lambda: setattr(gate, "beta", 0.1),
        "tau": lambda: setattr(gate, "tau", 0.5),
        "target inputs": lambda: gate.move(gate.target_inputs * 1.5, gate.directions),
        "in place": lambda: (gate.superclass_inputs.mul_(1.5), gate.forget()),
        name: lambda: (own.mul_(2), gate.forget()),
    }
    before = apart.bench()
    assert torch.equal(apart.bench(), before)
    calls = []
    projection = apart.bench.sites[0].projection
    assert isinstance(projection, EditedProjection)
    projection.base_layer.register_forward_hook(lambda *_: calls.append(None))
    assert torch.equal(apart.bench(), before) and not calls  # kept from the call before
    for what, change in changes.items():
        change()
        after = apart.bench()
        assert not torch.equal(after, before), what
        before = after


@torch.no_grad()
def test_locked_and_trained_keys_can_be_mixed() -> None:
    apart = Apart(2, trained_keys=(True, False))
    for j in range(2):
        apart.attach(j)
    found = apart.bench.projections()
    for site in apart.bench.sites:
        if site.kind == "k":  # the closed form's outputs: trained for the first, W s for the second
            joint = apart.bench.outputs[site.name]
            assert joint is not None
            joint[1] = apart.bench.s[1] @ site.projection.weight.T
        torch.testing.assert_close(found[site.name], apart.bench.closed_form(site), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("degrees", [2.0, 0.1, 0.0])
@torch.no_grad()
def test_concepts_that_point_the_same_way_stay_stable(degrees: float) -> None:
    """In float32; what they share is taken out of the encoding once, not twice and not a thousandfold."""
    apart = Apart(2, torch.float32)
    one, two = apart.gates
    turn = torch.tensor(degrees).deg2rad()
    two.move(
        one.target_inputs * turn.cos() + two.target_inputs * turn.sin(),
        one.directions * turn.cos() + two.directions / 3 * turn.sin(),
    )
    alone = one(apart.bench.context)
    both = JointGate([one, two])(apart.bench.context)
    assert both.remainder.isfinite().all()
    if degrees == 0:
        torch.testing.assert_close(both.remainder, alone.remainder, rtol=1e-3, atol=1e-3)
    assert both.remainder.norm() < 2 * apart.bench.context.norm()
    assert one.similarity(both.remainder).abs().max() < 1e-2  # nothing of it is left


@torch.no_grad()
def test_an_edit_in_training_is_alone() -> None:
    apart = Apart(2)
    first = apart.attach(0, join=False)
    with pytest.raises(EditError, match="found an edit, expected none"):
        apart.attach(1)
    first.detach()
    apart.attach(0)
    with pytest.raises(EditError, match="found an edit, expected none"):
        apart.attach(1, join=False)


# --- concepts in a pipeline -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("covariance"))


@pytest.fixture(scope="module")
def pair(backbone: Backbone) -> tuple[Concept, Concept]:
    return untrained_concept(backbone, Word("<bear*>", "teddy bear"), 0), untrained_concept(
        backbone, Word("<mug*>", "mug"), 1
    )


@pytest.fixture(autouse=True)
def untouched(backbone: Backbone) -> Iterator[None]:
    def things() -> list[int]:
        roots = (backbone.pipe.unet, backbone.pipe.text_encoder)
        return [id(backbone.pipe.tokenizer), *(id(module) for root in roots for module in root.modules())]

    before = things()
    yield
    assert things() == before


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


def test_the_second_has_its_own_strength(backbone: Backbone, pair: tuple[Concept, Concept]) -> None:
    bear, mug = pair
    with bear.attach(backbone, beta=0.3) as first, mug.attach(backbone, beta=0.9) as second:
        before = draw_latents(backbone, BOTH)
        assert (first.beta, second.beta) == (0.3, 0.9)
        second.beta = 0.1
        assert first.beta == 0.3 and not torch.equal(draw_latents(backbone, BOTH), before)


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
    factor, turn = backbone.second_moment().factor, math.radians(degrees)
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


def test_no_concept_joins_one_in_training(backbone: Backbone, pair: tuple[Concept, Concept]) -> None:
    method = build({"name": "perfusion"}, Word("<new*>", "cat"))
    method.attach(backbone)
    with pytest.raises(EditError, match="found an edit, expected none"):
        pair[0].attach(backbone)
    method.detach()
