"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the denoiser's attention, as DreamBooth is mostly run today.

Every projection W (h, d) of the attention, self and cross, becomes W + s α/r B A with A (r, d) and B (h, r) trained,
by a layer of PEFT around it. B starts at 0, and s is 1 in training. The text encoder stays as it is: the concept's
placeholder reads as "identifier superclass", such as "sks cat", and is written so where the concept is exported to.

The defaults are those of diffusers' DreamBooth script for LoRA on Stable Diffusion: 500 steps of one picture at 1e-4,
rank 4, without pictures of the class. The script has one prompt, "a photo of sks cat"; here they are the sentences of
`backbone.prompts`. Either way of preserving the prior can be asked for (`perfusion.methods.prior`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from peft.tuners import lora
from safetensors.torch import save_file
from torch import Tensor, nn

from perfusion.backbones.base import Backbone
from perfusion.config import ConfigError
from perfusion.editing import EditError
from perfusion.editing.places import Place, base_module
from perfusion.files import atomic_path
from perfusion.methods.base import Dial, Word, check_bounds
from perfusion.methods.prior import PriorMethod, PriorOptions

ADAPTER = "concept"  # PEFT's name of it; every concept has layers of its own


@dataclass
class LoRAOptions(PriorOptions):
    """What is commonly run on Stable Diffusion."""

    name: str = "lora"
    steps: int = 500
    batch_size: int = 1
    adapter_rate: float = 1e-4
    weight_decay: float = 1e-2  # AdamW's
    rank: int = 4
    alpha: float = 4.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])  # ends of layers' names
    identifier: str = "sks"  # before the superclass, where the placeholder stands; words that the model hardly knows
    scale: float = 1.0  # s in pictures, the strength; in training it is 1
    prompt: str | None = None
    prior_images: int = 0


