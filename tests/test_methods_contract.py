"""What every method must hold, whatever it does: it comes and goes without a trace, trains only what is its own, and is
whole in its file."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.training import kept_bytes
from perfusion.backbones.base import Backbone
from perfusion.concept import Concept, save_concept
from perfusion.config import ConfigError
from perfusion.generate import GenerateConfig
from perfusion.manifest import ImageRecord
from perfusion.methods.base import Batch, Method, Word, available, build, method_class
from tests.backbone_kinds import BEYOND, KINDS, loaded
from tests.concepts import Snapshot
from tests.drawing import own_size

CONF = Path(__file__).resolve().parents[1] / "conf" / "method"
WORD = Word("<bear*>", "teddy bear")


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with options, on a kind of backbone."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    kind: str = "sd15"

    def __str__(self) -> str:
        return "-".join((self.name, *(f"{key}={value}" for key, value in self.options), self.kind))


CASES = [Case(name) for name in available()]
CASES += [
    Case("perfusion", (("key_lock", "none"), ("vectors", 3))),
    Case("perfusion", (("key_lock", "global"), ("masked_loss", False))),
]
CASES += [Case("perfusion", kind=kind) for kind in KINDS if kind != "sd15"]
CASES += [Case("custom_diffusion", kind="sdxl")]


@pytest.fixture(scope="module")
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    # At 64 pixels the middle block of all but Toyland would have one position, whose attention to itself no query or
    # key can change.
    resolution = 64 if request.param == "toyland" else 128
    backbone = loaded(request.param, tmp_path_factory.mktemp(request.param), resolution=resolution)
    draw(backbone, "cat")  # transformers hooks its own layers at the first call
    return backbone


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each case with the backbone of its kind."""
    if "method" in metafunc.fixturenames:
        pairs = [(case.kind, case) for case in CASES]
        metafunc.parametrize(("backbone", "method"), pairs, indirect=True, ids=map(str, CASES))


@pytest.fixture
def method(request: pytest.FixtureRequest, backbone: Backbone) -> Iterator[Method]:
    """Not attached yet."""
    before = Snapshot(backbone.pipe)
    made = build({"name": request.param.name, **dict(request.param.options)}, WORD)
    yield made
    made.detach()
    assert before.differences() == []  # so that one test's mistake is not another's failure


def parts(backbone: Backbone) -> dict[str, nn.Module]:
    return {name: part for name, part in backbone.pipe.components.items() if isinstance(part, nn.Module)}


