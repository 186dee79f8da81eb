"""Perfusion (arXiv 2305.01644): a gated rank-one edit of the cross-attention's K and V, with the keys locked.

Trained are the outputs o*_V of the V projections and the embedding of the concept's word. The target input i* follows
the word's encodings by a moving average; the keys are locked to the superclass, o*_K = W_K s.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from perfusion.backbones.base import Backbone, Encoding
from perfusion.data.prompts import fill, templates
from perfusion.editing import EditError
from perfusion.editing.equations import precision_times
from perfusion.editing.gate import PromptGate, cosines
from perfusion.editing.layer import attach_edit, unedited, without_bias
from perfusion.editing.places import EditSite
from perfusion.methods.base import Dial, Method, MethodOptions, Word, check_bounds
from perfusion.methods.weights import check_free, projection_places

TWINS = 10  # degrees between the i* of two concepts
MAX_SLANT = 1e6  # of what is drawn; it is 1 for C = 1, and about √κ/2 at most for a C of condition κ


# What the K projections give at the concept.
#   local: the superclass's keys, o*_K = W_K s, fixed.
#   global: in training the same; in pictures the keys of the whole prompt are those of the prompt that has the
#     superclass in the concept's place.
#   none: o*_K is trained like o*_V, the paper's ablation "trained-K".
KeyLock = Enum("KeyLock", {"local": "local", "global": "global", "none": "none"}, module=__name__)
GLOBAL = KeyLock["global"]

# What the edit takes out of the encodings e of a prompt, r(e) being the similarity to the concept and g(e) its gate.
#   full: r i*, as in the paper, whether the gate is open or not. Where β is above 1 and the gate of the concept's own
#     word closes, little is left of it.
#   gated: g r i*. Where the gate is closed an encoding stays as it is: other words, and the concept at a high β.
Removal = Enum("Removal", {"full": "full", "gated": "gated"}, module=__name__)


def slant(i: Tensor, direction: Tensor) -> float:
    """‖i*‖‖v‖ / |<i*, v>| of a target input i* and its direction v = C⁻¹i*, (d,) both."""
    return float(i.norm() * direction.norm() / (i @ direction).abs())


@dataclass
class PerfusionOptions(MethodOptions):
    """The paper's values for Stable Diffusion."""

    name: str = "perfusion"
    beta: float = 0.75  # of the gate, while training
    tau: float = 0.1
    sample_beta: float = 0.7  # of the gate, otherwise
    sample_tau: float = 0.15
    ema: float = 0.99  # share of i* that stays at each step
    value_rate: float = 0.03  # of o*_V, and of o*_K where it is trained
    embedding_rate: float = 0.006
    weight_decay: float = 0.0  # AdamW's; the paper gives none, and zero is no better value for an output or a word
    key_lock: KeyLock = KeyLock.local
    removal: Removal = Removal.full
    vectors: int = 1  # of the concept's word
    direction_only: bool = False  # these keep their norms, see `textual_inversion`
    masked_loss: bool = True  # weigh the error by the masks, where there are some; the paper's ablation is without


