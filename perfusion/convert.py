"""`python -m perfusion.convert`: a concept of the package perfusion-pytorch as a concept file of this project.

Its files are pickles, `{"embed_params": (J, d_e), "key_value_params": [[i* (J, d), o* (J, h)], ...], "C_inv": (d, d)}`
with one pair for each K and V projection. This is the one place that opens a pickle, and torch then builds nothing
but tensors and plain containers from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import stat
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from perfusion.cli import parse_key_values, run_cli
from perfusion.config import ConfigError
from perfusion.files import first_line

# Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from torch import Tensor

    from perfusion.backbones.base import Backbone
    from perfusion.concept import Concept
    from perfusion.editing.places import EditSite

PACKAGE = "perfusion-pytorch"  # as in perfusion.concept.CONVERTED, which takes long to import
KEYS = ("embed_params", "key_value_params", "C_inv")
SAME_INPUT = 1e-3  # relative distance between layers up to which their i* are one
# What a file may have at most: bytes, concepts, numbers of an encoding and of an output, projections.
MAX_BYTES = 2**30
MAX_CONCEPTS, MAX_WIDTH, MAX_PAIRS = 4096, 2**16, 4096
LOCKED = 1e-2  # relative distance up to which keys are projections of one encoding

USAGE = """
Usage: python -m perfusion.convert file=<file.pt> superclass=cat placeholder='<cat*>' path=<backbone> [key=value ...]

Makes a concept file of a file that perfusion_pytorch.save wrote. That file names neither words nor model: give the
superclass that it was trained with, the word that shall stand for the concept in prompts, and the weights of the model.
The keys of all layers must fit the model's projections; a file of another model is refused.

Concepts are drawn together where they share C. Write that of the file, and train others with it and no ridge:

  python -m perfusion.convert ... matrix=C.safetensors
  python -m perfusion.train ... backbone.covariance.matrix=C.safetensors backbone.covariance.ridge=0
