"""`edit` on a small real UNet: against Eq. 3 and Eq. 4 written out in float64, its cache, its gradients, its going."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig
from torch import Tensor, nn

from perfusion import rank_one
from perfusion.backbones.base import EditSite
from perfusion.backbones.latent_diffusion import edit_sites_of
from perfusion.edit import Edit, EditedProjection, EditError, PromptGate, attach_edit

B, N, D = 2, 7, 24
BETA, TAU = 0.7, 0.15


def small_unet(dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=D,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return unet.eval().requires_grad_(False).to(dtype)


class Bench:
    """A UNet, J random concepts with their C, and a batch; everything in one dtype."""

    def __init__(self, count: int = 1, dtype: torch.dtype = torch.float32, trained_keys: bool = False) -> None:
        draw = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.unet = small_unet(dtype)
        self.sites = edit_sites_of(self.unet)
        mix, mean = normal(D, D), normal(D)
        samples = normal(200, D) @ mix + mean
        self.C = samples.T @ samples / len(samples)
        self.i, self.s = normal(count, D), normal(count, D)
        directions = rank_one.precision_times(torch.linalg.cholesky(self.C), self.i)
        # The concepts come in along the tokens, in turn, so that the gates go from closed to open.
        share = torch.linspace(0, 1.5, N, dtype=torch.float64)[:, None]
        context = (normal(B, N, D) @ mix + mean) * (1 - share / 1.5) + share * self.i[[n % count for n in range(N)]]
        self.context, self.noisy = context.to(dtype), normal(B, 4, 4, 4).to(dtype)
        self.gate = PromptGate(self.i.to(dtype), directions.to(dtype), self.s.to(dtype), BETA, TAU)
        self.outputs = {
            site.name: None
            if site.kind == "k" and not trained_keys
            else nn.Parameter(normal(count, site.projection.out_features).to(dtype))
            for site in self.sites
        }

    def attach(self) -> Edit:
        return attach_edit(self.sites, self.unet, self.gate, self.outputs)

    def __call__(self, context: Tensor | None = None) -> Tensor:
        return self.unet(self.noisy, 3, encoder_hidden_states=self.context if context is None else context).sample

    def projections(self) -> dict[str, Tensor]:
        """What each site gives during one call of the UNet."""
        found: dict[str, Tensor] = {}

        def keep(site: EditSite) -> Callable[..., None]:
            return lambda module, args, output: found.update({site.name: output.detach().clone()})

        hooks = [site.projection.register_forward_hook(keep(site)) for site in self.sites]
        self()
        for hook in hooks:
            hook.remove()
        return found

    def closed_form(self, site: EditSite, beta: float = BETA) -> Tensor:
        """Eq. 4 (for one concept Eq. 3) with an explicit inverse of C and normal equations in place of the basis."""
        P = torch.linalg.inv(self.C)
        W, e, i = site.projection.weight.double(), self.context.double(), self.i
        inside = e @ P @ i.T @ torch.linalg.inv(i @ P @ i.T) @ i
        h = (e - inside) @ W.T
        own = self.outputs[site.name]
        targets = self.s @ W.T if own is None else own.detach().double()
        for i_j, o_j in zip(i, targets, strict=True):
            r = e @ P @ i_j / (i_j @ P @ i_j)
            h = h + torch.sigmoid((r - beta) / TAU)[..., None] * o_j
        return h


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("trained_keys", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@torch.no_grad()
def test_every_projection_of_the_unet_equals_the_equation_in_float64(count: int, trained_keys: bool) -> None:
    bench = Bench(count, torch.float64, trained_keys)
    plain = bench.projections()
    bench.attach()
    found = bench.projections()
    gates = bench.gate(bench.context).gates
    assert gates.min() < 0.1 and gates.max() > 0.9
    assert len(found) == len(bench.sites) == 8 and {site.kind for site in bench.sites} == {"k", "v"}
    for site in bench.sites:
        expected = bench.closed_form(site)
        torch.testing.assert_close(found[site.name], expected, rtol=1e-10, atol=1e-10)
        assert (found[site.name] - plain[site.name]).abs().max() > 0.1


@torch.no_grad()
def test_two_concepts_equal_equation_4_with_the_orthonormal_basis_of_appendix_b() -> None:
    bench = Bench(2, torch.float64)
    bench.attach()
    found = bench.projections()
    factor = torch.linalg.cholesky(bench.C)
    basis = rank_one.orthonormal_basis(bench.i, factor)
    e = bench.context
    components = rank_one.similarity(e, rank_one.precision_times(factor, basis)[:, None, None])
    directions = rank_one.similarity_direction(bench.i, factor)[:, None, None]
    gates = rank_one.gate(rank_one.similarity(e, directions), BETA, TAU)
    for site in bench.sites:
        W, own = site.projection.weight, bench.outputs[site.name]
        targets = bench.s @ W.T if own is None else own
        expected = rank_one.edited_projection_many(e @ W.T, components, gates, basis @ W.T, targets)
        torch.testing.assert_close(found[site.name], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_locked_keys_are_the_projection_of_the_encoding_with_the_superclass_in_the_concepts_place() -> None:
    bench = Bench(dtype=torch.float64)
    bench.attach()
    found = bench.projections()
    e, g = bench.context, bench.gate(bench.context).gates[0, ..., None]
    moved = e - bench.gate.similarity(e)[0, ..., None] * bench.i[0] + g * bench.s[0]
    for site in bench.sites:
        if site.kind == "k":
            expected = moved @ site.projection.weight.T
            torch.testing.assert_close(found[site.name], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_only_the_ratio_of_a_directions_entries_counts() -> None:
    bench = Bench(2, torch.float64)
    once = bench.gate(bench.context)
    scale = torch.tensor([[1e-4], [3e3]], dtype=torch.float64)
    bench.gate.move(bench.gate.target_inputs, bench.gate.directions * scale)
    again = bench.gate(bench.context)
    torch.testing.assert_close(again.locked, once.locked, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.gates, once.gates, rtol=1e-12, atol=1e-12)


def test_directions_given_as_a_function_are_computed_once_and_only_when_needed(bench: Bench) -> None:
    calls: list[Tensor] = []

    def directions(target_inputs: Tensor) -> Tensor:
        calls.append(target_inputs)
        return known

    known, expected = bench.gate.directions.clone(), bench.gate(bench.context).gates
    bench.gate.move(bench.gate.target_inputs, directions)
    assert not calls
    assert torch.equal(bench.gate(bench.context).gates, expected)
    bench.gate.settle()
    assert len(calls) == 1 and torch.equal(calls[0], bench.gate.target_inputs)
    bench.gate.move(bench.gate.target_inputs, directions)
    bench.gate.move(bench.gate.target_inputs, known)
    assert torch.equal(bench.gate(bench.context).gates, expected) and len(calls) == 1


# --- the cache --------------------------------------------------------------------------------------------------------


class Counter:
    """How often the plain projections inside the edit have run."""

    def __init__(self, bench: Bench) -> None:
        self.calls = 0
        for site in bench.sites:
            projection = site.projection
            assert isinstance(projection, EditedProjection)
            projection.base_layer.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1


@torch.no_grad()
def test_outputs_are_computed_once_per_prompt_and_reused_bit_for_bit(bench: Bench) -> None:
    bench.attach()
    counter = Counter(bench)
    first = bench()
    assert counter.calls == 8
    second = bench()
    assert counter.calls == 8 and torch.equal(first, second)
    uncached = bench(bench.context.clone())
    assert counter.calls == 16 and torch.equal(first, uncached)
    bench.gate.forget()
    assert torch.equal(bench(), first) and counter.calls == 24


def test_layers_share_one_computation_of_the_gate(bench: Bench) -> None:
    bench.attach()
    calls: list[object] = []
    bench.gate.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        bench(), bench()
    assert len(calls) == 1
    for count in (2, 3):  # a graph of its own for every call, also after the same prompt without gradients
        bench()
        assert len(calls) == count


@pytest.mark.parametrize("inference", [False, True])
def test_nothing_stale_is_reused(bench: Bench, inference: bool) -> None:
    value_site = next(site for site in bench.sites if site.kind == "v")
    projection, own = value_site.projection, bench.outputs[value_site.name]
    assert own is not None
    checkpoint = {name: tensor * 1.1 for name, tensor in bench.gate.state_dict().items()}
    changes: dict[str, Callable[[], object]] = {
        "beta": lambda: setattr(bench.gate, "beta", 0.2),
        "beta per sample": lambda: setattr(bench.gate, "beta", torch.tensor([0.1, 0.9])),
        "beta in place": lambda: bench.gate.beta.add_(0.3),  # type: ignore[union-attr]
        "tau": lambda: setattr(bench.gate, "tau", 0.6),
        "target inputs": lambda: bench.gate.move(bench.gate.target_inputs * 1.5, bench.gate.directions),
        "a checkpoint": lambda: bench.gate.load_state_dict(checkpoint),
        "target outputs": lambda: own.data.mul_(2) if inference else own.mul_(2),
        "the weight": lambda: projection.weight.mul_(1.5),
        "the context": lambda: bench.context.add_(0.5),
    }
    bench.attach()
    with torch.inference_mode() if inference else torch.no_grad():
        bench.context = bench.context.clone()  # in inference mode: without a version to compare
        before = bench()
        for name, change in changes.items():
            if inference and name != "the context":
                continue
            change()
            after = bench()
            assert not torch.equal(before, after), name
            bench.gate.forget()
            assert torch.equal(bench(), after), name
            before = after


def test_nothing_is_reused_while_gradients_are_enabled(bench: Bench) -> None:
    bench.attach()
    with torch.no_grad():
        bench()  # what this keeps has no graph
    context = bench.context.requires_grad_()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(bench().square().sum(), context)
        assert gradient.abs().sum() > 0
    with torch.no_grad():
        bench()
    projection = next(site for site in bench.sites if site.kind == "v").projection
    assert torch.autograd.grad(projection(context).sum(), context)[0].abs().sum() > 0


@torch.no_grad()
def test_a_layer_that_is_called_by_itself_equals_the_layer_inside_the_unet(bench: Bench) -> None:
    bench.attach()
    inside = bench.projections()
    bench.gate.forget()
    for site in bench.sites:
        assert torch.equal(site.projection(bench.context.clone()), inside[site.name])
        assert torch.equal(site.projection(bench.context), inside[site.name])


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(bench: Bench) -> dict[str, Tensor]:
    context = bench.context.clone().requires_grad_()
    wanted = {"context": context, **{name: o for name, o in bench.outputs.items() if o is not None}}
    return dict(zip(wanted, torch.autograd.grad(bench(context).square().sum(), list(wanted.values())), strict=True))


def test_the_loss_reaches_encodings_and_outputs_and_nothing_else(bench: Bench) -> None:
    bench.attach()
    found = gradients(bench)
    assert len(found) == 5 and all(gradient.abs().sum() > 0 for gradient in found.values())
    context = bench.context.clone().requires_grad_()
    bench(context).sum().backward()
    assert all(parameter.grad is None for parameter in bench.unet.parameters())


def test_gradients_equal_finite_differences() -> None:
    bench = Bench(dtype=torch.float64)
    bench.attach()
    site = next(site for site in bench.sites if site.kind == "v")
    own = bench.outputs[site.name]
    assert own is not None
    found = gradients(bench)
    with torch.no_grad():
        for tensor, gradient in ((own, found[site.name]), (bench.context, found["context"])):
            ahead, step = torch.randn_like(tensor), 1e-6
            tensor.add_(step * ahead)
            high = bench().square().sum()
            tensor.sub_(2 * step * ahead)
            slope = (high - bench().square().sum()) / (2 * step)
            tensor.add_(step * ahead)
            torch.testing.assert_close((gradient * ahead).sum(), slope, rtol=1e-5, atol=1e-8)


def test_gradient_checkpointing_gives_the_same_gradients(bench: Bench) -> None:
    bench.attach()
    expected = gradients(bench)
    bench.unet.enable_gradient_checkpointing()
    bench.unet.train()  # the UNet has no dropout
    for name, gradient in gradients(bench).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


def test_a_gate_can_be_copied_after_a_training_step(bench: Bench) -> None:
    bench.attach()
    bench(bench.context.clone().requires_grad_()).sum().backward()
    twin = copy.deepcopy(bench.gate)
    assert torch.equal(twin(bench.context).locked, bench.gate(bench.context).locked)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_a_front_of_settings_in_one_batch_equals_one_setting_at_a_time(guidance: bool) -> None:
    bench = Bench(dtype=torch.float64)
    bench.attach()
    betas, taus = torch.tensor([[0.2, 0.9], [0.1, 0.3]], dtype=torch.float64)
    if guidance:  # the empty prompts, then the prompts
        bench.context, bench.noisy = bench.context.repeat(2, 1, 1), bench.noisy.repeat(2, 1, 1, 1)
    bench.gate.beta, bench.gate.tau = betas, taus
    together = bench()
    for k, (beta, tau) in enumerate(zip(betas.tolist(), taus.tolist(), strict=True)):
        bench.gate.beta, bench.gate.tau = beta, tau
        torch.testing.assert_close(together[k::2], bench()[k::2], rtol=1e-10, atol=1e-10)
    assert (bench()[0] - together[0]).abs().max() > 1e-4


@torch.no_grad()
def test_each_concept_can_have_its_own_settings() -> None:
    bench = Bench(2, torch.float64)
    both = bench.gate(bench.context).gates
    bench.gate.beta = torch.tensor([[BETA], [0.2]], dtype=torch.float64)
    found = bench.gate(bench.context).gates
    bench.gate.beta = 0.2
    assert torch.equal(found[0], both[0])
    assert torch.equal(found[1], bench.gate(bench.context).gates[1])
    assert not torch.equal(found[1], both[1])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tau", 0.0, "tau: found 0.0, expected finite values above 0"),
        ("tau", torch.tensor([0.1, -0.1]), "tau: found"),
        ("beta", float("nan"), "beta: found nan, expected finite values"),
        ("beta", torch.tensor([0.1, float("inf")]), "beta: found"),
        ("beta", torch.zeros(3, 2), r"beta: found shape \(3, 2\), expected .* J = 1"),
        ("beta", torch.zeros(1, 1, 1), r"beta: found shape \(1, 1, 1\)"),
    ],
)
def test_an_impossible_setting_is_refused_and_changes_nothing(
    bench: Bench, name: str, value: float | Tensor, message: str
) -> None:
    with pytest.raises(EditError, match=message):
        setattr(bench.gate, name, value)
    assert (bench.gate.beta, bench.gate.tau) == (BETA, TAU)


@torch.no_grad()
def test_settings_that_do_not_divide_the_batch_are_refused(bench: Bench) -> None:
    bench.gate.beta = torch.zeros(3)
    with pytest.raises(EditError, match="beta: found 3 values for a batch of 2 rows, expected a divisor"):
        bench.gate(bench.context)


def test_concepts_that_cannot_be_told_apart_are_refused() -> None:
    bench = Bench(2, torch.float64)
    i, v = bench.gate.target_inputs, bench.gate.directions
    with pytest.raises(EditError, match="found 2 concepts that are linearly dependent"):
        bench.gate.move(i[[0, 0]] * torch.tensor([[1.0], [2.0]]), v[[0, 0]])


# --- attaching and detaching ------------------------------------------------------------------------------------------


def snapshot(unet: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor], list[str]]:
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    return dict(unet.named_modules()), state, [name for name, _ in unet.named_parameters()]


def test_detach_leaves_every_object_and_every_bit_as_it_was(bench: Bench) -> None:
    modules, state, names = snapshot(bench.unet)
    pointers = [parameter.data_ptr() for parameter in bench.unet.parameters()]
    with torch.no_grad():
        plain = bench()
        edit = bench.attach()
        edited = bench()
    gradients(bench)
    edit.detach()
    edit.detach()
    modules_after, state_after, names_after = snapshot(bench.unet)
    assert list(modules_after) == list(modules) and all(modules_after[name] is modules[name] for name in modules)
    assert names_after == names
    assert all(torch.equal(state_after[name], tensor) for name, tensor in state.items())
    assert [parameter.data_ptr() for parameter in bench.unet.parameters()] == pointers
    assert not bench.unet._forward_pre_hooks and not bench.unet._forward_pre_hooks_with_kwargs
    with torch.no_grad():
        assert torch.equal(bench(), plain) and not torch.equal(edited, plain)


def test_the_unets_own_state_has_nothing_of_the_concept(bench: Bench) -> None:
    _, state, _ = snapshot(bench.unet)
    bench.attach()
    after = bench.unet.state_dict()
    assert {name.replace(".base_layer", ""): tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    assert not any(module.training for module in bench.unet.modules())


@torch.no_grad()
def test_a_second_edit_is_refused_until_the_first_is_gone(bench: Bench) -> None:
    edit = bench.attach()
    edited = bench()
    with pytest.raises(EditError, match=r"attn2\.to_k: found an edit, expected none"):
        bench.attach()
    assert torch.equal(bench(), edited)
    edit.detach()
    bench.attach()
    assert torch.equal(bench(), edited)


@torch.no_grad()
def test_the_context_may_be_positional(bench: Bench) -> None:
    bench.attach()
    expected = bench()
    counter = Counter(bench)
    assert torch.equal(bench.unet(bench.noisy, 3, bench.context).sample, expected)
    assert counter.calls == 0


@torch.no_grad()
def test_half_precision_keeps_the_similarity_exact(bench: Bench) -> None:
    expected = bench.gate(bench.context.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        found = bench.gate(bench.context.bfloat16().float())
    for name in ("gates", "remainder", "locked"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    half = bench.gate(bench.context.bfloat16())
    assert torch.equal(half.gates, expected.gates) and torch.equal(half.locked, expected.locked.bfloat16())
    assert torch.equal(half.remainder, expected.remainder.bfloat16())
    bench.attach()
    exact = bench.projections()
    bench.unet.bfloat16()
    bench.context, bench.noisy = bench.context.bfloat16(), bench.noisy.bfloat16()
    for name, rounded in bench.projections().items():
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.float(), exact[name], rtol=0.03, atol=0.1)


@torch.no_grad()
def test_autocast_has_outputs_of_its_own(bench: Bench) -> None:
    bench.attach()
    exact = bench()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(output.dtype == torch.bfloat16 for output in bench.projections().values())
    assert torch.equal(bench(), exact)


# --- together with what diffusers and PEFT do -------------------------------------------------------------------------


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
    prompt = bench.gate(bench.context)
    expected = {site.name: site.projection(prompt.locked) for site in bench.sites if site.kind == "k"}
    edit = bench.attach()
    found = bench.projections()
    assert all(torch.equal(found[name], output) for name, output in expected.items())
    bench.unet.set_adapters("style", 0.0)  # the same prompt, so a cache would not notice
    changed = bench.projections()
    assert all(not torch.equal(found[name], changed[name]) for name in found)
    edit.detach()
    assert all(site.projection is layer for site, layer in zip(bench.sites, before, strict=True))


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
