"""A concept beside attention processors that are not the model's own: IP-Adapter's, others of diffusers, a person's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from torch import Tensor

from perfusion.backbones.base import Backbone
from perfusion.concept import Concept
from perfusion.editing import EditError
from perfusion.methods.base import Word
from tests.concepts import tiny_sdxl_backbone, untrained_concept
from tests.drawing import CLOSED, PLAIN, PROMPT, call

PIXELS = 16  # width of an image's embedding
TOKENS = 4  # that IP-Adapter makes of an image


@pytest.fixture(scope="module")
def concept(backbone: Backbone) -> Concept:
    return untrained_concept(backbone, Word("<cat*>", "cat"), 0)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_sdxl_backbone(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def _as_before(backbone: Backbone) -> Iterator[None]:
    """The pipeline is left as it was."""
    before = call(backbone.pipe, PLAIN)
    yield
    backbone.pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(call(backbone.pipe, PLAIN), before)


def load_ip_adapter(pipe: Any) -> dict[str, Any]:
    """An IP-Adapter with random weights; what a call takes for its image."""
    draw = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=draw)

    width = pipe.unet.config.cross_attention_dim
    projections: dict[str, Tensor] = {}
    for name in (name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")):
        size = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
        number = len(projections) + 1  # 1, 3, 5, ...: self-attentions count
        projections[f"{number}.to_k_ip.weight"] = random(size, width)
        projections[f"{number}.to_v_ip.weight"] = random(size, width)
    image = {
        "proj.weight": random(TOKENS * width, PIXELS),
        "proj.bias": random(TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    weights = {"image_proj": image, "ip_adapter": projections}
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    return {"ip_adapter_image_embeds": [random(2, 1, PIXELS)]}


@pytest.mark.parametrize(
    ("model", "first", "key_lock"),  # every two of them together
    [
        ("backbone", "ip_adapter", "local"),
        ("backbone", "concept", "global"),
        ("sdxl", "ip_adapter", "global"),
        ("sdxl", "concept", "local"),
    ],
)
def test_an_ip_adapter_is_visible_beside_the_concept(
    request: pytest.FixtureRequest, model: str, first: str, key_lock: str
) -> None:
    backbone: Backbone = request.getfixturevalue(model)
    pipe: Any = backbone.pipe
    before = call(pipe, PLAIN)
    concept = untrained_concept(backbone, Word("<cat*>", "cat"), 0)
    with concept.attach(backbone, key_lock=key_lock):
        alone = call(pipe, PROMPT)
    if first == "ip_adapter":
        image = load_ip_adapter(pipe)
        attached = concept.attach(backbone, key_lock=key_lock)
    else:
        attached = concept.attach(backbone, key_lock=key_lock)
        image = load_ip_adapter(pipe)
    assert any(isinstance(p, IPAdapterAttnProcessor2_0) for p in pipe.unet.attn_processors.values())
    both = call(pipe, PROMPT, **image)
    assert (both - alone).abs().amax() > 1e-2, "the image is to be seen"
    attached.beta = CLOSED
    assert (both - call(pipe, PROMPT, **image)).abs().amax() > 1e-2, "the concept is to be seen"
    attached.beta = 0.4
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(call(pipe, PROMPT, **image), alone)
    pipe.unload_ip_adapter()
    torch.testing.assert_close(call(pipe, PROMPT), alone)
    attached.detach()
    assert torch.equal(call(pipe, PLAIN), before)


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_the_concept_stays_under_another_processor_that_calls_the_layers(
    backbone: Backbone, concept: Concept, processor: Callable[[], Any]
) -> None:
    pipe: Any = backbone.pipe
    with concept.attach(backbone):
        expected = call(pipe, PROMPT)
        pipe.unet.set_attn_processor(processor())
        torch.testing.assert_close(call(pipe, PROMPT), expected, atol=1e-4, rtol=1e-4)


class OwnKeys:
    """A processor that uses other keys and values than those that the edited layers give."""

    def __call__(
        self, attention: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **more: Any
    ) -> Tensor:
        return hidden_states


def custom_diffusion(attention: Attention) -> Any:
    return CustomDiffusionAttnProcessor2_0(
        hidden_size=attention.inner_dim, cross_attention_dim=attention.cross_attention_dim
    )


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("first", ["processor", "concept"])
@pytest.mark.parametrize("make", [lambda attention: OwnKeys(), custom_diffusion], ids=["own keys", "custom diffusion"])
def test_a_processor_that_leaves_the_edit_out_is_an_error(
    backbone: Backbone, concept: Concept, make: Callable[[Attention], Any], first: str
) -> None:
    pipe: Any = backbone.pipe
    if first == "concept":
        attached = concept.attach(backbone)
        expected = call(pipe, PROMPT)
        kind = put_into_one_attention(pipe, make)
    else:
        kind = put_into_one_attention(pipe, make)
        attached = concept.attach(backbone)
    found = rf"attn2\.to_k: found the concept's edit bypassed \(by the attention processor {kind}\)"
    with pytest.raises(EditError, match=found):
        call(pipe, PROMPT)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    drawn = call(pipe, PROMPT)
    if first == "concept":
        assert torch.equal(drawn, expected)
    attached.detach()


def put_into_one_attention(pipe: Any, make: Callable[[Attention], Any]) -> str:
    """A processor of `make` in the last cross-attention, and its name; all others stay."""
    name = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")][-1]
    attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
    attention.set_processor(made := make(attention))
    return type(made).__name__


@pytest.mark.usefixtures("_as_before")
def test_a_processor_may_reuse_what_it_computed_at_earlier_steps(backbone: Backbone, concept: Concept) -> None:
    """As those that skip cross-attention at some steps to save time."""
    pipe: Any = backbone.pipe

    class Lazy(AttnProcessor2_0):
        def __init__(self) -> None:
            super().__init__()
            self.known: dict[Attention, Tensor] = {}

        def __call__(self, attn: Attention, *args: Any, **more: Any) -> Tensor:  # type: ignore[override]
            if not attn.is_cross_attention:
                return super().__call__(attn, *args, **more)
            if attn not in self.known:
                self.known[attn] = super().__call__(attn, *args, **more)
            return self.known[attn]

    with concept.attach(backbone):
        expected = call(pipe, PROMPT)
        pipe.unet.set_attn_processor(Lazy())
        assert not torch.equal(call(pipe, PROMPT), expected)