def batch(backbone: Backbone, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    shape = (2, *backbone.latent_shape())
    return Batch(
        latents=torch.randn(shape, generator=draw),
        masks=torch.rand(2, 1, *shape[2:], generator=draw),
        prompts=[f"a photo of a {WORD.placeholder}", f"a good photo of the {WORD.placeholder}"],
        noise=torch.randn(shape, generator=draw),
        timesteps=torch.tensor([400, 800]),
    )


def train(method: Method, backbone: Backbone, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(method.parameter_groups())
    for step in range(steps):
        optimizer.zero_grad()
        torch.stack(list(method.loss(backbone, batch(backbone, step)).values())).sum().backward()
        optimizer.step()


def trained(method: Method) -> list[nn.Parameter]:
    return [parameter for group in method.parameter_groups() for parameter in group["params"]]


def draw(backbone: Backbone, word: str) -> np.ndarray:
    pipe: Any = backbone.pipe
    generator = torch.Generator().manual_seed(0)
    more: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", **own_size(pipe)}
    return pipe(f"a photo of a {word}", generator=generator, **more).images


def test_it_comes_trains_what_is_its_own_and_goes_without_a_trace(method: Method, backbone: Backbone) -> None:
    before, plain = Snapshot(backbone.pipe), draw(backbone, "cat")
    for _ in range(2):
        method.attach(backbone)
        assert before.differences() != []
        attached, start = Snapshot(backbone.pipe), [parameter.detach().clone() for parameter in trained(method)]
        with pytest.raises(ValueError, match="expected detach"):
            method.attach(backbone)
        assert attached.differences() == []
        train(method, backbone)
        assert all(not torch.equal(p, s) for p, s in zip(trained(method), start, strict=True))
        own = {parameter.data_ptr() for parameter in method.parameters()}
        assert [name for name in attached.differences() if attached.known[name][1] not in own] == []
        method.detach()
        assert before.differences() == []
        method.detach()
    np.testing.assert_array_equal(draw(backbone, "cat"), plain)


def test_only_what_the_groups_name_gets_gradients(method: Method, backbone: Backbone) -> None:
    method.attach(backbone)
    train(method, backbone, steps=1)  # a factor of a product gets no gradient while the other one is still 0
    method.zero_grad()
    named = trained(method)
    assert {id(p) for p in named} == {id(p) for p in method.parameters() if p.requires_grad}
    assert len({id(p) for p in named}) == len(named)
    assert all(group["lr"] > 0 and group["name"] for group in method.parameter_groups())
    sum(method.loss(backbone, batch(backbone)).values(), torch.zeros(())).backward()
    for parameter in named:
        assert parameter.dtype == torch.float32 and parameter.is_leaf
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
    own = {id(parameter) for parameter in method.parameters()}
    for part, module in parts(backbone).items():
        for name, parameter in module.named_parameters():
            assert parameter.grad is None or id(parameter) in own, f"{part}.{name}"


def test_gradient_checkpointing_keeps_less_for_the_same_gradients(
    method: Method, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    method.attach(backbone)
    train(method, backbone, steps=1)
    start, weights = method.state(), [*backbone.denoiser.parameters()]

    def loss() -> Tensor:
        return torch.stack(list(method.loss(backbone, batch(backbone)).values())).sum()

    def step() -> tuple[int, list[Tensor]]:
        kept = kept_bytes(loss, weights)
        method.load_state(start)
        method.zero_grad()
        value = loss()
        value.backward()
        return kept, [value.detach(), *(p.grad for p in trained(method) if p.grad is not None)]

    plain, expected = step()
    monkeypatch.setattr(backbone.config, "gradient_checkpointing", True)
    kept, found = step()
    # Where small models read many positions, the text encoder keeps most.
    assert kept < (0.98 if backbone.config.name in BEYOND else 0.7) * plain
    assert len(found) == len(expected) == 1 + len(trained(method))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_state_has_shapes_that_are_known_before_and_goes_around_exactly(method: Method, backbone: Backbone) -> None:
    before, shapes = Snapshot(backbone.pipe), method.state_shapes(backbone)
    assert before.differences() == []
    method.attach(backbone)
    train(method, backbone)
    state = method.state()
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes == method.state_shapes(backbone)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in state.values())
    kept = {name: value.clone() for name, value in state.items()}
    train(method, backbone)  # the state is a copy
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert any(not torch.equal(value, kept[name]) for name, value in method.state().items())
    method.load_state(state)
    for value in state.values():
        value.zero_()  # and so is what was loaded
    again = method.state()
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)
    assert all(parameter.requires_grad for parameter in trained(method))


def test_a_file_draws_what_the_method_in_memory_draws(method: Method, backbone: Backbone, tmp_path: Path) -> None:
    base = draw(backbone, WORD.superclass)
    method.attach(backbone)
    train(method, backbone)
    saved = save_concept(tmp_path / "concept.safetensors", Concept.of(method, backbone, seed=0))
    method.load_state({name: value.half().float() for name, value in method.state().items()})
    expected = draw(backbone, WORD.placeholder) if method.eval() else None
    method.detach()

    concept = Concept.load(tmp_path / "concept.safetensors")
    assert concept.hash == saved.hash
    with concept.attach(backbone.pipe) as attached:
        found = draw(backbone, WORD.placeholder)
        assert not any(parameter.requires_grad for parameter in attached.method.parameters())
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - base).max() > 1e-3
    np.testing.assert_array_equal(draw(backbone, WORD.superclass), base)


def test_a_checkpoint_of_the_module_goes_on_where_it_was(method: Method, backbone: Backbone) -> None:
    method.attach(backbone)
    train(method, backbone)
    checkpoint = {name: value.clone() for name, value in method.state_dict().items()}
    state, loss = method.state(), method.loss(backbone, batch(backbone))
    method.detach()
    method.attach(backbone)
    method.load_state_dict(checkpoint)
    found = method.state()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    again = method.loss(backbone, batch(backbone))
    assert all(torch.equal(again[name], loss[name]) for name in loss)


@pytest.mark.parametrize("name", ["perfusion", "textual_inversion", "lora"])  # the others train the model's own weights
def test_a_model_in_half_precision_is_trained_in_single_precision(name: str, tmp_path: Path) -> None:
    backbone = loaded("sd15", tmp_path, dtype="bfloat16", resolution=128)
    method = build({"name": name}, WORD).train()
    method.attach(backbone)
    assert {tensor.dtype for tensor in (*method.parameters(), *method.buffers())} == {torch.float32}
    e = torch.zeros(1, 2, 32, dtype=torch.bfloat16)
    assert {site.projection(e).dtype for site in backbone.edit_sites()} == {torch.bfloat16}
    train(method, backbone)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in method.parameters())
    method.detach()


