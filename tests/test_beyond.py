"""Models beyond Stable Diffusion: K and V read what the denoiser makes of the encodings, with a bias, and in some
without what pads a prompt."""

from __future__ import annotations

import dataclasses
import re
import shlex
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from perfusion import backbones
from perfusion.backbones import BackboneError
from perfusion.backbones.latent_diffusion import LatentDiffusionBackbone
from perfusion.concept import Concept, save_concept
from perfusion.conditions import Conditions
from perfusion.config import ConfigError
from perfusion.covariance.captions import caption_stream
from perfusion.drawing import sample
from perfusion.editing import TokenError
from perfusion.editing.layer import unedited
from perfusion.editing.tokens import taught
from perfusion.export import ExportConfig, ExportError, export
from perfusion.generate import GenerateConfig, generate
from perfusion.methods.base import Batch, Word, build
from perfusion.methods.perfusion import Perfusion
from perfusion.train import main
from tests.backbone_kinds import BEYOND, KINDS, loaded
from tests.concepts import untrained_concept
from tests.drawing import call
from tests.pipelines import chatglm_tokenizer, gemma_tokenizer, t5_tokenizer, tiny_pixart

PROMPT = "a photo of a <bear*> and a <mug*>, on the beach"
WORDS = (Word("<bear*>", "teddy bear"), Word("<mug*>", "mug"))
BETA, TAU = 0.4, 0.2
TOKENIZERS = {"T5": t5_tokenizer, "Gemma": gemma_tokenizer, "ChatGLM": chatglm_tokenizer}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LatentDiffusionBackbone]:
    return {kind: loaded(kind, tmp_path_factory.mktemp(kind)) for kind in BEYOND}


@pytest.fixture(params=BEYOND)
def backbone(request: pytest.FixtureRequest, made: dict[str, LatentDiffusionBackbone]) -> LatentDiffusionBackbone:
    return made[request.param]


@pytest.mark.parametrize(
    ("key_lock", "removal", "count"), [("local", "full", 1), ("none", "full", 2), ("local", "gated", 1)]
)
def test_the_equations_hold_behind_the_projection_and_before_the_bias(
    request: pytest.FixtureRequest, backbone: LatentDiffusionBackbone, key_lock: str, removal: str, count: int
) -> None:
    """Eq. 3 and 4 with explicit inverses in float64; where the denoiser does not look, encodings stay as they are."""
    options = {"key_lock": key_lock, "removal": removal}
    factor = backbone.second_moment(progress=False)
    P = torch.linalg.inv(factor @ factor.T)
    made = [
        with_own_direction(untrained_concept(backbone, word, k, **options), P) for k, word in enumerate(WORDS[:count])
    ]
    attached = [concept.attach(backbone, beta=BETA, tau=TAU) for concept in made]
    request.addfinalizer(lambda: [one.detach() for one in attached])
    e, counts, found = one_call(backbone)
    methods = [one.method for one in attached if isinstance(one.method, Perfusion)]
    i = torch.stack([concept.tensors["target_input"] for concept in made]).double()
    r = [e @ P @ i_j / (i_j @ P @ i_j) for i_j in i]
    g = [torch.sigmoid((r_j - BETA) / TAU)[..., None] for r_j in r]
    inside = e @ P @ i.T @ torch.linalg.inv(i @ P @ i.T) @ i
    if removal == "gated":
        inside = g[0] * r[0][..., None] * i[0]
    assert len(methods) == count and bool(counts.min() == 0) == backbone.masked
    numbers = {"k": 0, "v": 0}
    for site in backbone.edit_sites():
        projection: Any = unedited(site.projection)
        W, expected = projection.weight.double(), (e - inside) @ projection.weight.double().T
        for method, g_j in zip(methods, g, strict=True):
            own = method.keys if site.kind == "k" else method.values
            s = method.gate.superclass_inputs.double()  # type: ignore[union-attr]
            expected = expected + g_j * (own[numbers[site.kind]].double() if len(own) else s @ W.T)
        numbers[site.kind] += 1
        expected = torch.where(counts[..., None] > 0, expected, e @ W.T)
        expected = expected if projection.bias is None else expected + projection.bias.double()
        torch.testing.assert_close(found[site.name].double(), expected, rtol=1e-3, atol=1e-3)
        assert (projection.bias is None) == (backbone.family == "kolors")


