"""Attach the rank-one edit (`perfusion.rank_one`, Eq. 3 and 4) to a denoiser, and take it off again.

A `PromptGate` computes what all layers share once per call of the denoiser, so little more than its own matrix product
is left to a layer: with e' and the gates g_j of the prompt,

    K locked:   W (e' + Σ_j g_j s_j)    for o*_K = W s_j, which is never computed or stored
    otherwise:  W e' + Σ_j g_j o*_j

Without gradients these do not depend on the diffusion step: they are computed once per prompt.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from perfusion.backbones.base import EditSite
from perfusion.prompt_gate import EditedPrompt, EditError, PromptGate, Stamp, same, stamp_of
from perfusion.rank_one import low_rank_update

_TAKEN_OUT = ("unload_lora_weights, say", "detach() of the concept, then attach it again")

__all__ = ["Edit", "EditError", "EditedProjection", "PromptGate", "attach_edit"]


class EditedProjection(nn.Module, BaseTunerLayer):
    """An edit around one K or V projection `base_layer`: (B, N, d) to (B, N, h).

    `target_outputs` (J, h) holds the o*_j; None is a locked projection, o*_j = W s_j. To diffusers and PEFT this is a
    tuner layer: LoRA goes around it. Gate and target outputs belong to the method and are not registered here, so that
    the denoiser's state, dtype and device stay its own.
    """

    r: Mapping[str, int] = {}  # LoRA's ranks: diffusers counts them to name the next adapter
    base_layer: nn.Module
    gate: PromptGate
    target_outputs: nn.Parameter | None

    def __init__(self, base_layer: nn.Module, gate: PromptGate, target_outputs: nn.Parameter | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        object.__setattr__(self, "gate", gate)
        object.__setattr__(self, "target_outputs", target_outputs)
        plain: Any = self.get_base_layer()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        prompt = self.gate.prompt(x)
        stamp = self._stamp(x) if prompt.stamp else None
        known, output = prompt.outputs.get(self, (None, None))
        if output is None or not same(known, stamp):
            output = self._project(prompt)
            if stamp:
                prompt.outputs[self] = stamp, output
        return output

    def _project(self, prompt: EditedPrompt) -> Tensor:
        if self.target_outputs is None:
            return self.base_layer(prompt.locked)
        h = self.base_layer(prompt.remainder)
        return low_rank_update(h, prompt.gates, self.target_outputs.to(h.device))

    def _stamp(self, x: Tensor) -> Stamp | None:
        """Of what the output depends on besides the prompt; None inside a layer (LoRA, quantized) that hides it."""
        if type(self.base_layer) is not nn.Linear or torch.is_grad_enabled():
            return None
        own = (t for t in (self.base_layer.weight, self.base_layer.bias, self.target_outputs) if t is not None)
        stamp = stamp_of(*own)
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return stamp and (*stamp, (autocast, 0))

    # What diffusers asks of every tuner layer when adapters are weighted or fused: an edit has no part in either.

    def set_scale(self, adapter: str, scale: float) -> None:
        pass

    def scale_layer(self, scale: float) -> None:
        pass

    def unscale_layer(self, scale: float | None = None) -> None:
        pass

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        pass

    def unmerge(self) -> None:
        pass


class Edit:
    """An attached edit; see `attach_edit`."""

    def __init__(self, denoiser: nn.Module, gate: PromptGate, layers: Mapping[str, tuple[EditSite, EditedProjection]]):
        self._gate, self._layers = gate, layers
        self._position = list(inspect.signature(denoiser.forward).parameters).index("encoder_hidden_states")
        self._hook = denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True)

    def detach(self) -> None:
        """Put the very modules back that were there before, also from below a LoRA that came later; idempotent."""
        self._hook.remove()
        self._gate.forget()
        for site, layer in self._layers.values():
            if holder := _holder(site, layer):
                setattr(*holder, layer.base_layer)
        self._layers = {}

    def _before_call(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for site, layer in self._layers.values():
            fused = isinstance(getattr(site.parent, "processor", None), FusedAttnProcessor2_0)
            if fused or _holder(site, layer) is None:
                cause, remedy = ("fuse_qkv_projections", "unfuse_qkv_projections()") if fused else _TAKEN_OUT
                raise EditError(
                    f"{site.name}: found the concept's edit bypassed (by {cause}), which would silently draw without "
                    f"the concept; expected the edit in its place: call {remedy}"
                )
        context = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[self._position]
        self._gate.show(context)


def attach_edit(
    sites: Sequence[EditSite],
    denoiser: nn.Module,
    gate: PromptGate,
    outputs: Mapping[str, nn.Parameter | None],
) -> Edit:
    """Edit the projections at `sites` of `denoiser`.

    `outputs` has for the name of every site its target outputs (J, h), float32, or None for a locked projection. They
    and the gate are read at each call, so training them, or setting β, has its effect at once. Nothing of the denoiser
    is changed but the attributes of the sites and one forward pre-hook.

    Raises:
        EditError: the denoiser is edited already.
    """
    assert {site.name for site in sites} == set(outputs), "outputs must name the sites"
    for site in sites:
        if _is_edited(site.projection):
            raise EditError(f"{site.name}: found an edit, expected none: detach the concept that is attached first")
    layers = {site.name: (site, EditedProjection(site.projection, gate, outputs[site.name])) for site in sites}
    for site, layer in layers.values():
        setattr(site.parent, site.attribute, layer)
    return Edit(denoiser, gate, layers)


def _is_edited(module: nn.Module | None) -> bool:
    while module is not None and not isinstance(module, EditedProjection):
        module = getattr(module, "base_layer", None)
    return module is not None


def _holder(site: EditSite, layer: EditedProjection) -> tuple[nn.Module, str] | None:
    """The module and attribute where `layer` hangs: the site, or below tuner layers there. None: it was taken out."""
    holder, name = site.parent, site.attribute
    while (found := getattr(holder, name, None)) is not layer:
        if found is None:
            return None
        holder, name = found, "base_layer"
    return holder, name
