"""`python -m perfusion.covariance`: the second moment C of captions for a backbone, before any training needs it."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from perfusion.cli import parse_key_values, run_cli
from perfusion.config import BackboneConfig, ConfigError, which_weights

# Torch and its friends take seconds to import: `--help` and a mistyped key do without them.
if TYPE_CHECKING:
    from torch import Tensor

USAGE = """
Usage: python -m perfusion.covariance backbone=toyland [key=value ...]

Measures C, the second moment of a text encoder's encodings, over captions, and keeps it where training looks for it: a
training with the same settings then starts at once. Stopped (Ctrl-C, or killed)? The same command goes on where it was,
and gives the same C to the last bit.

Examples:
  python -m perfusion.covariance backbone=toyland
  python -m perfusion.covariance backbone=sd15 path=/models/sd15 captions=captions.txt count=100000 out=C.safetensors
  python -m perfusion.covariance backbone=sd15 path=/models/sd15 positions=words out=words.safetensors
Then, as it prints, with your own pictures:
  python -m perfusion.train +experiment=photos_sd15 backbone.path=/models/sd15 \\
      backbone.covariance.matrix=C.safetensors concept.images=photos/ concept.superclass=dog

A key that is not given has the value of the preset conf/backbone/<backbone>.yaml, as in training. The names that keys
have in training, such as backbone.path= and backbone.covariance.count=, are understood, too.
"""

_PREFIXES = ("backbone.covariance.", "backbone.")
_SETTINGS = ("captions", "count", "positions", "ridge", "cache")  # of backbone.covariance


@dataclass
class CovarianceCommand:
    """The options of `python -m perfusion.covariance`."""

    backbone: str = "toyland"  # toyland, sd15, ...
    captions: str | None = None  # text file with one caption per line, or a built-in set: everyday, on Toyland toyland
    count: int | None = None  # captions taken; a file with fewer gives all that it has
    positions: str | None = None  # all: whatever the cross-attention sees; words: no beginning, end and padding
    ridge: float | None = None  # added to the diagonal in training, as a share of its mean; here only for the report
    out: str | None = None  # .safetensors file to write C to, for backbone.covariance.matrix=; null: the cache alone
    path: str | None = None  # backbone's folder, .safetensors file or hub id; null: what it ships
    layout: str | None = None  # configs of a .safetensors file: known layout or diffusers folder; null: as it looks
    dtype: str = "float32"  # float32, float16 or bfloat16, as in the training; C of each is kept apart
    device: str = "auto"  # auto: cuda, then mps, then cpu
    cache: str | None = None  # folder; null: the one of training
    progress: bool = True  # show a bar


def main(argv: Sequence[str]) -> None:
    """Measure what a command line describes, and say what was found."""
    command = parse_key_values([_short(word) for word in argv], CovarianceCommand, USAGE)
    for line in measure(command):
        print(line)


def measure(command: CovarianceCommand) -> list[str]:
    """Measure C, or find it in the cache; write `out`; the lines of the report.

    Raises:
        ConfigError: no such backbone or captions, or an option that cannot be used.
        BackboneError: the backbone cannot be loaded.
        CovarianceError: C is not finite, or not positive definite with this ridge. It is written all the same, since
            another ridge may do.
        KeyboardInterrupt: stopped; its message says where the same command goes on.
    """
    from perfusion.backbones import backbone_class, backbone_config
    from perfusion.covariance.configured import factorised, spelled_out
    from perfusion.covariance.factor import extreme_eigenvalues
    from perfusion.covariance.matrix import save_matrix

    config = backbone_config(command.backbone, command.path, command.dtype, command.device, command.layout)
    given = {key: value for key in _SETTINGS if (value := getattr(command, key)) is not None}
    config = dataclasses.replace(config, covariance=dataclasses.replace(config.covariance, **given, matrix=None))
    out = None if command.out is None else _checked(Path(command.out).expanduser())
    cls = backbone_class(config.name)
    cls.check_covariance(config)

    backbone = cls.load(config)
    matrix = backbone.moment(progress=command.progress)
    if out is not None:
        save_matrix(out, matrix)
    settings, width = config.covariance, len(matrix.C)
    factor = factorised(settings, matrix, width)

    def condition(C: Tensor) -> str:
        smallest, largest = extreme_eigenvalues(C)
        return f"{largest / smallest:.1e}" if smallest > 0 else "infinite"

    lines = [
        f"C of {spelled_out(backbone.covariance)}: {matrix.count:,} vectors of width {width}, "
        f"positions {settings.positions}",
        f"condition number: {condition(factor @ factor.T)} with ridge {settings.ridge:g}, "
        f"{condition(matrix.C)} without",
        f"cache: {Path(settings.cache).expanduser()}",
    ]
    if out is not None:
        lines.append(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return [*lines, f"next: {next_command(command, config, out)}"]


def next_command(command: CovarianceCommand, config: BackboneConfig, out: Path | None) -> str:
    """The training that finds this C: in `out` if there is one, else in the cache. Off Toyland the pictures are the
    user's, and named by examples here."""
    on_toyland = command.backbone == "toyland"
    words = {} if on_toyland else {"+experiment": "photos_sdxl" if command.backbone == "sdxl" else "photos_sd15"}
    # Training wants a preset.
    words["backbone"] = "sd15" if command.backbone == "stable_diffusion" else command.backbone
    words |= which_weights(config)
    if out is not None:
        words["backbone.covariance.matrix"] = str(out)
    for key in _SETTINGS:
        if getattr(command, key) is not None and (out is None or key == "ridge"):
            words[f"backbone.covariance.{key}"] = str(getattr(config.covariance, key))
    if not on_toyland:
        words |= {"concept.images": "photos/", "concept.superclass": "dog"}
    return " ".join(["python -m perfusion.train", *(f"{key}={shlex.quote(value)}" for key, value in words.items())])


def _short(word: str) -> str:
    """`backbone.covariance.count=3` as `count=3`."""
    for prefix in _PREFIXES:
        if word.startswith(prefix):
            return word.removeprefix(prefix)
    return word


def _checked(out: Path) -> Path:
    """`out`, with the folder that it shall lie in made."""
    if out.suffix != ".safetensors" or out.is_dir():
        raise ConfigError(f"out: found {str(out)!r}, expected the name of a .safetensors file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: cannot make the folder {out.parent}: {error.strerror}") from error
    return out


if __name__ == "__main__":
    sys.exit(run_cli(main))
