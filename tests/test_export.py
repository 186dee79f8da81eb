"""A concept as a LoRA and a textual inversion: stock diffusers loads them and projects what float64 says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from perfusion.backbones.base import Backbone
from perfusion.cli import run_cli
from perfusion.concept import Concept, save_concept
from perfusion.data.prompts import fill, validation_prompts
from perfusion.export import ExportConfig, export, main
from perfusion.methods.base import Word
from perfusion.methods.perfusion import superclass_encoding
from tests.concepts import random_concept, tiny_sdxl_backbone, untrained_concept
from tests.pipelines import sdxl_folder, tiny_pipeline_folder

WORD = Word("<bear*>", "teddy bear")
PROMPT = "a photo of <bear*> on the beach"
BETA, TAU = 0.6, 0.2
STRENGTH = 1 / (1 + 2.718281828459045 ** ((BETA - 1) / TAU))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline_folder(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Path]:
    root = tmp_path_factory.mktemp("sdxl")
    return tiny_sdxl_backbone(root), sdxl_folder(root)


def exported(concept: Concept, weights: Path, here: Path, **options: Any) -> tuple[Concept, Path, list[str]]:
    save_concept(here / "concept.safetensors", concept)
    config = ExportConfig(str(here / "concept.safetensors"), path=str(weights), out=str(here / "out"), **options)
    out, lines = export(config)
    return Concept.load(here / "concept.safetensors"), out, lines


def expected(concept: Concept, s: torch.Tensor, e: torch.Tensor, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """K and V of encodings e (..., d), each in float64, from the paper's terms and the file's numbers."""
    i, v, values = (concept.tensors[name].double() for name in ("target_input", "direction", "values"))
    r = (e @ v) / (i @ v)
    removed = STRENGTH * r if concept.settings.get("removal") == "gated" else r
    own = {"v": values, "k": concept.tensors["keys"].double() if "keys" in concept.tensors else None}
    place = {"k": 0, "v": 0}
    found = {}
    for name, W in weights.items():
        kind = name[-1]
        stack, start = own[kind], place[kind]
        o = W @ s.double() if stack is None else stack[start : start + len(W)]
        place[kind] += len(W)
        found[name] = (e - removed[..., None] * i) @ W.T + (STRENGTH * r)[..., None] * o
    return found


def projected(pipe: Any, prompt: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Encoding of a prompt, and what every K and V of cross-attention gives for it."""
    with torch.no_grad():
        e = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
        layers = [
            (name, part) for name, part in pipe.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))
        ]
        return e, {name: layer(e) for name, layer in layers}


def weights_of(pipe: Any) -> dict[str, torch.Tensor]:
    names = ("attn2.to_k", "attn2.to_v")
    return {name: part.weight.detach().double() for name, part in pipe.unet.named_modules() if name.endswith(names)}


