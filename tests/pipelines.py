"""Small pipelines for tests: random weights, real block structures, plain diffusers folders."""

import atexit
import functools
import io
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    KolorsPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from perfusion.backbones.layouts import layout_config
from perfusion.backbones.sana import INSTRUCTION
from perfusion.toyland import models
from perfusion.toyland.captions import vocabulary
from perfusion.toyland.tokenizer import build_tokenizer

RESOLUTION = 64  # pixels that the tiny pipeline is made for
_TEXT = """
    a an the of on in at with and my one this photo picture painting sketch drawing good close up cropped bright dark
    rendering rendition clean dirty cool nice small large weird cat dog teddy bear bird man woman car book mug hat crown
    santa scarf box beach snow forest city street house table chair moon night wearing riding sitting standing sleeping
    skateboard cardboard watercolor mosaic front wooden red blue green old young
"""
WORDS = tuple(_TEXT.split())


def tiny_pipeline_folder(tmp_path: Path, **overrides: dict[str, Any]) -> Path:
    """A random `StableDiffusionPipeline` of SD 1.5's block structure with few channels, in `tmp_path`/pipeline.

    `overrides` replaces config values by part, e.g. `scheduler={"prediction_type": "v_prediction"}`. The same in every
    process; without overrides it is built once per process and copied.
    """
    if not overrides:
        return folder_of("pipeline", tmp_path)
    tiny_pipeline(**overrides).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def folder_of(kind: str, tmp_path: Path) -> Path:
    """A pipeline of `tiny_pipeline` (or sd21), `tiny_sdxl`, `tiny_kolors`, `tiny_pixart`, `tiny_sana` or
    `toyland_pipeline` in `tmp_path`/`kind`."""
    return Path(shutil.copytree(_built(kind), tmp_path / kind))


# SD 2.1: velocity, padding of its own, linear projections. Toyland: its architecture and tokenizer, random weights.
sd21_folder, sdxl_folder, toyland_folder = (functools.partial(folder_of, kind) for kind in ("sd21", "sdxl", "toyland"))


@functools.cache
def _built(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"perfusion-{kind}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build: dict[str, Any] = {"pipeline": tiny_pipeline, "sd21": lambda: tiny_pipeline("sd21"), "sdxl": tiny_sdxl}
    build |= {"pixart": tiny_pixart, "sana": tiny_sana, "kolors": tiny_kolors, "toyland": toyland_pipeline}
    build[kind]().save_pretrained(folder)
    return folder


_UNET = {"attention_head_dim": 2, "norm_num_groups": 4, "sample_size": RESOLUTION // 8}
_VAE = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "sample_size": RESOLUTION}
_ENCODER = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32, "num_hidden_layers": 2}
_ENCODER |= {"num_attention_heads": 2}


