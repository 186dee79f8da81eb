"""β = inf: a concept that is attached and left out of a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from perfusion.backbones.base import Backbone
from perfusion.concept import Concept
from perfusion.editing import EditError
from perfusion.methods.base import Word
from tests.backbone_kinds import BEYOND, loaded
from tests.concepts import Snapshot, tiny_backbone, tiny_sdxl_backbone, untrained_concept
from tests.drawing import own_size

PROMPT = "a photo of a {} on the beach"
SUPERCLASS = "teddy bear"  # two tokens in the place of one


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("covariance")
    others = {kind: loaded(kind, folder) for kind in BEYOND}
    return {"sd": tiny_backbone(folder), "sdxl": tiny_sdxl_backbone(folder), **others}


@pytest.fixture(params=["sd", "sdxl", *BEYOND])
def backbone(backbones: dict[str, Backbone], request: pytest.FixtureRequest) -> Iterator[Backbone]:
    """One of them; no hook is left in it."""
    found = backbones[request.param]
    bear(found)  # transformers keeps hooks of its own from the first call that asks for hidden states
    draw(found, "a cat")
    before = Snapshot(found.pipe)
    yield found
    assert before.differences() == []


def bear(backbone: Backbone) -> Concept:
    return untrained_concept(backbone, Word("<bear*>", SUPERCLASS), 0)


def mug(backbone: Backbone) -> Concept:
    return untrained_concept(backbone, Word("<mug*>", "mug"), 1)


def draw(backbone: Backbone, *prompts: str, **settings: Any) -> Tensor:
    """Latents, one for each prompt, all of the same noise."""
    generators = [
        torch.Generator().manual_seed(0) for _ in range(len(prompts) * settings.get("num_images_per_prompt", 1))
    ]
    pipe: Any = backbone.pipe
    settings = {"num_inference_steps": 2, "output_type": "latent"} | own_size(pipe) | settings
    return pipe(list(prompts), generator=generators, **settings).images


@pytest.mark.parametrize(
    ("key_lock", "text"),
    [("local", "{}"), ("local", PROMPT), ("global", PROMPT), ("global", "a {} and a {}")],
)
def test_a_concept_left_out_gives_the_base_models_picture_to_the_bit(
    backbone: Backbone, key_lock: str, text: str
) -> None:
    expected = draw(backbone, text.replace("{}", SUPERCLASS))
    prompt = text.replace("{}", "<bear*>")
    with bear(backbone).attach(backbone, key_lock=key_lock, beta=0.4) as attached:
        before = draw(backbone, prompt)
        assert (before - expected).abs().amax() > 1e-2
        attached.beta = math.inf
        assert torch.equal(draw(backbone, prompt), expected)
        attached.beta = 0.4
        assert torch.equal(draw(backbone, prompt), before)


def test_each_sample_for_itself(backbone: Backbone) -> None:
    plain, own = PROMPT.format(SUPERCLASS), PROMPT.format("<bear*>")
    base = draw(backbone, plain, plain)
    with bear(backbone).attach(backbone, beta=0.4) as attached:
        both = draw(backbone, own, own)
        attached.beta = torch.tensor([math.inf, 0.4])
        mixed = draw(backbone, own, own)
        assert torch.equal(mixed[0], base[0])
        torch.testing.assert_close(mixed[1], both[1])
        assert torch.equal(draw(backbone, plain, plain)[0], base[0])
        with pytest.raises(EditError, match="beta: found 2 values for a batch of 1 rows, expected a divisor"):
            draw(backbone, own, num_images_per_prompt=2)


@pytest.mark.parametrize("key_lock", ["local", "global"])
def test_the_others_stay(backbone: Backbone, key_lock: str) -> None:
    """Of two concepts the one that is left out might as well not be attached."""
    left, stays = bear(backbone), mug(backbone)
    with stays.attach(backbone, key_lock=key_lock):
        alone = draw(backbone, f"a <mug*> and a {SUPERCLASS}")
    with left.attach(backbone, key_lock=key_lock) as first, stays.attach(backbone, key_lock=key_lock):
        both = draw(backbone, "a <mug*> and a <bear*>")
        first.beta = math.inf
        found = draw(backbone, "a <mug*> and a <bear*>")
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
        assert (found - both).abs().amax() > 1e-2


def test_all_of_several_left_out(backbone: Backbone) -> None:
    expected = draw(backbone, f"a mug and a {SUPERCLASS}")
    first, second = bear(backbone), mug(backbone)
    with first.attach(backbone, beta=math.inf), second.attach(backbone, beta=math.inf):
        assert torch.equal(draw(backbone, "a <mug*> and a <bear*>"), expected)


def test_leaving_out_again_and_again_leaves_nothing_behind(backbone: Backbone) -> None:
    with bear(backbone).attach(backbone) as attached:
        before = Snapshot(backbone.pipe)
        undo = len(attached.method._undo._exit_callbacks)  # type: ignore[attr-defined]
        for beta in (math.inf, torch.tensor([math.inf, 0.4]), math.inf, 0.4):
            attached.beta = beta
            assert before.differences() == []
            assert len(attached.method._undo._exit_callbacks) == undo  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", [math.nan, -math.inf, torch.tensor([0.5, -math.inf])])
def test_no_other_infinity(backbone: Backbone, wrong: float | Tensor) -> None:
    with (
        bear(backbone).attach(backbone) as attached,
        pytest.raises(EditError, match="expected finite values, or inf to leave the concept out"),
    ):
        attached.beta = wrong
