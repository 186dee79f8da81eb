"""The part of the rank-one edit that depends on the prompt alone, computed once for all layers (Eq. 3 and 4).

For encodings e of a prompt and J concepts:

    e' = e − Σ_j <u_j, e> u_j             what the concepts do not explain of the encoding
    g_j = sigmoid((r_j(e) − β) / τ)       how much of each concept is there instead
    e' + Σ_j g_j s_j                      what locked keys project: W e' + Σ_j g_j o*_j, for o*_j = W s_j

A concept whose β is infinite is left out: its gate is 0, and the sums go over the others. Without others, e' = e.

`perfusion.editing.layer` brings these to the layers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perfusion.editing import EditError
from perfusion.editing.equations import gate, low_rank_update, similarity

# Smallest eigenvalue of the cosines between concepts, in the C⁻¹ metric, as a share of the largest, below which they
# cannot be told apart in float32.
_DEPENDENT = 1e-6

# Eigenvalue of the cosines between concepts, whose diagonal is 1, below which a direction between them is rounding.
_SAME = 1e-4

Directions = Tensor | Callable[[Tensor], Tensor]


class EditedEncoding(NamedTuple):
    """Encodings as the edited projections read them."""

    remainder: Tensor  # e' (B, N, d)
    locked: Tensor  # e' + Σ_j g_j s_j (B, N, d)
    gates: Tensor  # g_j(e) (J, B, N), float32 at least


class PromptGate(nn.Module):
    """What all layers of an edit share, for J concepts.

    `target_inputs` (J, d) holds the i*_j, `directions` (J, d) the C⁻¹i*_j, each at a scale of its own:
    r_j(e) = <i*_j, e> / <i*_j, i*_j> has no need of the scale, nor of anything else of C, even for many concepts.
    `superclass_inputs` (J, d) holds the s_j of locked keys. Float32 or float64; buffers, so that checkpoints hold them.
    In place of directions, a function can be given that takes them from target inputs; it is called at first need.
    """

    target_inputs: Tensor
    directions: Tensor
    superclass_inputs: Tensor

    def __init__(
        self,
        target_inputs: Tensor,
        directions: Directions,
        superclass_inputs: Tensor,
        beta: float | Tensor,
        tau: float | Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("target_inputs", None)
        self.register_buffer("directions", None)
        self.register_buffer("superclass_inputs", superclass_inputs.detach().clone())
        self.forget: Callable[[], None] = nobody  # called when anything is set, by whoever keeps what came of it
        # Of the concept, for messages and checks: its word, its file, the second moment that its direction is from.
        self.label, self.source, self.covariance = "", "", ""
        self.move(target_inputs, directions)
        self.beta, self.tau = beta, tau

    @property
    def beta(self) -> float | Tensor:
        """β: a number, or a tensor (S,) with one value per sample, (J, 1) with one per concept, or (J, S).

        Row k of a batch takes value k mod S, so that S values serve the S prompts and the S empty prompts of guidance.
        Setting it keeps a copy. `inf` leaves the concept out of the edit. Raises EditError for NaN, −inf, or a tensor
        of another shape.
        """
        return self._beta

    @beta.setter
    def beta(self, value: float | Tensor) -> None:
        self._beta = self._checked("beta", value, -math.inf, math.inf)
        self._leaves_out = bool(torch.as_tensor(self._beta).isposinf().any())

    @property
    def tau(self) -> float | Tensor:
        """τ > 0 and finite, in the forms of `beta`; raises EditError likewise."""
        return self._tau

    @tau.setter
    def tau(self, value: float | Tensor) -> None:
        self._tau = self._checked("tau", value, 0, math.nextafter(math.inf, 0))

    def move(self, target_inputs: Tensor, directions: Directions) -> None:
        """Replace the i*_j and the C⁻¹i*_j, (J, d) each, by copies of these. Raises EditError for dependent i*_j."""
        self.target_inputs = target_inputs.detach().clone()
        self._pending = None if isinstance(directions, Tensor) else directions
        self.directions = (directions if isinstance(directions, Tensor) else target_inputs).detach().clone()
        self.forget()
        if len(target_inputs) > 1:
            share = _least_eigenvalue(self.similarity(self.target_inputs))
            if not share > _DEPENDENT:
                raise EditError(
                    f"target inputs: found {len(target_inputs)} concepts that are linearly dependent (smallest "
                    f"eigenvalue of their cosines {share:.1e} of the largest), expected independent ones (above "
                    f"{_DEPENDENT:.0e})"
                )

    def similarity(self, e: Tensor) -> Tensor:
        """r_j(e) of encodings `e` (..., d): (J, ...), float32 at least."""
        self.settle()
        i, v = self.target_inputs.to(e.device), self.directions.to(e.device)
        over_concepts = (len(v), *[1] * (e.dim() - 1), -1)
        return similarity(e, v.view(over_concepts)) / similarity(i, v).view(over_concepts[:-1])

    def settle(self) -> None:
        """Make `directions` those of the target inputs, if a function was given that has not been called yet."""
        if self._pending:
            self.directions, self._pending = self._pending(self.target_inputs), None

    def forward(self, e: Tensor) -> EditedEncoding:
        """The edit of encodings `e` (B, N, d), any float dtype; `remainder` and `locked` have the same."""
        with torch.autocast(e.device.type, enabled=False):  # half precision would round terms before they cancel
            r = self.similarity(e)
            g = gate(r, self._per_row("beta", len(e)), self._per_row("tau", len(e)))
            c = self._components(r) if not self.leaves_out else self._components_of(r, self.kept(len(e)).to(e.device))
            remainder = low_rank_update(e.to(r.dtype), -c, self.target_inputs.to(e.device))
            locked = low_rank_update(remainder, g, self.superclass_inputs.to(e.device))
        return EditedEncoding(remainder.to(e.dtype), locked.to(e.dtype), g)

    @property
    def leaves_out(self) -> bool:
        """Whether β is infinite for a concept in any row."""
        return self._leaves_out

    def kept(self, rows: int) -> Tensor:
        """(J, rows) bool: which concepts the edit has in which row of a batch; those of infinite β are left out.

        Raises:
            EditError: β has values for another number of samples.
        """
        beta = torch.as_tensor(self._per_row("beta", rows))
        return ~beta.isposinf().expand(len(self.target_inputs), rows)

    def _components(self, r: Tensor) -> Tensor:
        """c (J, B, N) with Σ_j <u_j, e> u_j = Σ_j c_j i*_j, from r (J, B, N).

        Both are the part of e in span{i*_j}: what is left has r_k = 0 for all k, so Σ_j r_k(i*_j) c_j = r_k(e). The
        orthonormal basis u would ask for C.
        """
        if len(r) == 1:
            return r  # r(i*) = 1
        return torch.linalg.solve(self.similarity(self.target_inputs.to(r)), r.flatten(1)).view_as(r)

    def _components_of(self, r: Tensor, kept: Tensor) -> Tensor:
        """c (J, B, N) likewise, but in each row for those concepts alone that `kept` (J, B) has there; 0 for others."""
        r = torch.where(kept[..., None], r, 0)
        if len(r) == 1:
            return r
        both = kept.T[:, :, None] & kept.T[:, None, :]  # (B, J, J)
        one = torch.eye(len(r), dtype=torch.float64, device=r.device)
        apart = self._inverse(torch.where(both, self.similarity(self.target_inputs.to(r)).double(), one))
        return torch.einsum("bjk,kbn->jbn", apart.to(r), r)

    def _inverse(self, overlap: Tensor) -> Tensor:
        """Of r_j(i*_k) (..., J, J), float64."""
        return torch.linalg.inv(overlap)

    def _per_row(self, name: str, rows: int) -> float | Tensor:
        value = getattr(self, name)
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[-1] in (1, rows):
            return value
        if rows % value.shape[-1]:
            raise EditError(f"{name}: found {value.shape[-1]} values for a batch of {rows} rows, expected a divisor")
        return torch.cat([value] * (rows // value.shape[-1]), -1)

    def _checked(self, name: str, value: float | Tensor, above: float, most: float) -> float | Tensor:
        if isinstance(value, Tensor):
            value = value.detach().clone()
            if value.dim() > 2 or (value.dim() == 2 and len(value) != len(self.target_inputs)):
                raise EditError(
                    f"{name}: found shape {tuple(value.shape)}, expected a number, (S,) for S samples, or (J, 1) or "
                    f"(J, S) for J = {len(self.target_inputs)} concepts"
                )
        numbers = torch.as_tensor(value)
        if not bool(((numbers > above) & (numbers.double() <= most)).all()):
            expected = "finite values above 0" if above == 0 else "finite values, or inf to leave the concept out"
            raise EditError(f"{name}: found {value}, expected {expected}")
        self.forget()
        return value

    def _rows(self, name: str, rows: int, like: Tensor) -> Tensor:
        """β or τ as (J, rows)."""
        value = torch.as_tensor(self._per_row(name, rows), dtype=like.dtype, device=like.device)
        return value.expand(len(self.target_inputs), rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "forget": nobody}  # nobody keeps what comes of a copy


class JointGate(PromptGate):
    """Several gates as one, of all their concepts: Eq. 4. It holds nothing of its own but reads its members.

    Every concept keeps its own β and τ. What concepts explain together is taken out of an encoding once, also where
    their i*_j are nearly or exactly one; what they put in adds up, so twins that are both open count twice.
    """

    members: tuple[PromptGate, ...]

    def __init__(self, members: Sequence[PromptGate]) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "members", tuple(members))  # not registered: they belong to their methods

    def __getattr__(self, name: str) -> Any:
        if name not in ("target_inputs", "directions", "superclass_inputs"):
            return super().__getattr__(name)
        parts = [getattr(member, name) for member in self.members]  # on the devices where they were attached
        return torch.cat([part.to(parts[0].device) for part in parts])

    def settle(self) -> None:
        for member in self.members:
            member.settle()

    def cosines(self) -> Tensor:
        """(J, J) float64: of the angles between the i*_j in the C⁻¹ metric."""
        overlap = self._overlap()
        product = overlap * overlap.T
        return overlap.sign() * product.clamp(0, 1).sqrt()

    @property
    def leaves_out(self) -> bool:
        return any(member.leaves_out for member in self.members)

    def _components(self, r: Tensor) -> Tensor:
        return (self._inverse(self._overlap()).to(r) @ r.flatten(1)).view_as(r)

    def _inverse(self, overlap: Tensor) -> Tensor:
        # The smallest eigenvalues say which directions are no more than rounding.
        values, vectors = torch.linalg.eig(overlap.cpu())
        inverse = torch.where(values.real > _SAME, 1 / values.real, 0.0)
        return ((vectors * inverse[..., None, :]) @ torch.linalg.inv(vectors)).real

    def _overlap(self) -> Tensor:
        """r_j(i*_k) (J, J), float64, on the CPU: MPS has neither float64 nor eigenvalues."""
        return self.similarity(self.target_inputs).cpu().double()

    def _per_row(self, name: str, rows: int) -> Tensor:
        like = self.members[0].target_inputs
        return torch.cat([member._rows(name, rows, like) for member in self.members])


def _least_eigenvalue(overlap: Tensor) -> float:
    """Of r_j(i*_k), over the largest: its rows and columns are scaled, but its eigenvalues are those of the cosines."""
    values = torch.linalg.eigvals(overlap.cpu().double()).real  # MPS has neither
    return (values.min() / values.max()).item()


def nobody() -> None:
    """What a gate tells of a change while nobody keeps what came of it."""
