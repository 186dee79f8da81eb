"""`python -m perfusion.export`: one strength of a concept as a LoRA and a textual inversion, for other programs.

With g(e) = sigmoid((r(e) − β) / τ) the edit of a projection is h = W (e − r i*) + g o*, which is no LoRA: the gate is
not linear in the encoding e. With s r in the gate's place it is one of rank 1,

    h = W e + (s o* − W i*) r(e),    r(e) = <C⁻¹i*, e> / <C⁻¹i*, i*>.

s is the gate's value where the concept is itself, r(i*) = 1: s = sigmoid((1 − β) / τ). There both edits are the same.
Elsewhere the concept comes in by s r instead of g, and g is the smaller one where the gate closes: the export shows
more of the concept in other words. How much is measured on encodings of prompts.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

from perfusion.cli import aligned, parse_key_values, run_cli

# Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from torch import Tensor

    from perfusion.concept import Attached

USAGE = """
Usage: python -m perfusion.export concept=<file> beta=0.6 path=<weights> [key=value ...]

Writes what comes nearest to a concept where this package is not: a LoRA of rank 1 on the cross-attention's keys and
values, which has one strength and no gate, and a textual inversion with the concept's word. Both in safetensors:
  <name>-beta-0.6.safetensors             the LoRA, for A1111 and ComfyUI (the names of kohya's scripts)
  <name>-beta-0.6-diffusers.safetensors   the same for diffusers: pipe.load_lora_weights(...)
  <name>-word.safetensors                 the word: pipe.load_textual_inversion(...); in other programs the file's name
How far it is from the gated edit is measured and printed. docs/sharing.md says what goes where.
"""

# SDXL's embeddings are one file, with the vectors of both text encoders under these names.
_XL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass
class ExportConfig:
    """The options of `python -m perfusion.export`."""

    concept: str = MISSING  # concept file, or hub:owner/name
    beta: float | None = None  # the strength; null: the concept's own
    tau: float | None = None  # the gate's softness; null: the concept's own
    out: str | None = None  # folder; null: exported/<name>
    name: str | None = None  # of the files; null: the placeholder's letters
    backbone: str | None = None  # toyland, sd15, sdxl, ...; null: the kind that the concept was trained on
    path: str | None = None  # backbone's diffusers folder, .safetensors file or hub id; null: the weights that it ships
    layout: str | None = None  # configs of a .safetensors file: known layout or diffusers folder; null: as it looks
    device: str = "cpu"  # where the model is loaded


class ExportError(ValueError):
    """A concept that cannot be exported; says what was found and what was expected."""


@dataclass(frozen=True)
class RankOne:
    """What is added to the weight (h, d) of a projection: up · down."""

    up: Tensor  # (h, 1) float64
    down: Tensor  # (1, d) float64


def strength_of(attached: Attached) -> float:
    """s, the gate's value at the β and τ that are set where the similarity is 1."""
    import torch

    return float(torch.sigmoid(torch.tensor((1 - float(attached.beta)) / float(attached.tau), dtype=torch.float64)))


def rank_one(attached: Attached) -> dict[str, RankOne]:
    """The update of each edit site, by its name, at the β and τ that are set."""
    import torch

    from perfusion.editing.gate import PromptGate
    from perfusion.editing.layer import unedited
    from perfusion.methods.perfusion import Perfusion, Removal

    method = attached.method
    assert isinstance(method, Perfusion) and isinstance(method.gate, PromptGate)
    i, v, s = (
        part[0].detach().double().cpu()
        for part in (method.gate.target_inputs, method.gate.directions, method.gate.superclass_inputs)
    )
    strength = strength_of(attached)
    down = (v / (v @ i))[None]
    own = {"k": iter(method.keys), "v": iter(method.values)}
    updates = {}
    for site in attached.backbone.edit_sites():
        weight = unedited(site.projection).weight
        assert isinstance(weight, torch.Tensor)
        W = weight.detach().double().cpu()
        output = next(own[site.kind], None)
        o = W @ s if output is None else output.detach()[0].double().cpu()
        removed = strength if method.options.removal is Removal.gated else 1.0
        updates[site.name] = RankOne((strength * o - removed * (W @ i))[:, None], down)
    return updates


def differences(attached: Attached, updates: Mapping[str, RankOne], prompts: Sequence[str]) -> list[tuple[str, ...]]:
    """How far K and V are from those of the gated edit, as rows of a table.

    Relative errors ‖h − h_gated‖ / ‖h_gated‖ over the positions of all prompts, means over the layers: of the update,
    of the update when it is merged into float16 weights, and of the model without an edit.

    Args:
        prompts: templates with a `{}`, in which the placeholder and then the superclass is put.
    """
    import torch

    from perfusion.data.prompts import fill
    from perfusion.editing.layer import unedited

    concept, backbone = attached.concept, attached.backbone
    errors: dict[tuple[str, str], list[list[float]]] = {}
    with torch.no_grad():
        with_word = backbone.encode([fill(template, concept.placeholder) for template in prompts], concept.placeholder)
        without = backbone.encode([fill(template, concept.superclass) for template in prompts], None)
        everywhere = torch.ones_like(with_word.concept)
        places = (
            ("at the word", with_word.context, with_word.concept),
            ("elsewhere in prompts with the word", with_word.context, ~with_word.concept),
            (f"in prompts with {concept.superclass!r} instead", without.context, everywhere),
        )
        for site in backbone.edit_sites():
            weight = unedited(site.projection).weight
            assert isinstance(weight, torch.Tensor)
            W, update = weight.detach().double().cpu(), updates[site.name]
            added = W + update.up @ update.down
            merged = (W.half().float() + (update.up.float() @ update.down.float())).half().double()
            for place, context, where in places:
                gated = site.projection(context)[where].double().cpu()
                e = context[where].double().cpu()
                found = [float((e @ M.T - gated).norm() / gated.norm()) for M in (added, merged, W)]
                errors.setdefault((place, site.kind), []).append(found)
    rows: list[tuple[str, ...]] = [
        ("relative difference from the gated edit", "", "LoRA", "merged in float16", "no edit")
    ]
    for (place, kind), found in sorted(errors.items(), key=lambda item: [p for p, *_ in places].index(item[0][0])):
        means = [sum(column) / len(column) for column in zip(*found, strict=True)]
        rows.append((place, kind.upper(), *(f"{mean:.3f}" for mean in means)))
    return rows


def lora_files(updates: Mapping[str, RankOne]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The updates as float32 tensors with the names of diffusers, and with those of kohya's scripts."""
    import torch

    diffusers: dict[str, Tensor] = {}
    kohya: dict[str, Tensor] = {}
    for name, update in updates.items():
        down, up = update.down.float().clone(), update.up.float().contiguous()
        diffusers |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        layer = f"lora_unet_{name.replace('.', '_')}"
        kohya |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(1.0)}
    return diffusers, kohya


def word_file(attached: Attached) -> dict[str, Tensor]:
    """The vectors of the concept's word as textual inversions have them, float32: (vectors, d_e) under the placeholder,
    or for SDXL under `clip_l` and `clip_g`."""
    vectors = {
        name.removeprefix("embedding."): tensor.float().contiguous()
        for name, tensor in attached.concept.tensors.items()
        if name.startswith("embedding.")
    }
    if len(vectors) == 1:
        return {attached.concept.placeholder: next(iter(vectors.values()))}
    return {_XL[encoder]: tensor for encoder, tensor in vectors.items()}


def export(config: ExportConfig) -> tuple[Path, list[str]]:
    """Write the three files into one folder; gives it, and the lines that say how far the LoRA is from the gated edit.

    Raises:
        ExportError: a concept of another method, or of a model that projects its text; β without a strength; or a file
            that exists.
        ConceptFileError, BackboneError, HubError: what cannot be loaded, or does not fit.
    """
    from perfusion.backbones import backbone_class, backbone_config
    from perfusion.backbones.base import Backbone
    from perfusion.concept import Concept
    from perfusion.data.prompts import validation_prompts
    from perfusion.hub import named_file

    concept = Concept.load(named_file(config.concept))
    if concept.method != "perfusion":
        raise ExportError(
            f"{concept.source}: found a concept of the method {concept.method!r}, expected one of perfusion, whose "
            "gate is replaced"
        )
    if config.beta is not None and not math.isfinite(config.beta):
        raise ExportError(
            f"beta: found {config.beta}, expected a number: without the concept there is nothing to export"
        )
    if backbone_class(concept.family).inputs_of is not Backbone.inputs_of:
        raise ExportError(
            f"{concept.source}: found a concept of {concept.family}, expected one of Stable Diffusion: its keys and "
            "values read a projection of the text, which other programs have no such LoRA and word for"
        )
    name = config.name or re.sub(r"[\W_]+", "-", concept.placeholder).strip("-") or "concept"
    chosen = backbone_config(config.backbone or concept.family, config.path, device=config.device, layout=config.layout)
    backbone = backbone_class(chosen.name).load(chosen)
    lock = "none" if concept.settings.get("key_lock") == "none" else "local"
    with concept.attach(backbone, beta=config.beta, tau=config.tau, key_lock=lock) as attached:
        stem = f"{name}-beta-{float(attached.beta):g}"
        out = Path(config.out or Path("exported") / stem).expanduser()
        updates = rank_one(attached)
        diffusers, kohya = lora_files(updates)
        word = word_file(attached)
        files = {
            f"{stem}.safetensors": kohya,
            f"{stem}-diffusers.safetensors": diffusers,
            f"{name}-word.safetensors": word,
        }
        for file in files:
            if (out / file).exists():
                raise ExportError(f"out: {out / file} exists, expected a new file")
        told = f"β {float(attached.beta):g}, τ {float(attached.tau):g}: strength s = {strength_of(attached):.3f}"
        prompts = validation_prompts(backbone.config.prompts)
        lines = [told, *aligned(differences(attached, updates, prompts), right=(2, 3, 4))]
    _write(out, files)
    return out, [*(f"{out / file} ({(out / file).stat().st_size / 1000:.1f} kB)" for file in files), "", *lines]


def _write(out: Path, files: Mapping[str, dict[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    from perfusion.files import atomic_path

    out.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        with atomic_path(out / file) as temporary:
            save_file(tensors, temporary, {"format": "pt"})


def main(argv: Sequence[str]) -> None:
    """Export what a command line describes."""
    words = [word.removeprefix("backbone.") for word in argv]  # `backbone.path=`, as in training
    _, lines = export(parse_key_values(words, ExportConfig, USAGE, positional="concept"))
    print(*lines, sep="\n")


if __name__ == "__main__":
    sys.exit(run_cli(main))
