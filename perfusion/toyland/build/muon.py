"""Muon: momentum whose update is orthogonalised, which trains Toyland's small networks in far fewer steps than AdamW.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. `torch.optim.Muon` orthogonalises
in bfloat16, which CPUs without bfloat16 arithmetic do many times slower than float32, and takes matrices only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan et al., steep at zero
ITERATIONS = 4
MOMENTUM = 0.95  # decay of the running mean of the gradients


def orthogonalise(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of `matrix` (m, n) and singular values near one.

    Quintic Newton-Schulz iteration in the matrix's own type. After 4 iterations, singular values from 1 % of the norm
    upwards are at 0.65 to 1.25; smaller ones have grown, but are not there yet. All zeros stay zeros.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for weights of two or more dimensions (a convolution is its (out, in h w)).

    p <- p - rate max(1, m / n)^0.5 orthogonalise(p's momentum as (m, n))

    Args:
        parameters: weights of two or more dimensions.
        lr: step size; 0.02 suits most networks, since every update has spectral norm about one.
        dtype: that the updates are orthogonalised in.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(parameters, {"lr": lr})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter; parameters without a gradient stay.

        Processes that train together (equal gradients on all) orthogonalise a share each and add up the results.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            moved.sort(key=Tensor.numel, reverse=True)  # neighbours cost about the same, so the shares are fair
            updates = []
            for index, parameter in enumerate(moved):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                mean = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                update = parameter.grad.lerp(mean, MOMENTUM).flatten(1)
                mine = index % world == rank
                whole = orthogonalise(update.to(self.dtype)).to(update) if mine else torch.zeros_like(update)
                updates.append(whole.reshape(-1))
            flat = torch.cat(updates)
            if world > 1:
                dist.all_reduce(flat)
            for parameter, update in zip(moved, flat.split([p.numel() for p in moved]), strict=True):
                shape = max(1.0, len(parameter) ** 2 / parameter.numel()) ** 0.5
                parameter.add_(update.view(parameter.shape), alpha=-group["lr"] * shape)