class LoRA(PriorMethod):
    """Low-rank updates of the denoiser's attention, trained on a rare word beside the superclass.

    While it is attached, `scale` can be set; it starts at 1 in training mode, else as the options say.
    """

    Options = LoRAOptions
    dials = (Dial("scale", about="higher is more of the concept"),)
    newer = (
        *PriorMethod.newer,
        *("prompt", "prior_weight", "prior_images", "prior_prompt", "prior_steps", "prior_guidance", "prior_seed"),
    )
    options: LoRAOptions

    def __init__(self, options: LoRAOptions, word: Word) -> None:
        super().__init__(options, word)
        check_bounds(
            options,
            {
                "adapter_rate": (options.adapter_rate > 0, "more than 0"),
                "weight_decay": (options.weight_decay >= 0, "at least 0"),
                "rank": (1 <= options.rank <= 1024, "1 to 1024"),
                "alpha": (options.alpha > 0, "more than 0"),
                "targets": (bool(options.targets) and all(options.targets), "ends of names of layers, such as to_q"),
                "identifier": (bool(options.identifier.strip()), "one or several words, such as sks"),
                "scale": (math.isfinite(options.scale), "a finite number"),
            },
        )

    def clear(self) -> None:
        super().clear()
        self._adapters: dict[str, _Adapter] = {}  # by the name of the projection
        self.down, self.up = nn.ParameterList(), nn.ParameterList()  # A (r, d) and B (h, r) of each adapter
        self._scale = 1.0

    def put(self, backbone: Backbone, undo: ExitStack) -> None:
        """Add the word, and put a layer around every projection that is a target. A is drawn from torch's global
        generator, which is left as it was.

        Raises:
            BackboneError: the projections are fused.
            TokenError: the word cannot be added to the vocabulary.
            ConfigError: nothing in the denoiser is called as an option of `targets` says.
        """
        backbone.edit_sites()  # which it refuses where they are fused
        places = _projections(backbone.denoiser, self.options.targets)
        phrase = f"{self.options.identifier.strip()} {self.word.superclass}"
        self.add_word(undo, vectors=None, reads_as=phrase, trained=False)
        with torch.random.fork_rng(devices=[]):
            adapters = [_Adapter(self._layer(place.now), place) for place in places]
        for adapter in adapters:
            adapter.place.put(adapter.layer)
            undo.callback(adapter.leave)
            self._adapters[adapter.place.name] = adapter
            self.down.append(adapter.layer.lora_A[ADAPTER].weight)
            self.up.append(adapter.layer.lora_B[ADAPTER].weight)
        hook = backbone.denoiser.register_forward_pre_hook(self._before_call)
        undo.callback(hook.remove)
        self.scale = self._own_scale()

    @contextmanager
    def aside(self) -> Iterator[None]:
        scale, self.scale = self.scale, 0.0
        try:
            yield
        finally:
            self.scale = scale

    def _layer(self, projection: nn.Module) -> lora.Linear:
        config = LoraConfig(r=self.options.rank, lora_alpha=self.options.alpha)  # type: ignore[arg-type]
        layer = lora.Linear(projection, ADAPTER, config, r=config.r, lora_alpha=config.lora_alpha)
        for part in (layer.lora_A, layer.lora_B):
            part.float()  # what is trained is not rounded to the denoiser's dtype
        return layer.train(projection.training)

    def train(self, mode: bool = True) -> LoRA:
        """Training or eval mode, with the scale of each; one that was set is given up."""
        super().train(mode)
        if self._adapters:
            self.scale = self._own_scale()
        return self

    def _own_scale(self) -> float:
        return 1.0 if self.training else self.options.scale

    @property
    def scale(self) -> float:
        """s: 0 is the base model, 1 what was trained."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if not math.isfinite(value):
            raise EditError(f"scale of {self.word.placeholder}: found {value!r}, expected a finite number")
        self._scale = float(value)
        for adapter in self._adapters.values():
            adapter.layer.set_scale(ADAPTER, self._scale)

    def _before_call(self, denoiser: nn.Module, args: Any) -> None:
        for name, adapter in self._adapters.items():
            if problem := adapter.problem():
                raise EditError(
                    f"{name}: found the LoRA of {self.word.placeholder} {problem}, which would silently draw without "
                    "the concept; expected it in its place: undo that, or detach() the concept and attach it again"
                )

    def parameter_groups(self) -> list[dict[str, Any]]:
        rates = {"lr": self.options.adapter_rate, "weight_decay": self.options.weight_decay}
        return [{"name": "adapter", "params": [*self.down, *self.up], **rates}]

    def tensors(self) -> dict[str, Tensor]:
        """For every projection `<its name>.lora_A.weight`, A (r, d), and `<its name>.lora_B.weight`, B (h, r)."""
        named: dict[str, Tensor] = {}
        for name, a, b in zip(self._adapters, self.down, self.up, strict=True):
            named |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        return named

    def state_shapes(self, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for place in _projections(backbone.denoiser, self.options.targets):
            plain: Any = base_module(place.now)
            shapes[f"{place.name}.lora_A.weight"] = (self.options.rank, plain.in_features)
            shapes[f"{place.name}.lora_B.weight"] = (plain.out_features, self.options.rank)
        return shapes

    def export(self, folder: Path) -> list[Path]:
        """`pytorch_lora_weights.safetensors`, which the stock pipeline takes with `load_lora_weights(folder)`; nothing
        where it has no such function.

        There the prompt has "identifier superclass" in the placeholder's place, and `set_adapters` or
        `cross_attention_kwargs={"scale": s}` sets the scale; the file has none.
        """
        pipe = self.backbone.pipe
        if not hasattr(pipe, "load_lora_weights"):
            return []
        prefix = "transformer" if hasattr(pipe, "transformer") else "unet"  # the part of the pipeline
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LORA_WEIGHT_NAME_SAFE
        config = {"r": self.options.rank, "lora_alpha": self.options.alpha, "target_modules": sorted(self._adapters)}
        described = json.dumps({f"{prefix}.{key}": value for key, value in config.items()})
        weights = {f"{prefix}.{name}": weight for name, weight in self.state().items()}
        with atomic_path(path) as temporary:
            save_file(weights, temporary, {"format": "pt", LORA_ADAPTER_METADATA_KEY: described})
        return [path]


@dataclass(frozen=True)
class _Adapter:
    """A layer of PEFT around the projection at a place; other tuner layers may come around it."""

    layer: lora.Linear
    place: Place

    def leave(self) -> None:
        """Take the adapter out; and the layer, unless LoRA weights that were loaded later live in it."""
        others = [name for name in self.layer.r if name != ADAPTER]
        if others:
            active = [name for name in self.layer.active_adapters if name != ADAPTER]
            self.layer.set_adapter(active, inference_mode=True)
            self.layer.delete_adapter(ADAPTER)
        elif holder := self.place.holder(self.layer):
            holder.put(self.layer.base_layer)

    def problem(self) -> str | None:
        """Why the layer does not act, if it does not."""
        if self.place.holder(self.layer) is None:
            return "taken out (by unload_lora_weights, say)"
        if self.place.fused:
            return "bypassed (by fuse_qkv_projections)"
        if self.layer.merged:
            return "merged into the model (by fuse_lora)"
        if self.layer.disable_adapters or ADAPTER not in self.layer.active_adapters:
            return "switched off (by disable_lora, set_adapters or load_lora_weights)"
        return None


def _projections(denoiser: nn.Module, targets: list[str]) -> list[Place]:
    """Of every linear layer whose name ends in one of `targets`, in module order, and whatever is around it by now.
    Raises ConfigError for a target without any."""
    denoiser = base_module(denoiser)
    found: list[Place] = []
    unused = dict.fromkeys(targets)
    for name, module in denoiser.named_modules():
        ends = [target for target in targets if f".{name}".endswith(f".{target}")]
        if ends and isinstance(base_module(module), nn.Linear):
            parent, _, attribute = name.rpartition(".")
            found.append(Place(name, denoiser.get_submodule(parent), attribute))
            unused = {target: None for target in unused if target not in ends}
    if unused:
        raise ConfigError(
            f"method.targets: found {next(iter(unused))!r}, expected the end of the name of a linear layer of the "
            "denoiser, such as to_q"
        )
    return found


METHOD = LoRA
