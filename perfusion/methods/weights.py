"""Weights of a model that a method trains itself: its own parameters stand in their places while it is attached.

The frozen ones are kept, and come back as the same objects, so detaching is exact. The price is memory for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from perfusion.backbones.base import Backbone
from perfusion.editing import EditError
from perfusion.editing.layer import gates_at
from perfusion.editing.places import Place, base_module


def parameter_places(module: nn.Module, prefix: str = "") -> Iterator[Place]:
    """Of the parameters below `module`, named as in `fingerprint.base_parameters`."""
    module = base_module(module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Place(f"{prefix}.{name}" if prefix else name, module, name)
    for name, child in module.named_children():
        yield from parameter_places(child, f"{prefix}.{name}" if prefix else name)


def projection_places(backbone: Backbone) -> list[Place]:
    """Where the weights of the edit sites are, in the backbone's order."""
    return [Place(site.name, base_module(site.projection), "weight") for site in backbone.edit_sites()]


def owner_of(place: Place) -> Any:
    """Whose parameter stands at `place`, if not the model's own."""
    return getattr(place.now, "perfusion_owner", None)


def put_copies(places: Iterable[Place], owner: Any, training: bool, undo: ExitStack) -> nn.ParameterList:
    """Put copies of the model's own parameters at `places`, until `undo` gives the places back.

    Args:
        owner: who asks for them, see `owner_of`.
        training: whether the copies are trained, which takes float32.

    Raises:
        EditError: the weights are another concept's at present, or cannot be trained in their type.
    """
    places = [*places]
    check_free(places)
    if training:
        check_trainable(places)
    own = nn.ParameterList()
    for place in places:
        parameter: Any = own_copy(place.now, training)
        parameter.perfusion_owner = owner
        undo.callback(place.put, place.now)
        place.put(parameter)
        own.append(parameter)
    return own


@contextmanager
def standing(parameters: Sequence[nn.Parameter], places: Sequence[Place]) -> Iterator[None]:
    """Let these parameters stand at these places for as long."""
    others = [place.now for place in places]
    try:
        for place, parameter in zip(places, parameters, strict=True):
            place.put(parameter)
        yield
    finally:
        for place, other in zip(places, others, strict=True):
            place.put(other)


def check_free(places: Iterable[Place]) -> None:
    """Raise EditError if a concept has put its own weights at one of `places`."""
    for place in places:
        if (owner := owner_of(place)) is not None:
            raise EditError(
                f"{place.name}: found weights of {owner}, expected those of the model, which this concept was "
                "made for; detach() the other first"
            )


def check_trainable(places: Iterable[Place]) -> None:
    """Raise EditError unless every parameter at `places` is float32: others round a step of training away."""
    for place in places:
        if place.now.dtype != torch.float32:
            found = str(place.now.dtype).removeprefix("torch.")
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


def own_copy(parameter: nn.Parameter, training: bool) -> nn.Parameter:
    """The same values as a parameter of one's own, trainable or not."""
    return nn.Parameter(parameter.detach().clone(), requires_grad=training)
