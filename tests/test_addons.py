"""`generate` with what others made for the same model: each is seen in a picture, beside the concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import perfusion
from perfusion.addons import load_embeddings
from perfusion.cli import run_cli
from perfusion.concept import save_concept
from perfusion.generate import main
from perfusion.manifest import ImageRecord, read_manifest
from perfusion.methods.base import Word
from tests.concepts import tiny_backbone, untrained_concept
from tests.pipelines import tiny_pipeline_folder, tiny_sdxl

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
STYLED = "a photo of <bear*> on the beach, <style>"
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the folder of a run with a concept of it, two LoRAs, and embeddings of every kind."""
    root = tmp_path_factory.mktemp("given")
    pipe: Any = perfusion.load("sd15", str(tiny_pipeline_folder(root)), device="cpu")
    concept = untrained_concept(tiny_backbone(root / "covariance"), Word("<bear*>", "teddy bear"), 0)
    save_concept(root / "run" / "concept.safetensors", concept)
    layer = pipe.unet.get_submodule(LAYER)
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, layer.in_features, generator=draw), torch.randn(layer.out_features, 2, generator=draw)
    save_file({f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}, root / "style.safetensors")
    kohya = f"lora_unet_{LAYER.replace('.', '_')}"
    alpha = {f"{kohya}.alpha": torch.tensor(2.0)}
    save_file({f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, **alpha}, root / "kohya.safetensors")
    save_file(
        {"unet.no.such.layer.lora_A.weight": down, "unet.no.such.layer.lora_B.weight": up}, root / "o.safetensors"
    )
    vectors = torch.randn(2, pipe.text_encoder.config.hidden_size, generator=draw)
    save_file({"<style>": vectors}, root / "learned.safetensors")
    (root / "a1111").mkdir()
    save_file({"emb_params": vectors}, root / "a1111" / "<style>.safetensors")
    torch.save({"string_to_param": {"*": vectors}, "name": "x"}, root / "a1111" / "<style>.pt")
    save_file({"<style>": vectors[:, :5].contiguous()}, root / "narrow.safetensors")
    return root


def run(given: Path, *words: str, prompt: str = STYLED) -> int:
    command = [f"concept={given}/run", f"path={given}/pipeline", "device=cpu", "steps=5", "num=1", f"prompt={prompt}"]
    return run_cli(main, [*command, *words])


def drawn(given: Path, out: str, *words: str, **more: str) -> tuple[bytes, ImageRecord]:
    assert run(given, *words, f"out={out}", **more) == 0
    (record,) = read_manifest(out)
    with Image.open(Path(out) / record.file) as image:
        assert record.width is None or image.size == (record.width, record.height)
        return image.tobytes(), record


def test_loras_of_every_format_at_their_scales(given: Path) -> None:
    plain, record = drawn(given, "plain")
    assert record.loras is None and record.embeddings is None
    styled, record = drawn(given, "styled", f"lora={given}/style.safetensors")
    assert record.loras == "style.safetensors 1" and styled != plain
    assert drawn(given, "kohya", f"lora={given}/kohya.safetensors")[0] == styled
    assert drawn(given, "none", f"lora={given}/style.safetensors", "lora_scale=0")[0] == plain
    both = f"lora=[{given}/style.safetensors,{given}/kohya.safetensors]"
    assert drawn(given, "both", both, "lora_scale=[0,1]")[0] == styled
    weak, record = drawn(given, "weak", both, "lora_scale=0.2")
    assert weak not in (plain, styled) and record.loras == "style.safetensors 0.2, kohya.safetensors 0.2"
    base = drawn(given, "base", f"lora={given}/style.safetensors", "beta=inf")[0]
    assert base not in (styled, plain), "the concept is to be seen beside the LoRA"


def test_embeddings_of_every_format(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = drawn(given, "plain")
    own, record = drawn(given, "own", f"embedding={given}/learned.safetensors")
    assert own != plain and record.embeddings == "<style>" and "words of embeddings: <style>" in capsys.readouterr().out
    assert drawn(given, "a", f"embedding={given}/a1111/<style>.safetensors")[0] == own
    assert drawn(given, "b", f"embedding={given}/a1111/<style>.pt")[0] == own
    assert drawn(given, "base", f"embedding={given}/learned.safetensors", "beta=inf")[0] != own


def test_what_stock_calls_take(given: Path) -> None:
    plain, _ = drawn(given, "plain")
    negative, record = drawn(given, "negative", "negative_prompt=a [red] dog")
    assert negative != plain and record.negative_prompt == "a [red] dog"
    wide, record = drawn(given, "wide", "width=128", "height=64")
    assert (record.width, record.height) == (128, 64) and len(wide) == 2 * len(plain)
    seen = {drawn(given, name, f"scheduler={name}")[0] for name in ("dpm++", "unipc", "euler")}
    assert len(seen | {plain}) == 4 and drawn(given, "ddim", "scheduler=ddim")[0] == plain
    assert read_manifest("euler")[0].scheduler == "EulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "lora={given}/no.safetensors",
            "lora: {given}/no.safetensors: found no such file, expected a .safetensors file",
        ),
        ("lora={given}/a1111/<style>.pt", "lora: {given}/a1111/<style>.pt: found a file of type '.pt', expected"),
        ("lora={given}/o.safetensors", "lora: {given}/o.safetensors does not fit this model: "),
        ("lora={given}/style.safetensors lora_scale=x", "lora_scale: found 'x', expected a number, or one for each"),
        ("lora={given}/style.safetensors lora_scale=[1,2]", "lora_scale: found [1, 2], expected a number, or one for"),
        ("embedding={given}/no.safetensors", "embedding: {given}/no.safetensors: found no such file"),
        ("embedding={given}/style.safetensors", "embedding: {given}/style.safetensors: found 2 tensors, expected one"),
        ("embedding={given}/narrow.safetensors", "embedding: {given}/narrow.safetensors does not fit this model: "),
        ("scheduler=magic", "scheduler: found 'magic', expected one of ddim, dpm++, unipc, euler"),
        ("width=64", "width, height: found one of them, expected both or none"),
        ("width=60 height=64", "width: found 60, expected a multiple of 8 pixels"),
    ],
)
def test_mistakes(words: str, says: str, given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(given, *words.format(given=given).split()) == 2
    assert f"error: {says.format(given=given)}" in capsys.readouterr().err and not Path("generated").exists()


def test_an_embedding_for_sdxl_is_read_by_both_text_encoders(tmp_path: Path) -> None:
    pipe = tiny_sdxl()
    widths = {"clip_l": pipe.text_encoder.config.hidden_size, "clip_g": pipe.text_encoder_2.config.hidden_size}
    draw = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(1, width, generator=draw) for name, width in widths.items()}
    save_file(vectors, tmp_path / "<style>.safetensors")
    assert load_embeddings(pipe, [str(tmp_path / "<style>.safetensors")]) == ["<style>"]
    for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
        (token,) = getattr(pipe, f"tokenizer{suffix}")("<style>", add_special_tokens=False).input_ids
        table = getattr(pipe, f"text_encoder{suffix}").get_input_embeddings().weight
        assert torch.equal(table[token], vectors[name][0])