def with_own_direction(concept: Concept, P: Tensor) -> Concept:
    """C⁻¹i* of the i* that it has."""
    direction = P @ concept.tensors["target_input"].double()
    return dataclasses.replace(concept, tensors={**concept.tensors, "direction": direction / direction.abs().max()})


def one_call(backbone: LatentDiffusionBackbone) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of the first call of the denoiser, without guidance: what K and V read (1, N, d), which positions count (1, N),
    and what each of them gives."""
    read: list[Tensor] = []
    masks: list[Tensor | None] = []
    given: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            read.append(args[0])
            given.setdefault(name, output.clone())

        return hook

    hooks = [site.projection.register_forward_hook(keep(site.name)) for site in backbone.edit_sites()]
    told = lambda module, args, kwargs, output: masks.append(kwargs.get("encoder_attention_mask"))  # noqa: E731
    hooks.append(backbone.denoiser.register_forward_hook(told, with_kwargs=True))
    call(backbone.pipe, PROMPT, guidance_scale=1.0)
    for hook in hooks:
        hook.remove()
    counts = torch.ones(read[0].shape[:2]) if masks[0] is None else masks[0]
    return read[0].double(), counts, given


@pytest.mark.parametrize("name", ["textual_inversion", "lora", "dreambooth", "custom_diffusion"])
def test_the_other_methods_learn_and_draw(backbone: LatentDiffusionBackbone, name: str) -> None:
    base = call(backbone.pipe, "a photo of a mug")
    method = build({"name": name}, WORDS[1]).train()
    method.attach(backbone)
    latents, noise = torch.randn(2, 2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(0))
    batch = Batch(latents, None, ["a photo of a <mug*>"] * 2, noise, torch.tensor([10, 900]))
    optimizer = torch.optim.SGD([{**group, "lr": 0.1} for group in method.parameter_groups()])
    for _ in range(2):  # LoRA's A moves once its B is no longer 0
        optimizer.zero_grad()
        torch.stack([*method.loss(backbone, batch).values()]).sum().backward()
        optimizer.step()
    concept = Concept.of(method, backbone, 0)
    method.detach()
    assert all(tensor.isfinite().all() for tensor in concept.tensors.values())
    with concept.attach(backbone):
        own = call(backbone.pipe, "a photo of a <mug*>")
    assert own.isfinite().all() and (own - base).abs().max() > 1e-4
    assert torch.equal(call(backbone.pipe, "a photo of a mug"), base)


@pytest.mark.parametrize("kind", BEYOND)
def test_in_bfloat16_and_beside_a_lora(kind: str, tmp_path: Path) -> None:
    concept = untrained_concept(loaded(kind, tmp_path / "whole"), WORDS[1], 0)
    strong = {**concept.tensors, "values": 30 * concept.tensors["values"]}  # beyond the rounding of bfloat16
    concept, prompt = dataclasses.replace(concept, tensors=strong), "a photo of a <mug*>"
    backbone = loaded(kind, tmp_path / "half", dtype="bfloat16")
    base = call(backbone.pipe, "a photo of a mug")
    with concept.attach(backbone, beta=BETA):
        own = call(backbone.pipe, prompt)
    assert own.isfinite().all() and not torch.equal(own, base)
    if kind == "pixart":  # which diffusers gives no adapters
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
        backbone.denoiser.add_adapter(lora, "style")
    with concept.attach(backbone, beta=BETA):
        both = call(backbone.pipe, prompt)
    assert both.isfinite().all() and not torch.equal(both, own)
    backbone.denoiser.unload_lora()
    with concept.attach(backbone, beta=BETA):
        assert torch.equal(call(backbone.pipe, prompt), own)


@pytest.mark.slow
def test_compiled_denoisers_draw_the_same(backbone: LatentDiffusionBackbone) -> None:
    concept, part = untrained_concept(backbone, WORDS[1], 0), backbone.denoiser
    with concept.attach(backbone, beta=BETA):
        plain = call(backbone.pipe, "a photo of a <mug*>")
        setattr(backbone.pipe, backbone.part, torch.compile(part, backend="eager"))
        try:
            torch.testing.assert_close(call(backbone.pipe, "a photo of a <mug*>"), plain)
        finally:
            setattr(backbone.pipe, backbone.part, part)


def test_what_stock_diffusers_has_not_is_an_error(backbone: LatentDiffusionBackbone, tmp_path: Path) -> None:
    file = tmp_path / "concept.safetensors"
    save_concept(file, untrained_concept(backbone, WORDS[1], 0))
    with pytest.raises(ExportError, match=f"found a concept of {backbone.family}, expected one of Stable Diffusion"):
        export(ExportConfig(concept=str(file), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    picture = Image.new("RGB", (64, 64))
    conditions = Conditions(picture, 0.5, picture.convert("L"), None, None, 1.0, {})
    with pytest.raises(ConfigError, match="mask: diffusers cannot draw so with a"), conditions.pipeline(backbone.pipe):
        pass


def test_pixart_alpha_reads_120_tokens(tmp_path: Path) -> None:
    tiny_pixart(PixArtAlphaPipeline).save_pretrained(tmp_path)
    pipe: Any = backbones.load("pixart", str(tmp_path), device="cpu")
    backbone: Any = backbones.around(pipe)
    assert type(pipe) is PixArtAlphaPipeline and backbone.encode(["a mug"], "mug").context.shape[1] == 120
    with pytest.raises(TokenError, match=r"121 tokens .* reads 120"):
        backbone.encode(["dog " * 119 + "mug"], "mug")


def test_a_word_reads_as_its_superclass_would_with_a_comma_behind_it(backbone: LatentDiffusionBackbone) -> None:
    plain = [*backbone.tokens("a photo of a mug, on the beach").values()]
    word = backbone.add_token("<mug*>", "mug")
    found = [*backbone.tokens("a photo of a <mug*>, on the beach").values()]
    word.remove()
    assert [token for token in found if token != "<mug*>"] == [token for token in plain if token != "▁mug"]
    assert len(found) == len(plain)


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_change_how_no_other_text_reads(name: str, vectors: int) -> None:
    stock = TOKENIZERS[name]()
    known = taught(stock, [("<cat*>", vectors), ("dogx", 1)])
    texts = [*islice(caption_stream("everyday", 1000), None), "dogxs and dog", " two  spaces ", "", "<cat> cat* <"]
    assert [known(text).input_ids for text in texts] == [stock(text).input_ids for text in texts]
    own = known("a <cat*> on a dogx").input_ids
    assert len(own) == len(stock("a cat on a dog").input_ids) + vectors - 1
    assert sum(token >= len(stock) for token in own) == vectors + 1


def test_a_stock_call_draws_no_prompt_that_loses_the_word(backbone: LatentDiffusionBackbone) -> None:
    fits = "a dog and a <mug*> " + "on " * 20
    word = backbone.add_token("<mug*>", "mug")
    try:
        backbone.check_prompts([fits])
        call(backbone.pipe, fits)
        long = "on " * backbone.length(backbone.pipe.tokenizer) + "a <mug*>"
        for draw in (lambda: call(backbone.pipe, long), lambda: backbone.check_prompts(["a <mug*>", long])):
            with pytest.raises(
                TokenError, match=r"'<mug\*>' would be cut off: found \d+ tokens .*, expected \d+ at most"
            ):
                draw()
        call(backbone.pipe, long.replace("<mug*>", "mug"))  # what else is lost is the caller's business
    finally:
        word.remove()


def test_a_pipeline_that_cleans_prompts_is_told_not_to(
    made: dict[str, LatentDiffusionBackbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = made["pixart"]
    cleaned = lambda self, text: re.sub(r"<[^>]*>|[*&]", "", text)  # noqa: E731 (diffusers' own takes bs4 and ftfy)
    monkeypatch.setattr(type(backbone.pipe), "_clean_caption", cleaned)
    word = backbone.add_token("<bear*>", "teddy bear")
    clean = backbone.pipe._clean_caption
    assert clean("a photo & more") == "a photo  more"
    with pytest.raises(TokenError, match=r"without '<bear\*>'; expected clean_caption=False"):
        clean("a photo of a <bear*>")
    word.remove()
    assert "_clean_caption" not in vars(backbone.pipe)


def test_words_of_large_letters_are_refused_where_the_pipeline_makes_small_ones(
    backbone: LatentDiffusionBackbone,
) -> None:
    if backbone.small_letters:
        with pytest.raises(TokenError, match=r"found '<Bear\*>', expected small letters, such as '<bear\*>'"):
            backbone.check_token("<Bear*>", "teddy bear")
    else:
        backbone.check_token("<Bear*>", "teddy bear")


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "ZImagePipeline"])
def test_models_whose_text_changes_from_block_to_block_are_refused(kind: str, tmp_path: Path) -> None:
    class Joint:
        components = ()

    Joint.__name__ = kind
    with pytest.raises(BackboneError, match="no single i\\* stands for a concept in all of them"):
        backbones.around(Joint())  # type: ignore[arg-type]
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
    with pytest.raises(
        BackboneError, match=f"holds a {kind}, expected a PixArtSigmaPipeline or PixArtAlphaPipeline: its"
    ):
        backbones.load("pixart", str(tmp_path))


def test_flows_are_drawn_by_schedulers_that_know_them(made: dict[str, LatentDiffusionBackbone]) -> None:
    from perfusion.addons import set_scheduler

    before = made["sana"].pipe.scheduler
    with pytest.raises(ConfigError, match="'euler', expected dpm\\+\\+ or unipc: this model was trained on flows"):
        set_scheduler(made["sana"].pipe, "euler")
    assert made["sana"].pipe.scheduler is before


@pytest.mark.parametrize("kind", BEYOND)
def test_from_photos_to_pictures(kind: str, tmp_path: Path) -> None:
    """The commands themselves: a concept is trained, and seen; left out, the picture is the base model's to the bit."""
    folder, photos = KINDS[kind][1](tmp_path), tmp_path / "photos"
    photos.mkdir()
    for k in range(2):
        pixels = np.random.default_rng(k).integers(0, 255, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{k}.png")
    words = (
        f"+experiment=photos_{kind} backbone.path={folder} backbone.device=cpu backbone.resolution=64 backbone.steps=2 "
        f"backbone.covariance.count=20 backbone.covariance.cache={tmp_path / 'cache'} concept.images={photos} "
        f"concept.name=mug concept.superclass='teddy bear' concept.placeholder='<mug*>' method.steps=3 "
        f"method.batch_size=2 method.value_rate=1.0 trainer.enable_progress_bar=false run.dir={tmp_path / 'run'}"
    )
    assert not main(shlex.split(words))
    pictures = {}
    for name, beta in (("own", 0.3), ("out", "inf")):
        config = GenerateConfig(
            concept=str(tmp_path / "run"), prompt="a photo of a <mug*>, on the beach", num=1, steps=2
        )
        config = dataclasses.replace(config, path=str(folder), device="cpu", height=64, width=64, dials={"beta": beta})
        out = generate(dataclasses.replace(config, out=str(tmp_path / name)))
        (file,) = [file for file in out.glob("*.png") if file.name != "grid.png"]
        pictures[name] = np.asarray(Image.open(file), dtype=int)
    pipe = backbones.load(kind, str(folder), device="cpu")
    guidance = backbones.default_config(kind).guidance
    (base,) = sample(pipe, ["a photo of a teddy bear, on the beach"], [0], 2, guidance, size=64)
    pictures["base"] = np.asarray(base, dtype=int)
    assert np.abs(pictures["own"] - pictures["base"]).max() > 8
    assert (pictures["out"] == pictures["base"]).all()