class Perfusion(Method):
    """Gated rank-1 edits of the cross-attention's K and V, with keys locked to the superclass (Tewel et al. 2023).

    While it is attached, `beta` and `tau` can be set; in training mode they start at the options' `beta` and `tau`, in
    eval mode at `sample_beta` and `sample_tau`.
    """

    Options = PerfusionOptions
    dials = (
        Dial("beta", per_picture=True, between=(0.2, 1.4), about="lower is more of the concept"),
        Dial("tau", per_picture=True, between=(0.05, 0.3), about="softness of the gate"),
        Dial("key_lock", number=False, words=("local", "global"), about="where the prompt's keys come from"),
    )
    needs_covariance = True
    newer = (*Method.newer, "removal", "direction_only")
    options: PerfusionOptions

    def __init__(self, options: PerfusionOptions, word: Word) -> None:
        super().__init__(options, word)
        _check(options)

    def clear(self) -> None:
        super().clear()
        self.gate: PromptGate | None = None
        self.values, self.keys = nn.ParameterList(), nn.ParameterList()  # o*_V, trained o*_K: (1, h) for each site

    def put(self, backbone: Backbone, undo: ExitStack) -> None:
        """Edit all K and V, and add the word. In eval mode the second moment is computed only if no state that holds
        its part is loaded.

        Raises:
            EditError: an edit is there: any, if this concept is being trained, else one that is being trained; or
                another concept's own K and V are.
            TokenError: the word cannot be added to the vocabulary.
        """
        check_free(projection_places(backbone))
        s = superclass_encoding(backbone, self.word.superclass)
        self._directions = _Directions(backbone)
        gated = self.options.removal is Removal.gated
        self.gate = gate = PromptGate(s[None], self._directions, s[None], *self._gate_settings(), gated)
        gate.label = self.word.placeholder
        sites = backbone.edit_sites()
        outputs = {site.name: self._target_outputs(site, s) for site in sites}
        # A concept that is trained has the model for itself; trained ones may come together.
        self._edit = attach_edit(sites, backbone.denoiser, gate, outputs, not self.training, backbone.inputs_of)
        undo.callback(self._edit.detach)
        self._added = self.add_word(undo, self.options.vectors)
        self._edit.words = self._added.tables
        self.beta = gate.beta  # which may leave the word out
        self._lock = KeyLock.none if len(self.keys) else KeyLock.local
        if self.training:
            gate.settle()
        elif self.options.key_lock is GLOBAL:
            self.key_lock = "global"

    def _target_outputs(self, site: EditSite, s: Tensor) -> nn.Parameter | None:
        """What `attach_edit` asks of a site: its own parameter (1, h), starting at W s, or None where it is locked."""
        if site.kind == "k" and self.options.key_lock is not KeyLock.none:
            return None
        with torch.no_grad():
            start = nn.Parameter(without_bias(unedited(site.projection), s[None].to(_weight(site))).float())
        (self.values if site.kind == "v" else self.keys).append(start)
        return start

    def train(self, mode: bool = True) -> Perfusion:
        """Training or eval mode, with the gate and the key-locking of each; what was set of them is given up."""
        super().train(mode)
        if self.gate is not None:
            self.beta, self.tau = self._gate_settings()
            if not len(self.keys):
                self.key_lock = "global" if self.options.key_lock is GLOBAL and not mode else "local"
        return self

    @property
    def beta(self) -> float | Tensor:
        """β of the gate now; see `PromptGate.beta` for the forms that it can be set to.

        Where it is `inf`, the concept's word reads as its superclass, and without other concepts the picture is the
        base model's to the bit. With values for S samples of which some are infinite, a call needs S prompts.
        """
        return self._attached().beta

    @beta.setter
    def beta(self, value: float | Tensor) -> None:
        gate = self._attached()
        gate.beta = value
        self._added.leave_out(gate.left_out if gate.leaves_out else None)

    @property
    def tau(self) -> float | Tensor:
        """τ of the gate now; see `PromptGate.tau`."""
        return self._attached().tau

    @tau.setter
    def tau(self, value: float | Tensor) -> None:
        self._attached().tau = value

    @property
    def key_lock(self) -> str:
        """`local` or `global`, which can be set; `none` where keys were trained, which cannot."""
        self._attached()
        return self._lock.name

    @key_lock.setter
    def key_lock(self, value: str) -> None:
        self._attached()
        choices = ["none"] if len(self.keys) else ["local", "global"]
        if value not in choices:
            trained = "with" if len(self.keys) else "without"
            raise EditError(
                f"key_lock of {self.word.placeholder}: found {value!r}, expected {' or '.join(choices)}, since it was "
                f"trained {trained} keys of its own"
            )
        if value != self._lock.name:
            self._lock = KeyLock[value]
            self._added.lock_keys(self._lock is GLOBAL)
            self._edit.lock(self._lock is GLOBAL)

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [
            {"name": "values", "params": [*self.values], "lr": self.options.value_rate},
            {"name": "keys", "params": [*self.keys], "lr": self.options.value_rate},
            {"name": "embedding", "params": [*self.embeddings.values()], "lr": self.options.embedding_rate},
        ]
        return [{**group, "weight_decay": self.options.weight_decay} for group in groups if group["params"]]

    def on_step(self, encoding: Encoding) -> None:
        """i* follows the mean encoding of the concept's word (moving average), and C⁻¹i* follows i*."""
        gate = self._attached()
        mean = encoding.mean_at_word().to(gate.target_inputs)
        gate.move(torch.lerp(mean[None], gate.target_inputs, self.options.ema), self._directions)

    def tensors(self) -> dict[str, Tensor]:
        """`target_input` i* (d,); `direction` C⁻¹i* (d,), its largest entry ±1; `values` (Σh,), the o*_V of all sites
        one after the other in the backbone's order; `embedding.<encoder>` (vectors, d_e); `keys` (Σh,) if trained.

        `direction` makes a concept whole: with it, neither captions nor C are needed where it is used. Only the ratio
        of its entries counts, and at this length half precision holds it.
        """
        gate = self._attached()
        gate.settle()
        tensors = {
            "target_input": gate.target_inputs[0],
            "direction": gate.directions[0],
            "values": torch.cat([*self.values], dim=1)[0],
            **self.word_tensors(),
        }
        if len(self.keys):
            tensors["keys"] = torch.cat([*self.keys], dim=1)[0]
        return tensors

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        gate = self._attached()
        gate.move(state["target_input"][None].to(gate.target_inputs), state["direction"][None].to(gate.target_inputs))
        for name, parameters in (("values", self.values), ("keys", self.keys)):
            if len(parameters):
                parts = state[name].split([parameter.shape[1] for parameter in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.copy_(part[None])
        for name, vectors in self.word_tensors().items():
            vectors.copy_(state[name])
        self._warn_of_twins()

    def _warn_of_twins(self) -> None:
        """Say so if the text encoder hardly tells this concept from another one that is attached."""
        own = self._attached()
        for other in self._edit.gates:
            if other is own:
                continue
            angle = math.degrees(math.acos(max(-1.0, min(1.0, cosines([own, other])[0, 1].item()))))
            if angle < TWINS:
                warnings.warn(
                    f"{own.label} and {other.label} are nearly one to the text encoder: angle of their i* "
                    f"{angle:.1f}°, expected {TWINS}° or more. Each will show some of the other",
                    stacklevel=3,
                )

    def state_shapes(self, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        sites = [(site.kind, *_weight(site).shape) for site in backbone.edit_sites()]
        (d,) = {d for _, _, d in sites}
        size = {kind: sum(h for k, h, _ in sites if k == kind) for kind in ("k", "v")}
        shapes: dict[str, tuple[int, ...]] = {"target_input": (d,), "direction": (d,), "values": (size["v"],)}
        shapes |= self.word_shapes(backbone, self.options.vectors)
        if self.options.key_lock is KeyLock.none:
            shapes["keys"] = (size["k"],)
        return shapes

    def unusable(self, state: Mapping[str, Tensor]) -> str | None:
        """Similarities to i* (d,) with the direction v = C⁻¹i* (d,), r(e) = <v, e> / <v, i*>, are no numbers where i*
        is 0 or at a right angle to v."""
        found = slant(state["target_input"].double(), state["direction"].double())
        if found <= MAX_SLANT:
            return None
        return (
            f"found a target_input and a direction at a right angle or of length 0 ({found:.1e}), expected "
            f"‖i*‖‖C⁻¹i*‖ / <i*, C⁻¹i*> of {MAX_SLANT:.0e} at most"
        )

    def _attached(self) -> PromptGate:
        assert self.gate is not None, "attach() first"
        return self.gate

    def _gate_settings(self) -> tuple[float, float]:
        options = self.options
        return (options.beta, options.tau) if self.training else (options.sample_beta, options.sample_tau)


class _Directions:
    """i* (J, d) to C⁻¹i* (J, d), scaled to a largest entry of ±1. C is asked for at the first call."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._factor: Tensor | None = None

    def __call__(self, target_inputs: Tensor) -> Tensor:
        if self._factor is None:
            where = "cpu" if target_inputs.device.type == "mps" else target_inputs.device  # MPS has no float64
            self._factor = self._backbone.second_moment().to(where)
        directions = precision_times(self._factor, target_inputs.to(self._factor.device))
        scaled = directions / directions.abs().amax(-1, keepdim=True)
        return scaled.to(target_inputs.dtype).to(target_inputs.device)


def superclass_encoding(backbone: Backbone, superclass: str) -> Tensor:
    """s (d,), float32: the mean encoding of the superclass, at its last token, in the backbone's prompt templates."""
    prompts = [fill(template, superclass) for template in templates(backbone.config.prompts)]
    return backbone.mean_encoding(prompts, superclass)


def _weight(site: EditSite) -> Tensor:
    """W (h, d), also below an edit or LoRA."""
    weight = site.projection.weight
    assert isinstance(weight, Tensor)
    return weight


def _check(options: PerfusionOptions) -> None:
    bounds = {
        "tau": (options.tau > 0, "more than 0"),
        "sample_tau": (options.sample_tau > 0, "more than 0"),
        "ema": (0 <= options.ema <= 1, "a number from 0 to 1"),
        "value_rate": (options.value_rate >= 0, "at least 0"),
        "embedding_rate": (options.embedding_rate >= 0, "at least 0"),
        "weight_decay": (options.weight_decay >= 0, "at least 0"),
        "vectors": (options.vectors >= 1, "at least 1"),
    }
    check_bounds(options, bounds)


METHOD = Perfusion
