"""Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488): K and V of every cross-attention, and a modifier token.

**The word.** The paper puts a new token before the superclass, "<new1> cat". Here the placeholder stands for both: it
is added as several vectors, the trained one of the modifier and the frozen ones of the superclass's tokens.

**Several concepts** that were trained together (`experiments.joint`) have the same projections, which the model has.
Others are drawn together by the paper's closed form (`merged_projection`): while more than one is attached, the model
has the projections that send the words of each concept where its own projections send them, and change least elsewhere.
What "elsewhere" means is the backbone's second moment C, the paper's C_regᵀC_reg over regularisation captions but for a
factor that cancels. A concept joins with its `load_state`.

Not done: the paper's augmentation, which scales pictures and says so in their prompts; mirroring, since pictures are
encoded once; compressing the difference of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perfusion.backbones.base import Backbone
from perfusion.data.prompts import fill, templates
from perfusion.editing import EditError
from perfusion.editing.equations import precision_times
from perfusion.methods.base import Word, check_bounds
from perfusion.methods.prior import PriorMethod, PriorOptions
from perfusion.methods.weights import (
    check_free,
    check_trainable,
    check_unedited,
    own_copy,
    owner_of,
    projection_places,
    standing,
)


@dataclass
class CustomDiffusionOptions(PriorOptions):
    """The paper's values for Stable Diffusion 1.4."""

    name: str = "custom_diffusion"
    steps: int = 250
    batch_size: int = 8
    prior_guidance: float = 6.0
    initializer: str = "ktn"  # rare word, whose embedding the modifier token starts at
    projection_rate: float = 8e-5  # of K and V
    embedding_rate: float = 8e-5  # of the modifier token
    weight_decay: float = 0.01  # AdamW's, of K and V


