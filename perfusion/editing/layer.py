"""Attach the rank-one edit (`perfusion.editing.equations`, Eq. 3 and 4) to a denoiser, and take it off again.

What all layers share is computed once per call of the denoiser (`perfusion.editing.gate`), so little more than its own
matrix product is left to a layer: with e' and the gates g_j of the prompt,

    K locked:   W (e' + Σ_j g_j s_j)    for o*_K = W s_j, which is never computed or stored
    otherwise:  W e' + Σ_j g_j o*_j

Without gradients these do not depend on the diffusion step: they are computed once per prompt. A pipeline gives its
denoiser one and the same tensor at every step of a call, and another one in the next call, so what is kept holds for
that very object, until something of a concept is set, a LoRA is fused, or the object is written to.

With global key-locking the K projections are left as they are but read the prompt with the superclasses in the
concepts' places (`perfusion.editing.words`).

Some denoisers project and norm their context first, for all layers alike. The edit lives in the space that K and V
read, so it does the same with the context, and its layers take that for what they are given during the call.

Edits of one denoiser share their layers: each concept brings its gate and its target outputs, and may leave in any
order.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from perfusion.editing import EditError
from perfusion.editing.equations import low_rank_update
from perfusion.editing.gate import EditedEncoding, PromptGate, edited_encoding, nobody
from perfusion.editing.places import EditSite, base_module
from perfusion.editing.words import Words, superclass_context, superclass_mask

_FUSED = ("fuse_qkv_projections", "call unfuse_qkv_projections()")
_TAKEN_OUT = ("unload_lora_weights, say", "call detach() of every concept, then attach them again")


@dataclass(frozen=True, eq=False)
class _Prompt:
    """What all layers need of the denoiser's context."""

    context: Tensor  # (B, N, d'), as the denoiser was given it
    inputs: Tensor  # e (B, N, d), what K and V read; the context itself, unless the denoiser projects it first
    masks: tuple[Tensor | None, Tensor | None]  # of the context's positions: the one given, the one that holds
    edited: EditedEncoding
    keys: Tensor | None  # what all K projections read, with global key-locking
    state: tuple[Any, ...] | None  # see `_state`
    differentiable: bool  # computed while gradients were enabled
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)  # of the layers, kept by them


@dataclass
class _Use:
    """Whether an edited layer has a part in what its attention module computes."""

    called: bool = False  # in the denoiser's latest call
    by: object = None  # the attention processor that was there when it was called last


class EditedProjection(nn.Module, BaseTunerLayer):
    """The edits around one K or V projection `base_layer`: (B, N, d) to (B, N, h).

    To diffusers and PEFT this is a tuner layer: LoRA goes around it. Gates and target outputs belong to the methods and
    are not registered here, so that the denoiser's state, dtype and device stay its own.
    """

    r: Mapping[str, int] = {}  # LoRA's ranks: diffusers counts them to name the next adapter
    base_layer: nn.Module
    shared: "_Shared"

    def __init__(self, base_layer: nn.Module, shared: "_Shared", site: EditSite) -> None:
        super().__init__()
        self.base_layer = base_layer
        object.__setattr__(self, "shared", shared)
        self.site, self.kind, self.use = site.name, site.kind, _Use()
        plain: Any = self.get_base_layer()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a compiled graph with checkpoints could not take note of it
            self.use.called = True
        prompt = self.shared.prompt(x)
        output = prompt.outputs.get(self)
        if output is None:
            output = self._project(prompt)
            # A layer inside (LoRA, quantized) may be set to something else without a word.
            if prompt.state is not None and type(self._modules["base_layer"]) is nn.Linear:
                prompt.outputs[self] = output
        return output

    def _project(self, prompt: _Prompt) -> Tensor:
        if self.kind == "k" and prompt.keys is not None:
            return self.base_layer(prompt.keys)
        outputs = [(member.outputs[self.site], member.gate) for member in self.shared.members]
        if all(own is None for own, _ in outputs):
            return self.base_layer(prompt.edited.locked)
        h = self.base_layer(prompt.edited.remainder)
        # Where some concepts have locked keys and others have not, the locked ones' are computed.
        each = [
            without_bias(self.base_layer, g.superclass_inputs.to(h)) if own is None else own.to(h.device)
            for own, g in outputs
        ]
        return low_rank_update(h, prompt.edited.gates, each[0] if len(each) == 1 else torch.cat(each))

    # What diffusers asks of every tuner layer when adapters are weighted or fused. An edit has no part in either, but
    # fusing changes the weight that it is of.

    def set_scale(self, adapter: str, scale: float) -> None:
        pass

    def scale_layer(self, scale: float) -> None:
        pass

    def unscale_layer(self, scale: float | None = None) -> None:
        pass

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self.shared.forget()

    def unmerge(self) -> None:
        self.shared.forget()


