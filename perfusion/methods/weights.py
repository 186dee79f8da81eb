"""Weights of a model that a method trains itself: its own parameters stand in their places while it is attached.

The frozen ones are kept, and come back as the same objects, so detaching is exact. The price is memory for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from perfusion.backbones.base import Backbone
from perfusion.editing import EditError
from perfusion.editing.layer import gates_at
from perfusion.editing.places import base_module


@dataclass(frozen=True)
class Slot:
    """The place of one parameter in a model."""

    name: str  # dotted path inside the model, below whatever is put around its modules
    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        """What stands there now."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    def put(self, parameter: nn.Parameter) -> None:
        """Let `parameter` stand there."""
        self.module.register_parameter(self.attribute, parameter)

    @property
    def owner(self) -> Any:
        """Whose parameter stands there, if not the model's own."""
        return getattr(getattr(self.module, self.attribute), "perfusion_owner", None)


def slots(module: nn.Module, prefix: str = "") -> Iterator[Slot]:
    """The parameters below `module`, named as in `fingerprint.base_parameters`."""
    module = base_module(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Slot(f"{prefix}.{name}" if prefix else name, module, name)
    for name, child in module.named_children():
        yield from slots(child, f"{prefix}.{name}" if prefix else name)


def projection_places(backbone: Backbone) -> list[Slot]:
    """Where the weights of the edit sites are, in the backbone's order."""
    return [Slot(site.name, base_module(site.projection), "weight") for site in backbone.edit_sites()]


class OwnWeights:
    """Copies of the parameters at `places`, which can be put there.

    Args:
        places: at which the model's own parameters stand.
        owner: who asks for them, see `Slot.owner`.
        training: whether the copies are trained, which takes float32.

    Raises:
        EditError: the weights are another concept's at present, or cannot be trained in their type.
    """

    def __init__(self, places: Iterable[Slot], owner: Any, training: bool) -> None:
        self.places = [*places]
        check_free(self.places)
        if training:
            check_trainable(self.places)
        self.frozen = [place.parameter for place in self.places]
        self.parameters = [own_copy(parameter, training) for parameter in self.frozen]
        for parameter in self.parameters:
            parameter.perfusion_owner = owner  # type: ignore[attr-defined]

    def put(self) -> None:
        for place, parameter in zip(self.places, self.parameters, strict=True):
            place.put(parameter)

    def remove(self) -> None:
        """Give the places back to the model's own parameters."""
        for place, parameter in zip(self.places, self.frozen, strict=True):
            place.put(parameter)


def check_free(places: Iterable[Slot]) -> None:
    """Raise EditError if a concept has put its own weights at one of `places`."""
    for place in places:
        if place.owner is not None:
            raise EditError(
                f"{place.name}: found weights of {place.owner}, expected those of the model, which this concept was "
                "made for; detach() the other first"
            )


def check_trainable(places: Iterable[Slot]) -> None:
    """Raise EditError unless every parameter at `places` is float32: others round a step of training away."""
    for place in places:
        if place.parameter.dtype != torch.float32:
            found = str(place.parameter.dtype).removeprefix("torch.")
            raise EditError(
                f"backbone.dtype: found {found} at {place.name}, expected float32 where a method trains the model's "
                "own weights; trainer.precision=bf16-mixed still computes in half of it"
            )


def check_unedited(backbone: Backbone, placeholder: str) -> None:
    """Raise EditError if an edit is attached to the backbone's projections."""
    for site in backbone.edit_sites():
        if gates := gates_at(site):
            raise EditError(
                f"{placeholder}: found the edit of {gates[0].label} at {site.name}, expected none: it was made for the "
                "weights that this concept replaces"
            )


def copy_into(parameters: Sequence[nn.Parameter], values: Iterable[torch.Tensor]) -> None:
    """Put `values` into `parameters`, exactly but for the rounding to their dtype."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def own_copy(parameter: nn.Parameter, training: bool) -> nn.Parameter:
    """The same values as a parameter of one's own, trainable or not."""
    return nn.Parameter(parameter.detach().clone(), requires_grad=training)