def test_masks_count_where_the_options_say_so(method: Method, backbone: Backbone) -> None:
    method.attach(backbone)
    start, content = method.state(), batch(backbone)
    losses = []
    for masks in (content.masks, None):
        method.load_state(start)
        losses.append(sum(method.loss(backbone, dataclasses.replace(content, masks=masks)).values(), torch.zeros(())))
    assert torch.equal(*losses) != method.options.masked_loss


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("perfusion", {"tau": 0.0}, "method.tau: found 0.0, expected more than 0"),
        ("perfusion", {"sample_tau": -1.0}, "method.sample_tau: found -1.0, expected more than 0"),
        ("perfusion", {"ema": 1.5}, "method.ema: found 1.5, expected a number from 0 to 1"),
        ("perfusion", {"value_rate": -0.1}, "method.value_rate: found -0.1, expected at least 0"),
        ("perfusion", {"embedding_rate": -0.1}, "method.embedding_rate: found -0.1"),
        ("perfusion", {"weight_decay": -0.1}, "method.weight_decay: found -0.1"),
        ("perfusion", {"vectors": 0}, "method.vectors: found 0, expected at least 1"),
        ("perfusion", {"key_lock": "sideways"}, r"method.key_lock: .*sideways.*local, global, none"),
        ("perfusion", {"betta": 0.5}, "method.betta: unknown key; did you mean 'beta'"),
        ("lora", {"rank": 0}, "method.rank: found 0, expected 1 to 1024"),
        ("lora", {"alpha": 0.0}, "method.alpha: found 0.0, expected more than 0"),
        ("lora", {"targets": []}, r"method.targets: found \[\], expected ends of names"),
        ("lora", {"identifier": " "}, "method.identifier: found ' ', expected one or several words"),
        ("lora", {"scale": float("inf")}, "method.scale: found inf, expected a finite number"),
        ("lora", {"adapter_rate": 0.0}, "method.adapter_rate: found 0.0, expected more than 0"),
        ("textual_inversion", {"vectors": 0}, "method.vectors: found 0, expected at least 1"),
        ("textual_inversion", {"embedding_rate": 0.0}, "method.embedding_rate: found 0.0, expected more than 0"),
        ("textual_inversion", {"weight_decay": -1.0}, "method.weight_decay: found -1.0, expected at least 0"),
        ("dreambooth", {"identifier": " "}, "method.identifier: found ' ', expected a rare word"),
        ("dreambooth", {"denoiser_rate": -1.0}, "method.denoiser_rate: found -1.0"),
        ("dreambooth", {"prior_weight": -1.0}, "method.prior_weight: .*at least 0"),
        ("dreambooth", {"prior_images": -1}, "method.prior_images: .*at least 0"),
        ("custom_diffusion", {"prior_steps": 0}, "method.prior_steps: .*at least 1"),
        ("dreambooth", {"prompt": "a photo"}, "method.prompt: .*places for the concept"),
        ("custom_diffusion", {"prior_prompt": "a {} {}"}, "method.prior_prompt: .*places for the concept"),
        ("dreambooth", {"weight_decay": -1.0}, "method.weight_decay: found -1.0"),
        ("custom_diffusion", {"initializer": ""}, "method.initializer: found '', expected a rare word"),
        ("custom_diffusion", {"projection_rate": -1.0}, "method.projection_rate: found -1.0"),
        ("custom_diffusion", {"embedding_rate": -1.0}, "method.embedding_rate: found -1.0"),
    ],
)
def test_impossible_options_are_config_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"name": name, **options}, WORD)


@pytest.mark.parametrize("preset", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_preset_gives_all_options_of_its_method(preset: str) -> None:
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{preset}.yaml"))
    assert isinstance(values, dict)
    made = build({str(key): value for key, value in values.items()}, WORD)
    all_options, newer = vars(made.options).keys(), set(type(made).newer)
    assert all_options - newer <= values.keys() <= all_options


def test_every_method_has_a_preset() -> None:
    assert set(available()) <= {path.stem for path in CONF.glob("*.yaml")}


@pytest.mark.parametrize("name", available())
def test_a_dial_is_a_property_that_no_file_or_command_calls_something_else(name: str) -> None:
    taken = {field.name for schema in (ImageRecord, GenerateConfig) for field in dataclasses.fields(schema)}
    for dial in method_class(name).dials:
        assert isinstance(getattr(method_class(name), dial.name), property) and dial.name not in taken