class _Shared:
    """The edited layers of one denoiser, and the concepts that are in them."""

    def __init__(
        self, sites: Sequence[EditSite], denoiser: nn.Module, joinable: bool, inputs_of: Callable[[Tensor], Tensor]
    ) -> None:
        self.members: list[Edit] = []
        self._inputs_of = inputs_of
        self._shown: _Prompt | None = None  # of the denoiser's latest call
        self._inside = False  # such a call
        self._latest: tuple[int, Callable[[], Tensor | None]] = 0, lambda: None  # thread and context, likewise
        self.joinable = joinable
        # What can fail comes first: nothing is changed then.
        self._position = list(inspect.signature(denoiser.forward).parameters).index("encoder_hidden_states")
        self._layers = [(site, EditedProjection(site.projection, self, site)) for site in sites]
        self._hooks = [
            denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True),
            denoiser.register_forward_hook(self._after_call),
        ]
        for site, layer in self._layers:
            site.put(layer)

    @property
    def sites(self) -> set[str]:
        return {site.name for site, _ in self._layers}

    def enter(self, member: "Edit") -> None:
        self.members.append(member)
        member.gate.forget = self.forget
        self.forget()

    def leave(self, member: "Edit") -> None:
        """Take `member` out. The last one puts the very modules back that were there before, also from below a LoRA."""
        if member not in self.members:
            return
        self.members.remove(member)
        member.gate.forget = nobody
        self.forget()
        if self.members:
            return
        for hook in self._hooks:
            hook.remove()
        for site, layer in self._layers:
            if holder := site.holder(layer):
                holder.put(layer.base_layer)
        self._layers = []

    def forget(self) -> None:
        """Let go of the latest prompt and of the outputs that were kept for it."""
        self._shown = None

    def prompt(self, x: Tensor) -> _Prompt:
        """What a layer needs of its input `x` (B, N, d): as prepared if the denoiser was called with this very tensor,
        or makes all inputs of what it was called with; else anew."""
        shown = self._shown
        if shown is not None and (shown.differentiable or not torch.is_grad_enabled()):
            projected = shown.inputs is not shown.context and (self._inside or shown.differentiable)
            if shown.inputs is x or (projected and shown.inputs.shape == x.shape):
                return shown
        keys = superclass_context(self.words, x) if self.words else None
        return self._prompt(x, x, keys, (None, None))

    def _prompt(
        self, context: Tensor, inputs: Tensor, keys: Tensor | None, masks: tuple[Tensor | None, Tensor | None]
    ) -> _Prompt:
        counts = None if masks[1] is None else masks[1] > 0 if masks[1].dim() == 2 else masks[1][:, 0] == 0
        edited = edited_encoding([member.gate for member in self.members], inputs, counts)
        return _Prompt(context, inputs, masks, edited, keys, _state(context), torch.is_grad_enabled())

    @property
    def words(self) -> Sequence[Words]:
        """Of the text encoders; none without global key-locking."""
        return next((member.words for member in self.members if member.locked), ())

    def _before_call(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        for site, layer in self._layers:
            if site.fused or site.holder(layer) is None:
                raise _bypassed(site, *(_FUSED if site.fused else _TAKEN_OUT))
            layer.use.called = False
        if self.words and not all(member.locked for member in self.members):
            raise EditError(
                "found concepts with global and with local key-locking attached together, expected one for all: set "
                "key_lock of each alike"
            )
        context = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[self._position]
        # `is`, not equal: the object is held here, so no other one can have taken its place.
        shown, mask = self._shown, kwargs.get("encoder_attention_mask")
        if (
            shown is None
            or shown.context is not context
            or shown.masks[0] is not mask
            or shown.state is None
            or shown.state != _state(context)
        ):
            shown = self._shown = None  # which would keep the context of the call before alive
            self._check_thread(context)
            keys = self._inputs_of(superclass_context(self.words, context)) if self.words else None
            masks = mask, superclass_mask(self.members[0].words, context, mask)
            shown = self._shown = self._prompt(context, self._inputs_of(context), keys, masks)
        self._inside = True
        return None if shown.masks[1] is mask else (args, {**kwargs, "encoder_attention_mask": shown.masks[1]})

    def _check_thread(self, context: Tensor) -> None:
        """Raise EditError if another thread is in the middle of a picture: what is set is the same for both.

        A pipeline holds the context of its call until it returns, and nobody does afterwards.
        """
        if torch.compiler.is_compiling():
            return
        thread, last = self._latest
        if thread != threading.get_ident() and last() is not None:
            raise EditError(
                "found another thread that draws with this model and its concepts right now, expected one picture or "
                "batch at a time: strengths are set for all of them; use a lock, or a model for each thread"
            )
        self._latest = threading.get_ident(), weakref.ref(context)

    def _after_call(self, denoiser: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Raise EditError if an attention processor computes K or V by itself.

        One that has called the layer before may leave it out: some reuse what earlier steps gave.
        """
        self._inside = False
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        for site, layer in self._layers:
            use, processor = layer.use, getattr(site.parent, "processor", None)
            if use.called:
                use.by = processor
            elif use.by is not processor:
                cause = f"the attention processor {type(processor).__name__}"
                raise _bypassed(site, cause, f"set one that calls {site.attribute}, such as AttnProcessor2_0")


def _state(context: Tensor) -> tuple[Any, ...] | None:
    """What has to be the same at the next call of the denoiser for all to be kept that came of `context`.

    None: nothing is kept, with gradients, inside a compiled graph, and of inference tensors, which do not count how
    often they were written to.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or context.is_inference():
        return None
    kind = context.device.type
    return context._version, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _bypassed(site: EditSite, cause: str, remedy: str) -> EditError:
    return EditError(
        f"{site.name}: found the concept's edit bypassed (by {cause}), which would silently draw without the concept; "
        f"expected the edit in its place: {remedy}"
    )


class Edit:
    """One concept's part in the edit of a denoiser; see `attach_edit`."""

    def __init__(self, shared: _Shared, gate: PromptGate, outputs: Mapping[str, nn.Parameter | None]) -> None:
        self._shared, self.gate, self.outputs = shared, gate, outputs
        self.words: Sequence[Words] = ()  # of the text encoders
        self.locked = False  # whether the keys are, globally
        shared.enter(self)

    @property
    def gates(self) -> list[PromptGate]:
        """Of all concepts that are attached now, this one's among them, in the order in which they came."""
        return [member.gate for member in self._shared.members]

    def lock(self, locked: bool) -> None:
        """Lock the concept's keys globally, together with `AddedWord.lock_keys`, or locally.

        With several concepts all must be locked alike, or the next call of the denoiser raises EditError.
        """
        self.locked = locked
        self._shared.forget()

    def detach(self) -> None:
        """Take the concept out; when it was the last, the denoiser is as it was before the first. Idempotent."""
        self._shared.leave(self)


def attach_edit(
    sites: Sequence[EditSite],
    denoiser: nn.Module,
    gate: PromptGate,
    outputs: Mapping[str, nn.Parameter | None],
    join: bool = False,
    inputs_of: Callable[[Tensor], Tensor] = lambda context: context,
) -> Edit:
    """Edit the projections at `sites` of `denoiser`, which may be compiled (`torch.compile`) already, or later.

    `outputs` has for the name of every site its target output (1, h), float32, or None for a locked projection. They
    and the gate are read at each call, so training them, or setting β, has its effect at once. Nothing of the denoiser
    is changed but the attributes of the sites and its forward hooks, one before and one after.

    With `join`, edits that were attached with `join` may be there already: then all of them act together, by Eq. 4.
    `inputs_of` gives what K and V read of the denoiser's `encoder_hidden_states`, see `Backbone.inputs_of`.

    Raises:
        EditError: the denoiser is edited already, by an edit that is to be alone, or at other sites.
    """
    assert {site.name for site in sites} == set(outputs), "outputs must name the sites"
    found = {site.name: _edited(site.projection) for site in sites}
    for name, layer in found.items():
        if layer is not None and not (join and layer.shared.joinable and layer.shared.sites == set(outputs)):
            raise EditError(f"{name}: found an edit, expected none: detach the concept that is attached first")
    layers = {layer.shared for layer in found.values() if layer is not None}
    shared = layers.pop() if layers else _Shared(sites, base_module(denoiser), join, inputs_of)
    return Edit(shared, gate, outputs)


def without_bias(projection: nn.Module, x: Tensor) -> Tensor:
    """W x of a projection, or of the layers of LoRA around it: the bias is added once, to what the edit made of W e."""
    bias: Any = base_module(projection).bias
    return projection(x) if bias is None else projection(x) - bias


def gates_at(site: EditSite) -> list[PromptGate]:
    """The gates of all edits that are attached at a site."""
    layer = _edited(site.projection)
    return [member.gate for member in layer.shared.members] if layer else []


def unedited(projection: nn.Module) -> nn.Module:
    """What a site's projection is below its edit; the projection itself if it has none."""
    layer = _edited(projection)
    return projection if layer is None else layer.base_layer


def _edited(module: nn.Module | None) -> EditedProjection | None:
    while module is not None and not isinstance(module, EditedProjection):
        module = getattr(module, "base_layer", None)
    return module
