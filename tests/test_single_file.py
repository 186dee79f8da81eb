"""Checkpoints in one safetensors file: the same pipeline as from a folder, without a hub, and clear errors."""

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from perfusion import backbones
from perfusion.backbones import single_file
from perfusion.backbones.base import BackboneError, TokenError
from perfusion.backbones.layouts import layout_folder
from perfusion.backbones.loading import Source, read_tokenizer
from perfusion.backbones.single_file import clip_tokenizer, layout_of
from perfusion.config import BackboneConfig
from perfusion.inspect import meta_backbone
from tests import backbone_kinds
from tests.pipelines import sdxl_folder, tiny_pipeline_folder
from tests.single_files import write_single_file

KINDS = {kind: made for kind, made in backbone_kinds.KINDS.items() if kind not in ("toyland", *backbone_kinds.BEYOND)}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def config_of(kind: str, path: Path, folder: Path | None, **values: Any) -> BackboneConfig:
    name = KINDS[kind][0]
    layout = None if folder is None else str(folder)
    given = {"path": str(path), "layout": layout, "resolution": 64, "device": "cpu"} | values
    return BackboneConfig(name=name, **given)


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[kind][1](tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write_single_file(DiffusionPipeline.from_pretrained(folder), folder.with_suffix(".safetensors"))


def states(backbone: Any) -> dict[str, dict[str, torch.Tensor]]:
    parts = {"unet": backbone.pipe.unet, "vae": backbone.pipe.vae, **backbone.text_encoders()}
    return {name: part.state_dict() for name, part in parts.items()}


def test_a_file_holds_the_pipeline_of_the_folder(kind: str, folder: Path, file: Path) -> None:
    cls: Any = backbones.backbone_class(KINDS[kind][0])
    one, other = cls.load(config_of(kind, file, folder)), cls.load(config_of(kind, folder, None))
    expected = states(other)
    for name, state in states(one).items():
        assert state.keys() == expected[name].keys()
        assert all(torch.equal(value, expected[name][key]) for key, value in state.items()), name
    assert one.fingerprint() == other.fingerprint() and one.prediction == other.prediction
    assert type(one.pipe) is type(other.pipe)
    assert {**one.pipe.scheduler.config} == {**other.pipe.scheduler.config}
    encodings = [backbone.encode(["a photo of a cat"], "cat") for backbone in (one, other)]
    assert torch.equal(encodings[0].context, encodings[1].context)


def test_a_file_loads_in_half_precision(kind: str, folder: Path, file: Path) -> None:
    backbone: Any = backbones.backbone_class(KINDS[kind][0]).load(config_of(kind, file, folder, dtype="float16"))
    found = {
        value.dtype for state in states(backbone).values() for value in state.values() if value.is_floating_point()
    }
    assert found == {torch.float16} and backbone.encode(["a cat"], "cat").context.dtype == torch.float16


def test_words_are_checked_without_the_weights(
    kind: str, folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perfusion.backbones.loading.read_single_file", None)
    config = config_of(kind, file, folder)
    backbones.backbone_class(config.name).check_words(config, "<cat*>", "cat")
    with pytest.raises(TokenError, match="'cat' is already a word"):
        backbones.backbone_class(config.name).check_words(config, "cat", "cat")


def test_a_file_is_measured_by_its_layout(kind: str, folder: Path, file: Path) -> None:
    backbone: Any = meta_backbone(KINDS[kind][0], str(file), str(folder))
    assert backbone.device.type == "meta"
    assert backbone.denoiser.config.cross_attention_dim == (80 if kind == "sdxl" else 32)


# --- the layout -----------------------------------------------------------------------------------------------------


def header(path: Path, width: int = 768, channels: int = 4, **others: torch.Tensor) -> Path:
    """A file with as much of a checkpoint as its layout is told by."""
    at = "model.diffusion_model.input_blocks"
    key = f"{at}.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: torch.zeros(2, width), f"{at}.0.0.weight": torch.zeros(2, channels, 3, 3), **others}, path)
    return path


@pytest.mark.parametrize(("width", "layout"), [(768, "sd15"), (2048, "sdxl")])
def test_the_layout_is_told_by_the_tensors(width: int, layout: str, tmp_path: Path) -> None:
    file = header(tmp_path / "x.safetensors", width)
    assert layout_of(file) == layout
    name = "sdxl" if layout == "sdxl" else "stable_diffusion"
    cls: Any = backbones.backbone_class(name)
    config = BackboneConfig(name=name, path=str(file))
    assert cls.source(config) == Source(str(file), local=True, layout=layout_folder(layout))
    # Nothing but the file itself is needed to check words, and to measure what a concept would be.
    backbones.backbone_class(config.name).check_words(config, "<my-cat*>", "teddy bear")
    assert len(meta_backbone(name, str(file)).edit_sites()) == (140 if layout == "sdxl" else 32)


def test_what_a_file_of_2_x_predicts_has_to_be_said(tmp_path: Path) -> None:
    file = header(tmp_path / "x.safetensors", 1024)
    with pytest.warns(UserWarning, match="taken for sd21. backbone.layout=sd21 or sd21_base says it"):
        assert layout_of(file) == "sd21"


@pytest.mark.parametrize(
    ("width", "channels", "message"),
    [
        (768, 9, r"holds a UNet with 9 input channels \(inpainting or the like\), expected 4"),
        (1280, 4, r"texts of width 1280, expected one of 768 \(sd15\), 1024 \(sd21 or sd21_base\), 2048 \(sdxl\); "),
    ],
)
def test_other_models_are_refused(width: int, channels: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=message):
        layout_of(header(tmp_path / "x.safetensors", width, channels))


def source(path: Path, name: str = "stable_diffusion", layout: str | None = None) -> Source:
    cls: Any = backbones.backbone_class(name)
    return cls.source(BackboneConfig(name=name, path=str(path), layout=layout))


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    for suffix in (".ckpt", ".pt", ".bin"):
        pickled = tmp_path / f"model{suffix}"
        pickled.write_bytes(b"x")
        with pytest.raises(BackboneError, match=rf"model\{suffix} is a file of type '\{suffix}', .*are pickles"):
            source(pickled)
    broken, lora, xl = (tmp_path / f"{name}.safetensors" for name in ("broken", "lora", "xl"))
    broken.write_bytes(b"\x00" * 30)
    with pytest.raises(BackboneError, match=r"backbone.path: cannot load .*broken.safetensors: "):
        source(broken)
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2)}, lora)
    with pytest.raises(BackboneError, match=r"lora.safetensors holds no UNet of Stable Diffusion .*is it a LoRA"):
        source(lora)
    with pytest.raises(BackboneError, match=r"layout sdxl, a StableDiffusionXLPipeline, expected a StableDiffusionPi"):
        source(header(xl, 2048))
    with pytest.raises(BackboneError, match=r"a StableDiffusionPipeline, expected a StableDiffusionXLPipeline"):
        source(header(xl, 768), "sdxl")
    with pytest.raises(BackboneError, match=r"backbone.layout: no layout 'sd14'; there are: kolors, "):
        source(header(xl, 768), layout="sd14")
    with pytest.raises(BackboneError, match=r"backbone.layout: found 'sd15' beside backbone.path=.*only with a"):
        source(layout_folder("sd15"), layout="sd15")


