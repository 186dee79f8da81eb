"""The gates of concepts: what a rank-one edit has of each of them besides its outputs, and what they are set to."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perfusion.editing import EditError, equations
from perfusion.editing.equations import EditedEncoding

Directions = Tensor | Callable[[Tensor], Tensor]


def nobody() -> None:
    """What a gate tells of a change while nobody keeps what came of it."""


class PromptGate(nn.Module):
    """What all layers of an edit share of one concept.

    `target_inputs` (1, d) holds i*, `directions` (1, d) C⁻¹i* at any scale, since r(e) = <i*, e> / <i*, i*> has no need
    of it; `superclass_inputs` (1, d) the s of locked keys. Float32 or float64; buffers, so that checkpoints hold them.
    In place of a direction, a function can be given that takes it from the target input; it is called at first need.
    With `gated_removal` the gate also rules what the edit takes out of an encoding, see `equations.edited_encoding`.
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
        gated_removal: bool = False,
    ) -> None:
        super().__init__()
        self.gated_removal = gated_removal
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
        """β: a number, or a tensor (S,) with one value per sample.

        Row k of a batch takes value k mod S, so that S values serve the S prompts and the S empty prompts of guidance.
        Setting it keeps a copy. `inf` leaves the concept out of the edit. Raises EditError for NaN, −inf, or a tensor
        of another shape.
        """
        return self._beta

    @beta.setter
    def beta(self, value: float | Tensor) -> None:
        self._beta = self._checked("beta", value, -math.inf, math.inf)
        self.leaves_out = bool(torch.as_tensor(self._beta).isposinf().any())  # in any row

    @property
    def tau(self) -> float | Tensor:
        """τ > 0 and finite, in the forms of `beta`; raises EditError likewise."""
        return self._tau

    @tau.setter
    def tau(self, value: float | Tensor) -> None:
        self._tau = self._checked("tau", value, 0, math.nextafter(math.inf, 0))

    def move(self, target_inputs: Tensor, directions: Directions) -> None:
        """Replace i* and C⁻¹i*, (1, d) each, by copies of these."""
        self.target_inputs = target_inputs.detach().clone()
        self._pending = None if isinstance(directions, Tensor) else directions
        self.directions = (directions if isinstance(directions, Tensor) else target_inputs).detach().clone()
        self.forget()

    def settle(self) -> None:
        """Make `directions` that of the target input, if a function was given that has not been called yet."""
        if self._pending:
            self.directions, self._pending = self._pending(self.target_inputs), None

    def similarity(self, e: Tensor) -> Tensor:
        """r(e) of encodings `e` (..., d): (1, ...), float32 at least."""
        self.settle()
        return equations.similarity(e, self.target_inputs.to(e.device), self.directions.to(e.device))

    def left_out(self, rows: int) -> list[bool]:
        """In which of a number of rows the concept is left out. Raises EditError, see `per_row`."""
        return self.per_row("beta", rows).isposinf().tolist()

    def per_row(self, name: str, rows: int) -> Tensor:
        """β or τ, (rows,). Raises EditError where there are values for another number of samples."""
        like = self.target_inputs
        value = torch.as_tensor(getattr(self, name), dtype=like.dtype, device=like.device).flatten()
        if rows % len(value):
            raise EditError(f"{name}: found {len(value)} values for a batch of {rows} rows, expected a divisor")
        return value.repeat(rows // len(value))

    def _checked(self, name: str, value: float | Tensor, above: float, most: float) -> float | Tensor:
        if isinstance(value, Tensor):
            value = value.detach().clone()
            if value.dim() > 1:
                raise EditError(
                    f"{name}: found shape {tuple(value.shape)}, expected a number, or (S,) with one value per sample"
                )
        numbers = torch.as_tensor(value)
        if not bool(((numbers > above) & (numbers.double() <= most)).all()):
            expected = "finite values above 0" if above == 0 else "finite values, or inf to leave the concept out"
            raise EditError(f"{name}: found {value}, expected {expected}")
        self.forget()
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "forget": nobody}  # nobody keeps what comes of a copy


def edited_encoding(gates: Sequence[PromptGate], e: Tensor, counts: Tensor | None = None) -> EditedEncoding:
    """The edit of encodings `e` (B, N, d) by the concepts of all `gates` together: Eq. 4. Each keeps its own β and τ.

    `counts` (B, N) bool: the positions that the attention looks at; None: all.

    Raises:
        EditError: β or τ has values for another number of samples.
    """
    beta, tau = (torch.stack([gate.per_row(name, len(e)).to(e.device) for gate in gates]) for name in ("beta", "tau"))
    kept = ~beta.isposinf() if any(gate.leaves_out for gate in gates) else None
    i, v, s = (_together(gates, name).to(e.device) for name in ("target_inputs", "directions", "superclass_inputs"))
    removal = [gate.gated_removal for gate in gates]
    gated = torch.tensor(removal, device=e.device) if any(removal) else None
    return equations.edited_encoding(e, i, v, s, beta, tau, kept, gated, counts)


def cosines(gates: Sequence[PromptGate]) -> Tensor:
    """(J, J) float64: of the angles between the i*_j in the C⁻¹ metric."""
    i, v = (_together(gates, name) for name in ("target_inputs", "directions"))
    return equations.cosines(i, v)


def _together(gates: Sequence[PromptGate], name: str) -> Tensor:
    for gate in gates:
        gate.settle()
    parts = [getattr(gate, name) for gate in gates]  # on the devices where they were attached
    return torch.cat([part.to(parts[0].device) for part in parts])