def tiny_pipeline(layout: str = "sd15", **overrides: dict[str, Any]) -> StableDiffusionPipeline:
    """The pipeline of `tiny_pipeline_folder` in memory; with `layout="sd21"` that of `sd21_folder`."""
    tokenizer = build_tokenizer(WORDS, positions=77)
    small: dict[str, Any] = {"unet": {"block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 32}}
    if layout == "sd21":
        tokenizer.pad_token = "!"
        small["unet"]["attention_head_dim"] = [1, 2, 2, 2]
    return _pipeline(tokenizer=tokenizer, **_modules(layout, overrides, tokenizer, small))


def _modules(layout: str, overrides: dict[str, Any], tokenizer: Any, small: dict[str, Any]) -> dict[str, Any]:
    """What a layout has but for its tokenizers, of random weights, where `small` and `overrides` replace its values."""
    parts = ("unet", "vae", "text_encoder", *["text_encoder_2"] * (layout == "sdxl"), "scheduler")
    ours: dict[str, Any] = {"unet": _UNET, "vae": _VAE, "text_encoder": _ENCODER | _ids(tokenizer)}
    config: dict[str, Any] = {}
    for part in parts:
        config[part] = layout_config(layout, part) | ours.get(part, {}) | small.get(part, {}) | overrides.get(part, {})
    made: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made["unet"] = UNet2DConditionModel.from_config(config["unet"])
        made["vae"] = AutoencoderKL.from_config(config["vae"])
        made["text_encoder"] = _spread(CLIPTextModel(CLIPTextConfig(**config["text_encoder"])))
        if "text_encoder_2" in config:
            made["text_encoder_2"] = _spread(CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"])))
    scheduler = config["scheduler"]
    return {**made, "scheduler": getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)}


def tiny_sdxl(**overrides: dict[str, Any]) -> StableDiffusionXLPipeline:
    """SDXL's structure with few channels, in memory: encoders of 32 and 48, contexts of 80, `overrides` by part.

    The second encoder looks for the end of text as that of SDXL does, at the largest id.
    """
    tokenizer, second = build_tokenizer(WORDS, positions=77), build_tokenizer(WORDS, positions=77)
    second.pad_token = "!"
    unet = {"block_out_channels": (8, 16, 16), "transformer_layers_per_block": [1, 1, 2], "cross_attention_dim": 80}
    unet |= {"attention_head_dim": [1, 2, 2], "addition_time_embed_dim": 8}
    unet["projection_class_embeddings_input_dim"] = 6 * 8 + 40
    wider = _ENCODER | {"hidden_size": 48, "projection_dim": 40, "vocab_size": len(second)}
    parts = _modules("sdxl", overrides, tokenizer, {"unet": unet, "text_encoder_2": wider})
    kind = functools.partial(StableDiffusionXLPipeline, tokenizer_2=second, add_watermarker=False)
    return _pipeline(kind, tokenizer=tokenizer, **parts)


def tiny_pixart(kind: Any = PixArtSigmaPipeline, **overrides: Any) -> Any:
    """PixArt's structure with two blocks, in memory: T5 of width 24, a transformer of width 16, learned variance.
    `overrides` are of the transformer."""
    tokenizer = t5_tokenizer()
    encoder = T5Config(vocab_size=len(tokenizer) + 4, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    encoder.update({"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0})
    config: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8}
    config |= {"num_layers": 2, "cross_attention_dim": 16, "sample_size": 8, "caption_channels": 24, "patch_size": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = PixArtTransformer2DModel(**config | overrides)
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
        vae = AutoencoderKL.from_config(layout_config("sd15", "vae") | _VAE)
        text_encoder = _spread(T5EncoderModel(encoder))
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear")
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    return _pipeline(kind, tokenizer=tokenizer, scheduler=scheduler, **parts)


def tiny_sana(**overrides: Any) -> SanaPipeline:
    """Sana's structure with two blocks, in memory: Gemma 2 of width 24, a transformer of width 16, flow matching.
    `overrides` are of the transformer."""
    tokenizer = gemma_tokenizer()
    encoder = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    encoder.update({"num_key_value_heads": 1, "head_dim": 12, "pad_token_id": tokenizer.pad_token_id})
    config: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2}
    config |= {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 24, "num_layers": 2}
    config |= {"in_channels": 4, "out_channels": 4, "sample_size": 2, "qk_norm": "rms_norm_across_heads"}
    sides = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "latent_channels": 4}
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    kinds = {"encoder_block_types": blocks, "decoder_block_types": blocks, "attention_head_dim": 4}
    layers = {"encoder_layers_per_block": (1,) * 4, "decoder_layers_per_block": (1,) * 4}
    scales = {"encoder_qkv_multiscales": ((), (), (), (5,)), "decoder_qkv_multiscales": ((), (), (), (5,))}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SanaTransformer2DModel(**config | overrides)
        vae = AutoencoderDC(**sides, **kinds, **layers, **scales)
        text_encoder = _spread(Gemma2Model(encoder))
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    return _pipeline(SanaPipeline, tokenizer=tokenizer, scheduler=scheduler, **parts)


def tiny_kolors(**overrides: Any) -> KolorsPipeline:
    """Kolors' structure with few channels, in memory: ChatGLM of width 24. `overrides` are of the UNet."""
    tokenizer = chatglm_tokenizer()
    encoder = ChatGLMConfig(
        num_layers=2, padded_vocab_size=len(tokenizer) + 8, hidden_size=24, ffn_hidden_size=32, kv_channels=8
    )
    encoder.update({"num_attention_heads": 3, "multi_query_attention": True, "multi_query_group_num": 1})
    encoder.update(dict.fromkeys(("original_rope", "use_cache", "add_qkv_bias", "post_layer_norm", "rmsnorm"), True))
    encoder.update({"seq_length": 256})
    config = layout_config("sdxl", "unet") | _UNET | {"block_out_channels": (8, 16, 16), "encoder_hid_dim": 24}
    config |= {"encoder_hid_dim_type": "text_proj", "cross_attention_dim": 32, "attention_head_dim": [1, 2, 2]}
    config |= {"transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8}
    config |= {"projection_class_embeddings_input_dim": 6 * 8 + 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(config | overrides)
        vae = AutoencoderKL.from_config(layout_config("sdxl", "vae") | _VAE)
        text_encoder = _spread(ChatGLMModel(encoder, empty_init=False))
        for parameter in text_encoder.parameters():  # which come as they lie in memory
            torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    scheduler = EulerDiscreteScheduler.from_config(layout_config("sdxl", "scheduler"))
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    return _pipeline(KolorsPipeline, tokenizer=tokenizer, scheduler=scheduler, **parts)


def chatglm_tokenizer() -> Any:
    """A SentencePiece tokenizer as ChatGLM has it, in Python: WORDS whole, other words in letters."""
    import sentencepiece  # an extra of its own

    made = io.BytesIO()
    sentences = [*("a photo of a " + word for word in WORDS), " ".join("abcdefghijklmnopqrstuvwxyz0123456789.,")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=made,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=[f"▁{word}" for word in WORDS],
    )
    folder = Path(tempfile.mkdtemp(prefix="perfusion-chatglm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    return ChatGLMTokenizer(str(folder / "tokenizer.model"), model_max_length=256)


def t5_tokenizer() -> Any:
    """A Unigram tokenizer as T5 has it: WORDS whole, other words in letters, no sign but the stop and the comma."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def gemma_tokenizer() -> Any:
    """A BPE tokenizer as Gemma has it, with bytes to fall back on: WORDS and those of Sana's instruction are whole
    where a space is before them."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n"]
    tokens += [chr(code) for code in range(33, 127)]
    merges: dict[tuple[str, str], None] = {}
    for word in dict.fromkeys((*WORDS, *re.findall(r"[A-Za-z]+", INSTRUCTION))):
        joined = "▁"
        for letter in word:
            merges[joined, letter] = None
            joined += letter
            tokens.append(joined)
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return GemmaTokenizer(vocab=vocab, merges=[*merges], model_max_length=8192)


def toyland_pipeline() -> StableDiffusionPipeline:
    """Toyland before its training, in memory."""
    tokenizer = build_tokenizer(vocabulary(), models.TEXT_POSITIONS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, vae, text_encoder = models.unet(), models.autoencoder(), _spread(models.text_encoder(tokenizer))
    return _pipeline(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=models.scheduler())


_stable_diffusion = functools.partial(
    StableDiffusionPipeline, safety_checker=None, feature_extractor=None, requires_safety_checker=False
)


def _pipeline(kind: Any = _stable_diffusion, **parts: Any) -> Any:
    """Of frozen parts."""
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _ids(tokenizer: Any) -> dict[str, int]:
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {"vocab_size": len(tokenizer), **special}


def _spread(text_encoder: Any) -> Any:
    """Larger embeddings than CLIP starts training with, so that different words get clearly different encodings."""
    with torch.no_grad():
        for module in text_encoder.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(20)
    return text_encoder


class Compiled(nn.Module):
    """In the shape of torch.compile's wrapper, whose import takes seconds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)