_TEXT = "cond_stage_model.transformer.text_model.encoder.layers.1"
_OPEN_CLIP = "conditioner.embedders.1.model"


@pytest.mark.parametrize(
    ("layout", "drop", "message"),
    [
        ("sd15", "cond_stage_model.", "Weights for this component appear to be missing in the checkpoint"),
        ("sd15", f"{_TEXT}.mlp.fc1.weight", "first text_encoder.encoder.layers.1.mlp.fc1.weight "),
        ("sd15", "first_stage_model.decoder.conv_out.bias", "first vae.decoder.conv_out.bias "),
        ("sd15", "model.diffusion_model.out.2.bias", "first unet.conv_out.bias "),
        ("sdxl", f"{_OPEN_CLIP}.text_projection", "first text_encoder_2.text_projection.weight "),
        ("sdxl", f"{_OPEN_CLIP}.ln_final.bias", "first text_encoder_2.text_model.final_layer_norm.bias "),
    ],
)
def test_checkpoints_that_are_not_whole_are_refused(layout: str, drop: str, message: str, tmp_path: Path) -> None:
    name, make = KINDS[layout]
    folder = make(tmp_path)
    file = write_single_file(DiffusionPipeline.from_pretrained(folder), tmp_path / "x.safetensors", drop)
    cls: Any = backbones.backbone_class(name)
    with pytest.raises(BackboneError, match=rf"^backbone.path: .*x.safetensors.*{message}"):
        cls.load(config_of(layout, file, folder))


def test_a_checkpoint_says_that_it_predicts_the_velocity(tmp_path: Path) -> None:
    folder = sdxl_folder(tmp_path)
    marks = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    file = write_single_file(DiffusionPipeline.from_pretrained(folder), tmp_path / "x.safetensors", **marks)
    cls: Any = backbones.backbone_class("sdxl")
    backbone = cls.load(config_of("sdxl", file, folder))
    assert backbone.prediction == backbone.pipe.scheduler.config.prediction_type == "v_prediction"
    assert backbone.pipe.scheduler.config.rescale_betas_zero_snr is True
    assert set(marks) <= set(load_file(file))


# --- the tokenizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "name", "pad"), [("sd15", "tokenizer", 49407), ("sdxl", "tokenizer_2", 0)])
def test_clips_own_tokenizer_is_at_hand(layout: str, name: str, pad: int) -> None:
    tokenizer = read_tokenizer(Source("x.safetensors", True, layout_folder(layout)), name)
    assert len(tokenizer) == 49_408 and tokenizer.model_max_length == 77
    # The ids of this sentence are known from CLIP's own examples.
    ids = tokenizer("A photo of a cat", padding="max_length", max_length=9).input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, pad, pad]
    assert tokenizer.decode([1929]).strip() == "dog"


def test_what_is_missing_without_a_vocabulary_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_file, "_VOCABULARY", "nowhere.txt.gz")
    with pytest.raises(BackboneError, match=r"CLIP's vocabulary is not in the open_clip package here; .*merges.txt"):
        clip_tokenizer("!")
    folder = tiny_pipeline_folder(tmp_path)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(
        BackboneError, match=r"backbone.layout: found no tokenizer in .*, expected tokenizer/vocab.json"
    ):
        read_tokenizer(Source("x.safetensors", True, folder), "tokenizer")
