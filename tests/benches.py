"""A small UNet with random concepts in it, and Eq. 3 and 4 written out in float64 beside it."""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from perfusion.backbones.latent_diffusion import edit_sites_of
from perfusion.editing.equations import EditedEncoding, precision_times
from perfusion.editing.gate import PromptGate, edited_encoding
from perfusion.editing.layer import Edit, EditedProjection, attach_edit
from perfusion.editing.places import EditSite

B, N, D = 2, 7, 24
BETA, TAU = 0.7, 0.15


def small_unet(dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=D,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return unet.eval().requires_grad_(False).to(dtype)


class Bench:
    """A UNet, J random concepts with their C, and a batch; everything in one dtype."""

    def __init__(self, count: int = 1, dtype: torch.dtype = torch.float32, trained_keys: bool = False) -> None:
        draw = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.unet = small_unet(dtype)
        self.sites = edit_sites_of(self.unet)
        mix, mean = normal(D, D), normal(D)
        samples = normal(200, D) @ mix + mean
        self.C = samples.T @ samples / len(samples)
        self.i, self.s = normal(count, D), normal(count, D)
        directions = precision_times(torch.linalg.cholesky(self.C), self.i)
        # The concepts come in along the tokens, in turn, so that the gates go from closed to open.
        share = torch.linspace(0, 1.5, N, dtype=torch.float64)[:, None]
        context = (normal(B, N, D) @ mix + mean) * (1 - share / 1.5) + share * self.i[[n % count for n in range(N)]]
        self.context, self.noisy = context.to(dtype), normal(B, 4, 4, 4).to(dtype)
        parts = (self.i, directions, self.s)
        self.gates = [PromptGate(*(part[j : j + 1].to(dtype) for part in parts), BETA, TAU) for j in range(count)]
        outputs = {site.name: normal(count, site.projection.out_features).to(dtype) for site in self.sites}
        self.all_outputs: list[dict[str, nn.Parameter | None]] = [
            {
                site.name: nn.Parameter(outputs[site.name][j : j + 1]) if site.kind == "v" or trained_keys else None
                for site in self.sites
            }
            for j in range(count)
        ]
        self.gate, self.outputs = self.gates[0], self.all_outputs[0]

    def attach(self) -> Edit:
        """All concepts; the edit of the last one."""
        return [self.attach_one(j, join=len(self.gates) > 1) for j in range(len(self.gates))][-1]

    def attach_one(self, j: int, join: bool = True) -> Edit:
        return attach_edit(self.sites, self.unet, self.gates[j], self.all_outputs[j], join)

    def encoding(self, context: Tensor | None = None) -> EditedEncoding:
        return edited_encoding(self.gates, self.context if context is None else context)

    def __call__(self, context: Tensor | None = None) -> Tensor:
        return self.unet(self.noisy, 3, encoder_hidden_states=self.context if context is None else context).sample

    def projections(self) -> dict[str, Tensor]:
        """What each site gives during one call of the UNet."""
        found: dict[str, Tensor] = {}

        def keep(site: EditSite) -> Callable[..., None]:
            return lambda module, args, output: found.update({site.name: output.detach().clone()})

        hooks = [site.projection.register_forward_hook(keep(site)) for site in self.sites]
        self()
        for hook in hooks:
            hook.remove()
        return found

    def closed_form(self, site: EditSite, beta: float = BETA) -> Tensor:
        """Eq. 4 (for one concept Eq. 3) with an explicit inverse of C and normal equations in place of the basis."""
        P = torch.linalg.inv(self.C)
        W, e, i = site.projection.weight.double(), self.context.double(), self.i
        inside = e @ P @ i.T @ torch.linalg.inv(i @ P @ i.T) @ i
        h = (e - inside) @ W.T
        for i_j, s_j, outputs in zip(i, self.s, self.all_outputs, strict=True):
            own = outputs[site.name]
            o_j = s_j @ W.T if own is None else own.detach().double()[0]
            r = e @ P @ i_j / (i_j @ P @ i_j)
            h = h + torch.sigmoid((r - beta) / TAU)[..., None] * o_j
        return h


class Counter:
    """How often the plain projections inside the edit have run."""

    def __init__(self, bench: Bench) -> None:
        self.calls = 0
        for site in bench.sites:
            projection = site.projection
            assert isinstance(projection, EditedProjection)
            projection.base_layer.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1


def snapshot(unet: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor], list[str]]:
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    return dict(unet.named_modules()), state, [name for name, _ in unet.named_parameters()]
