"""An edit together with what diffusers, PEFT and torch do to the same projections."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from peft import LoraConfig
from torch import Tensor, nn

from perfusion.backbones.latent_diffusion import edit_sites_of
from perfusion.editing import EditError
from perfusion.editing.equations import low_rank_update
from perfusion.editing.layer import EditedProjection, attach_edit
from perfusion.editing.places import base_module
from tests.benches import B, Bench, D
from tests.pipelines import Compiled


@pytest.fixture
def bench() -> Bench:
    return Bench()


@torch.no_grad()
def test_lora_goes_around_the_edit_and_stays_when_the_edit_goes(bench: Bench) -> None:
    edit = bench.attach()
    edited = bench.projections()
    bench.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "style")
    deltas = {}
    for site in bench.sites:
        lora = site.projection
        delta = lora.lora_B["style"](lora.lora_A["style"](bench.context)) * lora.scaling["style"]
        deltas[site.name] = delta
        assert delta.abs().max() > 1e-3
    for name, output in bench.projections().items():
        torch.testing.assert_close(output, edited[name] + deltas[name])
    bench.unet.set_adapters("style", 0.5)
    for name, output in bench.projections().items():
        torch.testing.assert_close(output, edited[name] + 0.5 * deltas[name])
    bench.unet.disable_lora()
    assert all(torch.equal(output, edited[name]) for name, output in bench.projections().items())
    bench.unet.enable_lora()
    bench.unet.set_adapters("style", 1.0)
    edit.detach()
    assert not any(isinstance(module, EditedProjection) for module in bench.unet.modules())
    for site in bench.sites:
        plain = site.projection.base_layer
        assert type(plain) is nn.Linear
        torch.testing.assert_close(site.projection(bench.context), plain(bench.context) + deltas[site.name])


@torch.no_grad()
def test_lora_below_the_edit_is_edited_with_the_weight_that_it_changes(bench: Bench) -> None:
    bench.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "style")
    bench.sites = edit_sites_of(bench.unet)
    before = [site.projection for site in bench.sites]
    expected = {site.name: site.projection(bench.encoding().locked) for site in bench.sites if site.kind == "k"}
    edit = bench.attach()
    found = bench.projections()
    assert all(torch.equal(found[name], output) for name, output in expected.items())
    bench.unet.set_adapters("style", 0.0)  # the same prompt, so a cache would not notice
    changed = bench.projections()
    assert all(not torch.equal(found[name], changed[name]) for name in found)
    edit.detach()
    assert all(site.projection is layer for site, layer in zip(bench.sites, before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("first", ["edit", "lora"])
def test_a_fused_lora_is_edited_as_the_weight_that_it_has_become(bench: Bench, first: str) -> None:
    settings = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    if first == "lora":
        bench.unet.add_adapter(settings, "style")
        bench.sites = edit_sites_of(bench.unet)
    edit = bench.attach()
    edited = bench.projections()
    if first == "edit":
        bench.unet.add_adapter(settings, "style")
    for fuse in (bench.unet.fuse_lora, bench.unet.unfuse_lora, bench.unet.fuse_lora):
        bench.projections()  # the same prompt: what is kept of it must not be what follows
        fuse()
    found = bench.projections()
    fused = [weight.clone() for weight in bench.unet.parameters()]
    bench.gate.forget()
    assert all(torch.equal(output, found[name]) for name, output in bench.projections().items())
    for site in bench.sites:
        plain, prompt = base_module(site.projection), bench.encoding()
        own = bench.outputs[site.name]
        if own is None:
            expected = plain(prompt.locked)
        else:
            expected = low_rank_update(plain(prompt.remainder), prompt.gates, own)
        torch.testing.assert_close(found[site.name], expected)
        assert first == "lora" or (found[site.name] - edited[site.name]).abs().max() > 1e-3
    edit.detach()
    assert not any(isinstance(module, EditedProjection) for module in bench.unet.modules())
    assert all(torch.equal(now, then) for now, then in zip(bench.unet.parameters(), fused, strict=True))
    for site in bench.sites:
        assert torch.equal(site.projection(bench.context), base_module(site.projection)(bench.context))


@torch.no_grad()
def test_fused_projections_are_an_error_and_no_silent_base_model(bench: Bench) -> None:
    bench.attach()
    edited = bench()
    bench.unet.fuse_qkv_projections()
    with pytest.raises(EditError, match=r"attn2\.to_k: found the concept's edit bypassed .* unfuse_qkv_projections"):
        bench()
    bench.unet.unfuse_qkv_projections()
    assert torch.equal(bench(), edited)


@torch.no_grad()
def test_an_edit_that_was_unloaded_with_a_lora_is_an_error_and_no_silent_base_model(bench: Bench) -> None:
    edit = bench.attach()
    edited = bench()
    bench.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False), "style")
    bench.unet.unload_lora()  # takes every tuner layer for its own
    with pytest.raises(EditError, match=r"attn2\.to_k: found the concept's edit bypassed .* attach them again"):
        bench()
    edit.detach()
    bench.attach()
    assert torch.equal(bench(), edited)


class OneAttention(nn.Module):
    """The least denoiser: one cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn2 = Attention(query_dim=16, cross_attention_dim=D, heads=2, dim_head=8)

    def forward(self, sample: Tensor, timestep: int, encoder_hidden_states: Tensor) -> Tensor:
        return self.attn2(sample, encoder_hidden_states=encoder_hidden_states)


@torch.no_grad()
def test_a_denoiser_that_is_compiled_already_is_edited_as_it_is(bench: Bench) -> None:
    edit = bench.attach()
    edited = bench()
    edit.detach()
    compiled = Compiled(bench.unet)
    edit = attach_edit(bench.sites, compiled, bench.gate, bench.outputs)
    assert torch.equal(compiled(bench.noisy, 3, bench.context).sample, edited)
    bench.unet.fuse_qkv_projections()
    with pytest.raises(EditError, match="found the concept's edit bypassed"):
        compiled(bench.noisy, 3, encoder_hidden_states=bench.context)


@pytest.mark.slow
@pytest.mark.parametrize("gradients_on", [False, True])
def test_an_edited_denoiser_compiles_into_one_graph(bench: Bench, gradients_on: bool) -> None:
    denoiser = OneAttention().eval().requires_grad_(False)
    sites = edit_sites_of(denoiser)
    outputs = {site.name: None if site.kind == "k" else nn.Parameter(torch.ones(1, 16)) for site in sites}
    attach_edit(sites, denoiser, bench.gate, outputs)
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(gradients_on):
        for scale in (1.0, 2.0):
            arguments = torch.ones(B, 5, 16), 3, bench.context * scale
            torch.testing.assert_close(compiled(*arguments), denoiser(*arguments))