"""


@dataclass
class ConvertConfig:
    """The options of `python -m perfusion.convert`."""

    file: str = MISSING  # what perfusion_pytorch.save wrote
    superclass: str = MISSING  # the word that the concept was trained from
    placeholder: str = MISSING  # a word the tokenizer does not know, e.g. "<cat*>"
    index: int = 0  # which concept, if the file holds several
    out: str | None = None  # concept file to write; null: the same name with .safetensors
    matrix: str | None = None  # file to write C into, for trainings whose concepts shall be drawn beside it; null: none
    beta: float = 0.7  # of the gate in pictures: eval_beta of the package
    tau: float = 0.15  # likewise: eval_temperature
    backbone: str = "sd15"  # toyland, sd15, ...
    path: str | None = None  # backbone's folder, .safetensors file or hub id; null: what it ships
    layout: str | None = None  # configs of a .safetensors file: known layout or diffusers folder; null: as it looks
    device: str = "cpu"  # where the model is loaded to compare projections


class ConversionError(ValueError):
    """A file that cannot be converted; names the file, what was found and what was expected."""


@dataclass(frozen=True)
class Foreign:
    """One concept of a file."""

    embedding: Tensor  # (d_e,)
    target_input: Tensor  # i* (d,)
    outputs: list[Tensor]  # o* (h,) of each projection, in the file's order
    precision: Tensor  # C⁻¹ (d, d)


def read_package(path: Path, index: int = 0) -> Foreign:
    """The concept `index` in a file of perfusion-pytorch, float32.

    Raises:
        ConversionError: no such file, no pickle of tensors, other contents, no such concept, or values that are not
            finite; or layers that do not share i*.
    """
    import torch

    from perfusion.concept_file import shown
    from perfusion.methods.perfusion import MAX_SLANT, slant

    _check_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle of tensors fails in many ways
        reason = shown(first_line(error))
        raise ConversionError(
            f"{path}: found no pickle of tensors alone ({reason}{_hint(path)}), expected what {PACKAGE} saved"
        ) from error
    _check_other_package(path, content)
    if not isinstance(content, dict) or set(KEYS) - set(content):
        found = _some_keys(content) if isinstance(content, dict) else type(content).__name__
        raise ConversionError(f"{path}: found {found}, expected {', '.join(KEYS)}, as {PACKAGE} writes them")
    embeddings, pairs, precision = (content[key] for key in KEYS)
    if not _is_matrix(embeddings, MAX_CONCEPTS):
        raise ConversionError(f"{path}: found no embed_params (J, d_e): the concept's word is not in it")
    if not 0 <= index < len(embeddings):
        raise ConversionError(f"{path}: index: found {index}, expected 0 to {len(embeddings) - 1}")
    try:
        if not isinstance(pairs, (list, tuple)) or not 0 < len(pairs) <= MAX_PAIRS:
            raise ValueError(type(pairs))
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            raise ValueError(len(pairs))
        matrices = [(precision, MAX_WIDTH), *((part, MAX_CONCEPTS) for pair in pairs for part in pair)]
        if not all(_is_matrix(*matrix) for matrix in matrices):
            raise ValueError(len(matrices))
        inputs = torch.stack([pair[0][index].float() for pair in pairs])
        outputs = [pair[1][index].float() for pair in pairs]
        target = inputs.mean(0)
        if precision.shape != (len(target), len(target)):
            raise ValueError(precision.shape)
    except (TypeError, IndexError, RuntimeError, AttributeError, ValueError) as error:
        raise ConversionError(
            f"{path}: found key_value_params and C_inv of unexpected shapes, expected pairs of (J, d) and (J, h), and "
            "(d, d)"
        ) from error
    for name, tensors in (
        ("embed_params", [embeddings]),
        ("key_value_params", [inputs, *outputs]),
        ("C_inv", [precision]),
    ):
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ConversionError(f"{path}: found NaN or infinity in {name}, expected finite values")
    angle = slant(target, precision.float() @ target)
    if not angle <= MAX_SLANT:
        raise ConversionError(
            f"{path}: found target inputs i* or C_inv of length 0, or that make a right angle ({angle:.1e}), expected "
            f"‖i*‖‖C⁻¹i*‖ / <i*, C⁻¹i*> of {MAX_SLANT:.0e} at most"
        )
    distance = float((inputs - target).norm(dim=1).max() / target.norm())
    if not distance <= SAME_INPUT:
        raise ConversionError(
            f"{path}: found target inputs i* that differ by {distance:.1e} of their length between layers, expected "
            "one for all: was it trained to the end?"
        )
    return Foreign(embeddings[index].float(), target, outputs, precision.float())


def _check_file(path: Path) -> None:
    """Hold that there is a file to be read, and how much: it may be a stranger's, and compressed.

    Raises:
        ConversionError: it is none, or too large.
    """
    from perfusion.concept_file import shown

    try:
        found = path.stat()
    except (OSError, ValueError):
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise ConversionError(f"{shown(path)}: found no such file, expected one that perfusion_pytorch.save wrote")
    size = found.st_size
    try:
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(part.file_size for part in archive.infolist()))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        pass  # pickles were no archives once, and torch says of others why it cannot read them
    if size > MAX_BYTES:
        raise ConversionError(f"{path}: found {size:,} bytes, expected at most {MAX_BYTES:,}, as concepts are small")


def _hint(path: Path) -> str:
    """What may be said of a checkpoint of a training from the names in it, which are looked for and not read."""
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = [part for part in archive.namelist() if part.rpartition("/")[2] == "data.pkl"]
            found = b"target_output" in archive.read(pickled)
    except Exception:  # what is no archive, or a broken one, fails in many ways
        found = False
    return (
        "; it names target_output, as concepts of Latent Diffusion's own modules do: a target for each position of a "
        "prompt is not a rank-1 edit"
        if found
        else ""
    )


def _check_other_package(path: Path, content: Any) -> None:
    """Refuse a concept of the code that edits Latent Diffusion's own modules.

    It has a `target_output` in the state of each projection. With one for each of the 77 positions of a prompt, the
    edit depends on where a word stands, and no single o* gives the same.
    """
    states = [content, content.get("state_dict")] if isinstance(content, dict) else []
    for state in states:
        for name, value in state.items() if isinstance(state, dict) else ():
            if not isinstance(name, str) or name.rpartition(".")[2] != "target_output":
                continue
            shape = tuple(getattr(value, "shape", ()))
            reason = (
                f"a target for each of {shape[0]} positions of a prompt is not a rank-1 edit, which has one for all"
                if len(shape) == 2
                else "it has no inverse covariance C⁻¹, without which its gate is not known"
            )
            raise ConversionError(
                f"{path}: found target_output of shape {shape}, a concept in the state of a Latent Diffusion model, "
                f"expected {', '.join(KEYS)}, as {PACKAGE} writes them: {reason}"
            )


def _is_matrix(value: Any, rows: int) -> bool:
    """Whether it is a plain matrix of at most so many rows, with memory for all of its numbers."""
    import torch

    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and value.dim() == 2
        and 0 < value.shape[0] <= rows
        and 0 < value.shape[1] <= MAX_WIDTH
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _some_keys(content: dict[Any, Any]) -> str:
    from perfusion.concept_file import shown

    names = [shown(key, 40) if isinstance(key, str) else type(key).__name__ for key in islice(content, 8)]
    return ", ".join([*names, *["…"] * (len(content) > len(names))]) or "nothing"


def place(foreign: Foreign, backbone: Backbone, source: str) -> dict[str, Tensor]:
    """o* of each edit site, by its name.

    The file holds the projections in the order of the modules of whatever model was trained: that of diffusers, or that
    of the original Stable Diffusion code, where the middle block stands in the middle. The right one is the one in
    which the keys are projections W_K s of one encoding s, as locked keys are.

    Raises:
        ConversionError: in neither order do they fit this backbone.
    """
    best, distances = None, []
    for sites in _orders(backbone):
        widths = [_weight(site).shape[0] for site in sites]
        if widths != [len(output) for output in foreign.outputs]:
            continue
        placed = {site.name: output for site, output in zip(sites, foreign.outputs, strict=True)}
        distances.append(_distance_from_locked(sites, placed))
        if distances[-1] <= min(distances):
            best = placed
    if best is None:
        found = [len(output) for output in foreign.outputs]
        expected = [_weight(site).shape[0] for site in backbone.edit_sites()]
        raise ConversionError(
            f"{source}: found outputs of widths {found}, expected {expected}, as {_called(backbone)} has"
        )
    if min(distances) > LOCKED:
        raise ConversionError(
            f"{source}: found keys that are {min(distances):.1e} of their length away from what {_called(backbone)} "
            f"projects of any encoding, expected at most {LOCKED:.0e}: it was trained on other weights"
        )
    return best


def _called(backbone: Backbone) -> str:
    return f"{backbone.config.name} {backbone.config.path or ''}".strip()


def _orders(backbone: Backbone) -> Iterator[list[EditSite]]:
    """The edit sites as diffusers has them (down, up, middle), and as the original code has them (down, middle, up)."""
    sites = backbone.edit_sites()
    yield sites
    rank = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    yield sorted(sites, key=lambda site: rank.get(site.name.partition(".")[0], 3))


def _weight(site: EditSite) -> Tensor:
    weight: Any = site.projection.weight
    return weight.detach().float().cpu()


def _distance_from_locked(sites: Sequence[EditSite], outputs: dict[str, Tensor]) -> float:
    """min over s of ‖W_K s − o*_K‖ / ‖o*_K‖, over the K projections of all layers together."""
    import torch

    keys = [site for site in sites if site.kind == "k"]
    weights = torch.cat([_weight(site) for site in keys]).double()
    wanted = torch.cat([outputs[site.name] for site in keys]).double()
    s = torch.linalg.lstsq(weights, wanted[:, None]).solution
    return float((weights @ s - wanted[:, None]).norm() / wanted.norm())


def convert(config: ConvertConfig) -> Concept:
    """Read, place and save; gives the concept as its new file holds it.

    Raises:
        ConversionError: see `read_package` and `place`; or `out` or `matrix` exists.
        CovarianceError: C shall be written, and C⁻¹ has no such inverse.
        BackboneError, TokenError: no such model, or words that it cannot take.
    """
    source = Path(config.file).expanduser()
    out = Path(config.out).expanduser() if config.out else source.with_suffix(".safetensors")
    matrix = Path(config.matrix).expanduser() if config.matrix else None
    for key, file in (("out", out), ("matrix", matrix)):
        if file is not None and file.exists():
            raise ConversionError(f"{key}: {file} exists, expected a new file")
    foreign = read_package(source, config.index)
    digest = hashlib.sha256(foreign.precision.contiguous().numpy().tobytes()).hexdigest()[:16]
    covariance = f"{PACKAGE}:{digest}"

    import torch

    from perfusion.backbones import backbone_class, backbone_config
    from perfusion.concept import Concept, save_concept
    from perfusion.methods.base import Word, build

    chosen = backbone_config(config.backbone, config.path, device=config.device, layout=config.layout)
    kind = backbone_class(chosen.name)
    kind.check_words(chosen, config.placeholder, config.superclass)
    backbone = kind.load(chosen)
    outputs = place(foreign, backbone, str(source))
    # The keys are taken as they are: averages over the package's own prompts, which no superclass prompt gives again.
    options = {"name": "perfusion", "key_lock": "none", "sample_beta": config.beta, "sample_tau": config.tau}
    method = build(options, Word(config.placeholder, config.superclass)).eval()
    direction = foreign.precision @ foreign.target_input
    sites = backbone.edit_sites()
    state = {
        "target_input": foreign.target_input,
        "direction": direction / direction.abs().max(),
        **{
            name: torch.cat([outputs[site.name] for site in sites if site.kind == kind])
            for name, kind in (("values", "v"), ("keys", "k"))
        },
        "embedding.text_encoder": foreign.embedding[None],
    }
    expected = method.state_shapes(backbone)
    for name in dict.fromkeys((*expected, *state)):
        found = tuple(state[name].shape) if name in state else None
        if found != expected.get(name):
            raise ConversionError(
                f"{source}: {name}: found {found or 'none'}, expected {expected.get(name, 'none')} for "
                f"{_called(backbone)}"
            )
    method.attach(backbone)
    try:
        method.load_state(state)
        concept = Concept.of(method, backbone, seed=0)
    finally:
        method.detach()
    known = {key: concept.settings[key] for key in ("key_lock", "sample_beta", "sample_tau", "vectors")}
    if matrix is not None:
        _write_moment(matrix, foreign.precision, covariance)
    return save_concept(out, dataclasses.replace(concept, settings=known, covariance=covariance))


def _write_moment(path: Path, precision: Tensor, covariance: str) -> None:
    """C, of which the package keeps the inverse (d, d); what is trained with it says that it is this one."""
    import torch

    from perfusion.covariance.factor import factorise
    from perfusion.covariance.matrix import Matrix, save_matrix

    C = torch.linalg.pinv((precision + precision.T).double() / 2, hermitian=True)
    factorise(C, 0.0)
    save_matrix(path, Matrix((C + C.T) / 2, None, {"matrix": covariance}))


def main(argv: Sequence[str]) -> None:
    """Convert what a command line describes."""
    config = parse_key_values(argv, ConvertConfig, USAGE)
    if not config.superclass.strip() or not config.placeholder.strip():
        raise ConfigError("superclass, placeholder: expected a word each")
    concept = convert(config)
    print(f"concept: {concept.source} ({Path(concept.source).stat().st_size / 1000:.1f} kB)")
    words = {"concept": concept.source, "backbone": config.backbone, "path": config.path, "layout": config.layout}
    words["prompt"] = f"a photo of {concept.placeholder} on the beach"
    told = " ".join(f"{key}={shlex.quote(value)}" for key, value in words.items() if value is not None)
    print(f"next: python -m perfusion.generate {told}")
    if config.matrix:
        print(f"train with it: backbone.covariance.matrix={shlex.quote(config.matrix)} backbone.covariance.ridge=0")


if __name__ == "__main__":
    sys.exit(run_cli(main))