@pytest.mark.parametrize("names", ["-diffusers", ""], ids=["diffusers", "kohya"])
@pytest.mark.parametrize(
    "options", [{}, {"key_lock": "none"}, {"removal": "gated", "vectors": 2, "key_lock": "global"}]
)
def test_stock_diffusers_projects_what_float64_says(
    options: dict[str, Any], names: str, backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    made = untrained_concept(backbone, WORD, 0, **options)
    concept, out, _ = exported(made, folder, tmp_path, beta=BETA, tau=TAU)
    assert {path.name for path in out.iterdir()} == {
        "bear-beta-0.6.safetensors", "bear-beta-0.6-diffusers.safetensors", "bear-word.safetensors",
    }  # fmt: skip
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    weights, s = weights_of(pipe), superclass_encoding(backbone, "teddy bear")
    pipe.load_textual_inversion(str(out / "bear-word.safetensors"))
    pipe.load_lora_weights(str(out), weight_name=f"bear-beta-0.6{names}.safetensors")
    e, found = projected(pipe, PROMPT)
    with concept.attach(backbone):
        assert torch.allclose(e, backbone.encode([PROMPT], WORD.placeholder).context, atol=1e-5), "the same word"
    assert len(found) == 32
    for name, h in expected(concept, s, e.double(), weights).items():
        assert torch.allclose(found[name].double(), h, rtol=1e-4, atol=1e-4 * float(h.abs().max())), name
        assert (found[name].double() - e.double() @ weights[name].T).abs().max() > 0.01 * h.abs().max(), "an edit"
    pipe.set_progress_bar_config(disable=True)
    assert pipe(PROMPT, num_inference_steps=1, output_type="np", height=64, width=64).images.std() > 0


def test_how_far_it_is_from_the_gated_edit_is_measured(backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    concept, out, lines = exported(untrained_concept(backbone, WORD, 2), folder, tmp_path, beta=BETA, tau=TAU)
    assert f"β 0.6, τ 0.2: strength s = {STRENGTH:.3f}" in lines
    (told,) = [line.split() for line in lines if line.startswith("at the word ") and " V " in line]
    tensors = load_file(out / "bear-beta-0.6-diffusers.safetensors")
    prompts = [fill(template, WORD.placeholder) for template in validation_prompts("imagenet")]
    errors, plain = [], []
    with concept.attach(backbone, beta=BETA, tau=TAU), torch.no_grad():
        encoding = backbone.encode(prompts, WORD.placeholder)
        e = encoding.context[encoding.concept]
        for site in (site for site in backbone.edit_sites() if site.kind == "v"):
            gated, W = site.projection(encoding.context)[encoding.concept], site.projection.weight
            assert isinstance(W, torch.Tensor)
            down, up = (tensors[f"unet.{site.name}.lora_{part}.weight"] for part in "AB")
            errors.append(float((e @ (W + up @ down).T - gated).norm() / gated.norm()))
            plain.append(float((e @ W.T - gated).norm() / gated.norm()))
    assert len(e) == len(prompts)
    assert [float(told[-3]), float(told[-1])] == pytest.approx(
        [sum(errors) / len(errors), sum(plain) / len(plain)], abs=2e-3
    )


def test_sdxl(xl: tuple[Backbone, Path], tmp_path: Path) -> None:
    backbone, weights = xl
    concept, out, _ = exported(untrained_concept(backbone, WORD, 0), weights, tmp_path, beta=BETA, tau=TAU, name="b")
    s = superclass_encoding(backbone, "teddy bear")
    for names in ("-diffusers", ""):
        pipe: Any = StableDiffusionXLPipeline.from_pretrained(weights, add_watermarker=False)
        plain, vectors = weights_of(pipe), load_file(out / "b-word.safetensors")
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            parts = {kind: getattr(pipe, f"{kind}{end}") for kind in ("text_encoder", "tokenizer")}
            pipe.load_textual_inversion(vectors[key], token=WORD.placeholder, **parts)
        pipe.load_lora_weights(str(out), weight_name=f"b-beta-0.6{names}.safetensors")
        e, found = projected(pipe, PROMPT)
        for name, h in expected(concept, s, e.double(), plain).items():
            assert torch.allclose(found[name].double(), h, rtol=1e-4, atol=1e-4 * float(h.abs().max())), name


def test_mistakes(backbone: Backbone, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "concept.safetensors"
    save_concept(file, untrained_concept(backbone, WORD, 0))
    words = [f"concept={file}", f"path={folder}", f"out={tmp_path}/out"]
    assert run_cli(main, words) == 0
    assert "at the word" in capsys.readouterr().out and len([*(tmp_path / "out").iterdir()]) == 3
    assert run_cli(main, words) == 2 and "exists, expected a new file" in capsys.readouterr().err
    assert run_cli(main, [*words, "beta=inf"]) == 2 and "beta: found inf" in capsys.readouterr().err
    save_concept(file, random_concept(backbone, WORD, 0, name="lora"))
    assert run_cli(main, words) == 2 and "found a concept of the method 'lora'" in capsys.readouterr().err