class CustomDiffusion(PriorMethod):
    """K and V of the cross-attention and a modifier token, trained with pictures of the superclass as prior."""

    Options = CustomDiffusionOptions
    options: CustomDiffusionOptions

    def __init__(self, options: CustomDiffusionOptions, word: Word) -> None:
        super().__init__(options, word)
        bounds = {
            "initializer": (bool(options.initializer.strip()), "a rare word, such as 'ktn'"),
            "projection_rate": (options.projection_rate >= 0, "at least 0"),
            "embedding_rate": (options.embedding_rate >= 0, "at least 0"),
            "weight_decay": (options.weight_decay >= 0, "at least 0"),
        }
        check_bounds(options, bounds)

    def clear(self) -> None:
        super().clear()
        self.shared: SharedProjections | None = None
        self.weights = nn.ParameterList()  # W of every site: (h, d)
        # Of `embeddings`, (1 + superclass's tokens, d_e), the first row is trained.

    def put(self, backbone: Backbone, undo: ExitStack) -> None:
        """Add the word, and put K and V of its own in their places; beside other concepts of this method only when
        `load_state` has been called.

        Raises:
            EditError: another method has changed the projections; another concept of this one is there and either is
                trained; or it shall be trained, and the backbone is not in float32.
            TokenError: the placeholder is a word already, or the initializer cannot be read.
        """
        check_unedited(backbone, self.word.placeholder)
        backbone.fingerprint()  # of the frozen weights, which it remembers
        shared = SharedProjections.of(backbone)
        if shared.members and (self.training or any(member.training for member in shared.members)):
            raise EditError(
                f"{self.word.placeholder}: found {shared.members[0].word.placeholder} attached, expected no other "
                "concept beside one that is trained"
            )
        self.add_modifier(undo)
        self.weights.extend(own_copy(parameter, self.training) for parameter in shared.frozen)
        self.shared = shared
        undo.callback(shared.leave, self)
        shared.join(self)

    def aside(self) -> AbstractContextManager[None]:
        shared = self._attached()
        return standing(shared.frozen, shared.places)

    def add_modifier(self, undo: ExitStack) -> None:
        """The placeholder, with the modifier's vector and those of the superclass's tokens."""
        starts = token_vectors(self.backbone, self.word.placeholder, self.options.initializer)
        named = token_vectors(self.backbone, self.word.placeholder, self.word.superclass)
        (count,) = {len(vectors) for vectors in named.values()}  # text encoders share a vocabulary
        self.add_word(undo, 1 + count)
        self.vectors = 1 + count
        for name, vectors in self.embeddings.items():
            with torch.no_grad():
                vectors.copy_(torch.cat([starts[name].mean(0, keepdim=True), named[name]]))
            vectors.register_hook(_first_row)

    def parameter_groups(self) -> list[dict[str, Any]]:
        options = self.options
        # Decay would move the frozen vectors, too, which share a tensor with the trained one.
        return [
            {
                "name": "projections",
                "params": [*self.weights],
                "lr": options.projection_rate,
                "weight_decay": options.weight_decay,
            },
            {
                "name": "embedding",
                "params": [*self.embeddings.values()],
                "lr": options.embedding_rate,
                "weight_decay": 0.0,
            },
        ]

    def tensors(self) -> dict[str, Tensor]:
        """`<site>.weight` (h, d), the whole projection; `embedding.<encoder>` (1, d_e), the modifier token."""
        names = [f"{place.name}.weight" for place in self._attached().places]
        return {**dict(zip(names, self.weights, strict=True)), **self.word_tensors(rows=1)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state()` back; from then on it is drawn together with the other concepts that are attached.

        Raises:
            EditError: the words of the concepts that are attached cannot be told apart.
            CovarianceError, ConfigError: there is no second moment to merge them by.
        """
        super().load_state(state)
        self._attached().settle(self)

    def state_shapes(self, backbone: Backbone) -> dict[str, tuple[int, ...]]:
        shapes = {f"{place.name}.weight": tuple(place.now.shape) for place in projection_places(backbone)}
        return {**shapes, **self.word_shapes(backbone, rows=1)}

    @torch.no_grad()
    def target_words(self, backbone: Backbone) -> Tensor:
        """(s, d), float64: the encodings of the words that the placeholder stands for, in the training prompt."""
        template = self.options.prompt or templates(backbone.config.prompts)[0]
        encoding = backbone.encode([fill(template, self.word.placeholder)], self.word.placeholder)
        end = int(encoding.concept[0].nonzero()[0]) + 1
        return encoding.inputs[0, end - self.vectors : end].double().cpu()

    def _attached(self) -> SharedProjections:
        assert self.shared is not None, "attach() first"
        return self.shared


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
        self.members: list[CustomDiffusion] = []
        self._settled: list[CustomDiffusion] = []

    def __str__(self) -> str:
        return " and ".join(f"the concept {member.word.placeholder}" for member in self.members)

    def join(self, member: CustomDiffusion) -> None:
        """Take in a member, which shows at once if it is alone. Raises EditError, see `check_trainable`."""
        if member.training:
            check_trainable(self.places)
        self.members.append(member)
        if len(self.members) == 1:
            self._settled.append(member)
            self._show()

    def settle(self, member: CustomDiffusion) -> None:
        """Let a member that has its final weights take part. Raises EditError where words cannot be told apart."""
        if member not in self._settled:
            self._settled.append(member)
        self._show()

    def leave(self, member: CustomDiffusion) -> None:
        """Go on without a member, or with the model's own weights after the last one."""
        self.members = [other for other in self.members if other is not member]
        self._settled = [other for other in self._settled if other is not member]
        self._show()

    def _show(self) -> None:
        """Put into the model what its concepts, taken together, make of the projections."""
        if not self._settled:
            shown = self.frozen
        elif self._trained_together():
            shown = [*self._settled[0].weights]
        else:
            shown = self._merged()
        for place, frozen, parameter in zip(self.places, self.frozen, shown, strict=True):
            if parameter is not frozen:
                mark: Any = parameter
                mark.perfusion_owner, mark.replaced = self, frozen
            place.put(parameter)

    def _trained_together(self) -> bool:
        """Whether all concepts have the same projections, as one alone has."""
        first, *others = (member.weights for member in self._settled)
        return all(torch.equal(one, other) for weights in others for one, other in zip(first, weights, strict=True))

    def _merged(self) -> list[nn.Parameter]:
        words = [member.target_words(self.backbone) for member in self._settled]
        factor = self.backbone.second_moment()
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


def token_vectors(backbone: Backbone, placeholder: str, text: str) -> dict[str, Tensor]:
    """Name of the text encoder -> embeddings of the tokens of `text`, (tokens, d_e) float32.

    `placeholder` is any word that is free, and is free again afterwards. Raises TokenError.
    """
    probe = backbone.add_token(placeholder, text, vectors=None)
    probe.remove()
    return {name: vectors.detach() for name, vectors in probe.embeddings().items()}


def _first_row(gradient: Tensor) -> Tensor:
    """The gradient of the modifier token alone."""
    kept = torch.zeros_like(gradient)
    kept[:1] = gradient[:1]
    return kept


METHOD = CustomDiffusion
