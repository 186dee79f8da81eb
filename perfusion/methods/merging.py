"""The projections of several concepts in one model: the closed form of Custom Diffusion (arXiv 2212.04488)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from perfusion.backbones.base import Backbone
from perfusion.editing import EditError
from perfusion.editing.equations import precision_times
from perfusion.methods.base import Word
from perfusion.methods.weights import check_free, check_trainable, owner_of, projection_places


class Member(Protocol):
    """A concept that has K and V weights of its own."""

    word: Word
    training: bool

    @property
    def weights(self) -> Iterable[nn.Parameter]:
        """W (h, d) of every edit site, in the backbone's order."""
        ...

    def target_words(self, backbone: Backbone) -> Tensor:
        """(s, d), float64: encodings of the words that its projections are for."""
        ...


class SharedProjections:
    """The K and V weights of a model, which the concepts that are attached replace together."""

    @classmethod
    def of(cls, backbone: Backbone) -> SharedProjections:
        """Those of the concepts that are attached to `backbone`; new ones if there are none."""
        owner = owner_of(projection_places(backbone)[0])
        return owner if isinstance(owner, cls) else cls(backbone)

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.places = projection_places(backbone)
        check_free(self.places)
        self.frozen = [place.now for place in self.places]
        self.members: list[Member] = []
        self._settled: list[Member] = []

    def __str__(self) -> str:
        return " and ".join(f"the concept {member.word.placeholder}" for member in self.members)

    def join(self, member: Member) -> None:
        """Take in a member, which shows at once if it is alone. Raises EditError, see `check_trainable`."""
        if member.training:
            check_trainable(self.places)
        self.members.append(member)
        if len(self.members) == 1:
            self._settled.append(member)
            self._show()

    def settle(self, member: Member) -> None:
        """Let a member that has its final weights take part. Raises EditError where words cannot be told apart."""
        if member not in self._settled:
            self._settled.append(member)
        self._show()

    def leave(self, member: Member) -> None:
        """Go on without a member, or with the model's own weights after the last one."""
        self.members = [other for other in self.members if other is not member]
        self._settled = [other for other in self._settled if other is not member]
        self._show()

    def _show(self) -> None:
        """Put into the model what its concepts, taken together, make of the projections."""
        if not self._settled:
            shown = self.frozen
        elif len(self._settled) == 1:
            shown = [*self._settled[0].weights]
        else:
            shown = self._merged()
        for place, frozen, parameter in zip(self.places, self.frozen, shown, strict=True):
            if parameter is not frozen:
                mark: Any = parameter
                mark.perfusion_owner, mark.replaced = self, frozen
            place.put(parameter)

    def _merged(self) -> list[nn.Parameter]:
        words = [member.target_words(self.backbone) for member in self._settled]
        factor = self.backbone.second_moment().factor
        own = zip(*[[*member.weights] for member in self._settled], strict=True)  # site by site
        merged: list[nn.Parameter] = []
        for frozen, weights in zip(self.frozen, own, strict=True):
            outputs = [c @ weight.detach().double().cpu().T for c, weight in zip(words, weights, strict=True)]
            try:
                weight = merged_projection(frozen.detach().double().cpu(), torch.cat(words), torch.cat(outputs), factor)
            except ValueError as error:
                raise EditError(f"{self}: cannot be drawn together: {error}") from error
            merged.append(nn.Parameter(weight.to(frozen), requires_grad=False))
        return merged


def merged_projection(weight: Tensor, words: Tensor, outputs: Tensor, factor: Tensor) -> Tensor:
    """The projection that sends each word to its output and changes least elsewhere (Kumari et al., the constrained
    least squares of "multiple-concept" tuning).

        Ŵ = argmin ‖(Ŵ − W) C_regᵀ‖²  with  Ŵ cᵢ = oᵢ   gives   Ŵ = W + (O − W Cᵀ)(D Cᵀ)⁻¹ D,   D = C M⁻¹,

    with C = [c₁ … c_s]ᵀ the words, O = [o₁ … o_s] their outputs and M = C_regᵀ C_reg, up to a factor.

    Args:
        weight: W (h, d), pretrained.
        words: (s, d) encodings of target words.
        outputs: (s, h), what the concepts' own projections make of them.
        factor: (d, d), lower, of M = factor · factorᵀ.

    Returns:
        (h, d) in the dtype of `precision_times`.

    Raises:
        ValueError: a word that lies in the span of the others, so that no projection need satisfy all.
    """
    directions = precision_times(factor, words)  # D (s, d)
    dtype = directions.dtype
    words, weight = words.to(dtype), weight.to(dtype)
    gram = directions @ words.T  # (s, s)
    scale = gram.diagonal().rsqrt()
    smallest = torch.linalg.eigvalsh(scale[:, None] * gram * scale)[0].item()
    limit = len(words) * torch.finfo(dtype).eps ** 0.5
    if not smallest > limit:
        raise ValueError(
            f"target words: found one of {len(words)} in the span of the others (smallest eigenvalue {smallest:.1e}), "
            f"expected linearly independent ones (above {limit:.1e})"
        )
    missing = outputs.to(dtype) - words @ weight.T  # (s, h)
    return weight + torch.linalg.solve(gram, missing).T @ directions
