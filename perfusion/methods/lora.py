"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the denoiser's attention, as DreamBooth is mostly run today.

Every projection W (h, d) of the attention, self and cross, becomes W + s α/r B A with A (r, d) and B (h, r) trained,
by a layer of PEFT around it. B starts at 0, and s is 1 in training. The text encoder stays as it is: the concept's
placeholder reads as "identifier superclass", such as "sks cat", and is written so where the concept is exported to.

The defaults are those of diffusers' DreamBooth script for LoRA on Stable Diffusion: 500 steps of one picture at 1e-4,
rank 4, without pictures of the class. The script has one prompt, "a photo of sks cat"; here they are the sentences of
`backbone.prompts`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from peft import LoraConfig
from peft.tuners import lora
from safetensors.torch import save_file
from torch import Tensor, nn

from perfusion.backbones.base import Backbone
from perfusion.config import ConfigError
from perfusion.editing import EditError
from perfusion.editing.layer import holder_of
from perfusion.editing.places import base_module
from perfusion.files import atomic_path
from perfusion.methods.base import Dial, Method, MethodOptions, Word, check_bounds

ADAPTER = "concept"  # PEFT's name of it; every concept has layers of its own
_PREFIX = "unet"  # of stock files: the part of the pipeline


@dataclass
class LoRAOptions(MethodOptions):
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
    masked_loss: bool = False  # weigh the error by the masks, where there are some; the script has none


