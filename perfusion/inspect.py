"""`python -m perfusion.inspect`: what a concept file holds, or what there is to edit in a backbone."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfusion.cli import aligned, parse_key_values, run_cli
from perfusion.config import ConfigError

# Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from perfusion.backbones.base import Backbone
    from perfusion.concept import Concept
    from perfusion.methods.base import Method

USAGE = """
Usage: python -m perfusion.inspect <concept file>                               what it holds; loads no model
       python -m perfusion.inspect backbone=sd15                               what a method edits, without weights
       python -m perfusion.inspect <concept file> prompt='a photo of <cat*>'   similarity r and gate g of each token
       python -m perfusion.inspect <concept file> card=true                    its model card, as Markdown
"""

Row = tuple[str, ...]

_OF_PICTURES = ("key_lock", "sample_beta", "sample_tau", "vectors")  # settings that a converted concept has
_NAMED = 8  # tensors that are named one by one


@dataclass
class InspectConfig:
    """The options of `python -m perfusion.inspect`."""

    concept: str | None = None  # concept file, or hub:owner/name; `concept=` may be left out
    card: bool = False  # print the card that goes with it to the hub
    backbone: str | None = None  # toyland, sd15, sdxl, ...; with a prompt null is that of the concept's training
    prompt: str | None = None  # text whose tokens are looked at
    beta: float | None = None  # with a prompt: gate's threshold; null: as the concept says
    tau: float | None = None  # with a prompt: gate's softness; null: as the concept says
    path: str | None = None  # backbone's diffusers folder or .safetensors file; null: what it ships, or a known layout
    layout: str | None = None  # configs of a .safetensors file: known layout or diffusers folder; null: as it looks
    dtype: str = "float32"  # with a prompt: float32, float16 or bfloat16
    device: str = "auto"  # with a prompt: auto (cuda, then mps, then cpu)
    method: str = "perfusion"  # without a concept: whose concept is measured


def main(argv: Sequence[str]) -> None:
    """Print what a command line asks for."""
    words = [word.removeprefix("backbone.") for word in argv]  # `backbone.path=`, as in training
    for line in inspect(parse_key_values(words, InspectConfig, USAGE, positional="concept")):
        print(line)


def inspect(config: InspectConfig) -> list[str]:
    """The lines of the answer.

    Raises:
        ConfigError: neither a concept nor a backbone, a prompt without a concept, or no such backbone or method.
        ConceptFileError, BackboneError, HubError: what cannot be read.
    """
    from perfusion.concept import Concept
    from perfusion.hub import PREFIX, SAMPLES, named_file

    if config.concept is None and config.card:
        raise ConfigError("found card= without a concept file; --help says what there is to inspect")
    if config.concept is None and (config.backbone is None or config.prompt is not None):
        missing = "neither a concept file nor backbone=" if config.prompt is None else "prompt= without a concept file"
        raise ConfigError(f"found {missing}; --help says what there is to inspect")
    lines: list[str] = []
    if config.concept is not None:
        path = named_file(config.concept)
        concept = Concept.load(path)
        if config.card:
            of_hub = config.concept.startswith(PREFIX)
            repo_id = config.concept.removeprefix(PREFIX).partition("@")[0] if of_hub else None
            return concept.card(repo_id, samples=(path.parent / SAMPLES).is_file()).splitlines()
        lines += describe_concept(concept, path)
        if config.prompt is not None:
            lines += ["", *describe_prompt(concept, config)]
    if config.backbone is not None and config.prompt is None:
        lines += [""] * bool(lines) + describe_backbone(config.backbone, config.path, config.method, config.layout)
    return lines


def describe_concept(concept: Concept, path: Path) -> list[str]:
    """Everything that a concept file says, as lines; needs no model."""
    from perfusion.concept import CONVERTED, FORMAT_VERSION

    numbers = sum(tensor.numel() for tensor in concept.tensors.values())
    known = {key: value for key, value in concept.settings.items() if not concept.converted or key in _OF_PICTURES}
    settings = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in known.items()
    )
    unknown = f"not known (converted from {CONVERTED})"
    if concept.converted:
        settings += f"; those of its training are {unknown}"
    facts = [
        ("file", f"{path} ({path.stat().st_size:,} bytes)"),
        ("format", f"version {FORMAT_VERSION}"),
        ("method", concept.method),
        ("placeholder", concept.placeholder),
        ("superclass", concept.superclass),
        ("settings", settings),
        ("seed", unknown if concept.converted else str(concept.seed)),
        ("covariance", _covariance(concept)),
        ("backbone", ", ".join(f"{part} {value}" for part, value in concept.fingerprint.items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in concept.versions.items())),
        ("commit", concept.commit or "none (not made in a checkout)"),
        ("hash", concept.hash),
        ("numbers", f"{numbers:,}"),
    ]
    rows: list[Row] = [("tensor", "shape", "dtype", "bytes", "mean", "std", "largest")]
    for name, tensor in concept.tensors.items():
        values = tensor.double()
        spread = (values.mean(), values.std(correction=0), values.abs().max())
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append((name, _shape(tensor.shape), dtype, f"{tensor.nbytes:,}", *(f"{v.item():.4g}" for v in spread)))
    return [*aligned(facts), "", *aligned(rows, right=range(3, 7))]


def describe_backbone(name: str, path: str | None, method_name: str, layout: str | None = None) -> list[str]:
    """Edit sites of a backbone, and the size of a concept on it, as lines; needs no weights."""
    from perfusion.methods.base import Word, build

    backbone = meta_backbone(name, path, layout)
    sites = backbone.edit_sites()
    rows: list[Row] = [("edit site", "kind", "in", "out")]
    out = {"k": 0, "v": 0}
    for site in sites:
        weight: Any = site.projection.weight
        outputs, inputs = weight.shape
        rows.append((site.name, site.kind, str(inputs), str(outputs)))
        out[site.kind] += outputs
    method = build({"name": method_name}, Word("<new*>", "object"))
    shapes = method.state_shapes(backbone)
    named = [f"{key} {_shape(shape)}" for key, shape in shapes.items()]
    tensors = ", ".join(named) if len(named) <= _NAMED else f"{len(named)} tensors, from {named[0]} to {named[-1]}"
    facts = [
        ("sites", f"{len(sites)}, with {out['k']:,} outputs of K and {out['v']:,} of V"),
        (f"concept of {method_name}", tensors),
        ("numbers", f"{sum(math.prod(shape) for shape in shapes.values()):,}"),
        ("file", f"{file_bytes(method, shapes, backbone):,} bytes in float16"),
    ]
    return [*aligned(rows, right=(2, 3)), "", *aligned(facts)]


def describe_prompt(concept: Concept, config: InspectConfig) -> list[str]:
    """Similarity r and gate g of a concept at each token of a prompt, as lines; loads the backbone.

    The padding after the prompt is one line, with the range of its values: the edit touches these positions, too.

    Raises:
        ConfigError: the concept's method has no gate.
    """
    import torch

    from perfusion.backbones import load_backbone
    from perfusion.editing.gate import PromptGate, edited_encoding

    assert config.prompt is not None
    concept.check_dial("beta")
    backbone = load_backbone(config, default=concept.family)
    with concept.attach(backbone, beta=config.beta, tau=config.tau) as attached, torch.no_grad():
        gate = getattr(attached.method, "gate", None)
        assert isinstance(gate, PromptGate)
        inputs = backbone.encode([config.prompt], None).inputs  # (1, N, d)
        r = gate.similarity(inputs)[0, 0].tolist()
        g = edited_encoding([gate], inputs).gates[0, 0].tolist()
        strength = f"β {attached.beta}, τ {attached.tau}"
        tokens = backbone.tokens(config.prompt)
    rows: list[Row] = [("position", "token", "r", "g")]
    rows += [(str(k), t.removesuffix("</w>").strip("▁"), f"{r[k]:.3f}", f"{g[k]:.3f}") for k, t in tokens.items()]
    if rest := [k for k in range(len(r)) if k not in tokens]:
        ranges = (_range([values[k] for k in rest]) for values in (r, g))
        rows.append((f"{rest[0]}–{rest[-1]}", "padding", *ranges))
    return [f"{config.prompt!r}, {strength}", *aligned(rows, right=(2, 3))]


def meta_backbone(name: str, path: str | None, layout: str | None = None) -> Backbone:
    """A backbone without weights, on the meta device: a known layout, or that of a diffusers folder or a checkpoint.

    Raises:
        ConfigError: no such backbone.
        BackboneError: neither a layout nor a folder with configs.
    """
    from perfusion.backbones import BackboneError, backbone_class, backbone_config
    from perfusion.backbones.layouts import available_layouts, meta_pipeline
    from perfusion.backbones.loading import reading

    config = backbone_config(name, path, layout=layout)
    cls: Any = backbone_class(config.name)
    if config.path is None and name in available_layouts():
        return cls.around(meta_pipeline(name), config)
    origin = cls.source(config)
    if not origin.local:
        raise BackboneError(f"path: found {origin.name!r}, expected a folder: the layout is read from its files")
    with reading(origin):
        pipe = meta_pipeline(str(origin.layout or origin.name))
    return cls.around(pipe, config)


def file_bytes(method: Method, shapes: Mapping[str, tuple[int, ...]], backbone: Backbone) -> int:
    """Size of the file of a concept with tensors of these shapes in float16 and all its metadata, by writing one."""
    import torch

    from perfusion.concept import LIBRARIES, Concept, save_concept
    from perfusion.provenance import provenance

    digest = "0" * 16
    concept = Concept(
        method=method.options.name,
        superclass=method.word.superclass,
        placeholder=method.word.placeholder,
        tensors={name: torch.zeros(shape) for name, shape in shapes.items()},
        settings=method.settings,
        fingerprint={
            **backbone.kind(),
            **dict.fromkeys((*backbone.text_encoders(), "projections"), digest),
            "prompts": backbone.config.prompts,
        },
        covariance="everyday:10000:0.01" if method.needs_covariance else "",
        seed=0,
        versions={name: version for name, version in provenance()["versions"].items() if name in LIBRARIES},
        commit="0" * 12,
        fingerprint_bfloat16=dict.fromkeys((*backbone.text_encoders(), "projections"), digest),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "concept.safetensors"
        save_concept(file, concept)
        return file.stat().st_size


def _covariance(concept: Concept) -> str:
    from perfusion.covariance.configured import spelled_out

    if concept.converted:
        return f"{concept.covariance} (package:digest)"
    return spelled_out(concept.covariance) if concept.covariance else "none needed"


def _shape(shape: Iterable[int]) -> str:
    return "×".join(str(size) for size in shape)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


if __name__ == "__main__":
    sys.exit(run_cli(main))