class LoRA(Method):
    """See the module. While it is attached, `scale` can be set; it starts at 1 in training mode, else as the options
    say."""

    Options = LoRAOptions
    dials = (Dial("scale"),)
    options: LoRAOptions

    def __init__(self, options: LoRAOptions, word: Word) -> None:
        super().__init__(options, word)
        check_bounds(
            options,
            {
                "adapter_rate": (options.adapter_rate > 0, "more than 0"),
                "weight_decay": (options.weight_decay >= 0, "at least 0"),
                "rank": (options.rank >= 1, "at least 1"),
                "alpha": (options.alpha > 0, "more than 0"),
                "targets": (bool(options.targets) and all(options.targets), "ends of names of layers, such as to_q"),
                "identifier": (bool(options.identifier.strip()), "one or several words, such as sks"),
                "scale": (math.isfinite(options.scale), "a finite number"),
            },
        )
        self._undo = ExitStack()
        self._clear()

    def _clear(self) -> None:
        self._layers: dict[str, _Place] = {}  # name of the projection -> where its layer is; empty: not attached
        self.down, self.up = nn.ParameterList(), nn.ParameterList()  # A (r, d) and B (h, r) of each layer
        self._scale = 1.0

    def attach(self, backbone: Backbone) -> None:
        """See the seam. A is drawn from torch's global generator, which is left as it was.

        Raises:
            EditError: this method is attached already.
            BackboneError: the projections are fused.
            TokenError: the word cannot be added to the vocabulary.
            ConfigError: nothing in the denoiser is called as an option of `targets` says.
        """
        if self._layers:
            raise EditError(f"{self.word.placeholder}: found it attached already, expected detach() before attach()")
        backbone.edit_sites()  # which it refuses where they are fused
        found = _projections(backbone.denoiser, self.options.targets)
        with ExitStack() as undo:
            undo.callback(self._clear)
            phrase = f"{self.options.identifier.strip()} {self.word.superclass}"
            token = backbone.add_token(self.word.placeholder, phrase, vectors=None)
            undo.callback(token.remove)
            for vectors in token.embeddings().values():
                vectors.requires_grad_(False)
            with torch.random.fork_rng(devices=[]):
                layers = {name: self._layer(getattr(*place)) for name, place in found.items()}
            for name, layer in layers.items():
                place = _Place(layer, *found[name])
                place.enter()
                undo.callback(place.leave)
                self._layers[name] = place
                self.down.append(layer.lora_A[ADAPTER].weight)
                self.up.append(layer.lora_B[ADAPTER].weight)
            hook = backbone.denoiser.register_forward_pre_hook(self._before_call)
            undo.callback(hook.remove)
            self.scale = self._own_scale()
            self._undo = undo.pop_all()

    def detach(self) -> None:
        self._undo.close()

    def _layer(self, projection: nn.Module) -> lora.Linear:
        config = LoraConfig(r=self.options.rank, lora_alpha=self.options.alpha)  # type: ignore[arg-type]
        layer = lora.Linear(projection, ADAPTER, config, r=config.r, lora_alpha=config.lora_alpha)
        for part in (layer.lora_A, layer.lora_B):
            part.float()  # what is trained is not rounded to the denoiser's dtype
        return layer.train(projection.training)

    def train(self, mode: bool = True) -> LoRA:
        """Training or eval mode, with the scale of each; one that was set is given up."""
        super().train(mode)
        if self._layers:
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
        for place in self._layers.values():
            place.layer.set_scale(ADAPTER, self._scale)

    def _before_call(self, denoiser: nn.Module, args: Any) -> None:
        for name, place in self._layers.items():
            if problem := place.problem():
                raise EditError(
                    f"{name}: found the LoRA of {self.word.placeholder} {problem}, which would silently draw without "
                    "the concept; expected it in its place: undo that, or detach() the concept and attach it again"
                )

    def parameter_groups(self) -> list[dict[str, Any]]:
        rates = {"lr": self.options.adapter_rate, "weight_decay": self.options.weight_decay}
        return [{"name": "adapter", "params": [*self.down, *self.up], **rates}]

    def state(self) -> dict[str, Tensor]:
        """For every projection `<its name>.lora_A.weight`, A (r, d), and `<its name>.lora_B.weight`, B (h, r)."""
        return {
            name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in self._named_weights().items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, weight in self._named_weights().items():
            weight.copy_(state[name])

    def _named_weights(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name, a, b in zip(self._layers, self.down, self.up, strict=True):
            named |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        return named

    def state_shapes(self, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, place in _projections(backbone.denoiser, self.options.targets).items():
            plain: Any = base_module(getattr(*place))
            shapes[f"{name}.lora_A.weight"] = (self.options.rank, plain.in_features)
            shapes[f"{name}.lora_B.weight"] = (plain.out_features, self.options.rank)
        return shapes

    def export(self, folder: Path) -> list[Path]:
        """`pytorch_lora_weights.safetensors`, which the stock pipeline takes with `load_lora_weights(folder)`.

        There the prompt has "identifier superclass" in the placeholder's place, and `set_adapters` or
        `cross_attention_kwargs={"scale": s}` sets the scale; the file has none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LORA_WEIGHT_NAME_SAFE
        config = {"r": self.options.rank, "lora_alpha": self.options.alpha, "target_modules": sorted(self._layers)}
        described = json.dumps({f"{_PREFIX}.{key}": value for key, value in config.items()})
        weights = {f"{_PREFIX}.{name}": weight for name, weight in self.state().items()}
        with atomic_path(path) as temporary:
            save_file(weights, temporary, {"format": "pt", LORA_ADAPTER_METADATA_KEY: described})
        return [path]


@dataclass(frozen=True)
class _Place:
    """A layer of PEFT around a projection, at the attribute of a module; other tuner layers may come around it."""

    layer: lora.Linear
    parent: nn.Module
    attribute: str

    def enter(self) -> None:
        setattr(self.parent, self.attribute, self.layer)

    def leave(self) -> None:
        """Take the adapter out; and the layer, unless LoRA weights that were loaded later live in it."""
        others = [name for name in self.layer.r if name != ADAPTER]
        if others:
            active = [name for name in self.layer.active_adapters if name != ADAPTER]
            self.layer.set_adapter(active, inference_mode=True)
            self.layer.delete_adapter(ADAPTER)
        elif holder := holder_of(self.layer, self.parent, self.attribute):
            setattr(*holder, self.layer.base_layer)

    def problem(self) -> str | None:
        """Why the layer does not act, if it does not."""
        if holder_of(self.layer, self.parent, self.attribute) is None:
            return "taken out (by unload_lora_weights, say)"
        if isinstance(getattr(self.parent, "processor", None), FusedAttnProcessor2_0):
            return "bypassed (by fuse_qkv_projections)"
        if self.layer.merged:
            return "merged into the model (by fuse_lora)"
        if self.layer.disable_adapters or ADAPTER not in self.layer.active_adapters:
            return "switched off (by disable_lora, set_adapters or load_lora_weights)"
        return None


def _projections(denoiser: nn.Module, targets: list[str]) -> dict[str, tuple[nn.Module, str]]:
    """Name -> module and attribute that hold it, of every linear layer whose name ends in one of `targets`; in module
    order, and whatever is around it by now. Raises ConfigError for a target without any."""
    denoiser = base_module(denoiser)
    found: dict[str, tuple[nn.Module, str]] = {}
    unused = dict.fromkeys(targets)
    for name, module in denoiser.named_modules():
        ends = [target for target in targets if f".{name}".endswith(f".{target}")]
        if ends and isinstance(base_module(module), nn.Linear):
            parent, _, attribute = name.rpartition(".")
            found[name] = denoiser.get_submodule(parent), attribute
            unused = {target: None for target in unused if target not in ends}
    if unused:
        raise ConfigError(
            f"method.targets: found {next(iter(unused))!r}, expected the end of the name of a linear layer of the "
            "denoiser, such as to_q"
        )
    return found


METHOD = LoRA
