"""How large a concept is on disk, and how long it takes to train."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from eval.aggregate import Interval
from eval.looks import title
from experiments.evidence import Check, Evidence, Experiment, Finding, Table
from experiments.settings import METHODS, PERFUSION
from perfusion.training.run_folder import RunFolder, read_config

SMALLER_THAN = ("dreambooth", "custom_diffusion", "lora")  # Textual Inversion's is smaller, in the paper as well
FAR = 10.0  # times
LAYOUTS = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL"}


def judge(evidence: Evidence) -> Finding:
    """Files of concepts as they lie on the disk."""
    sizes, rows = {}, []
    for training in METHODS:
        runs = evidence.runs(training)
        sizes[training.label] = statistics.mean(run.concept.stat().st_size for run in runs)
        exported = statistics.mean(_bytes(run.diffusers) for run in runs)
        seconds = evidence.training_seconds(training)
        file, diffusers = (f"{size / 1000:,.1f} kB" if size else "–" for size in (sizes[training.label], exported))
        took = f"{statistics.mean(seconds):.0f} s ({min(seconds):.0f} to {max(seconds):.0f})"
        rows.append((title(training.label), _length(runs[0]), file, diffusers, took))
    own = sizes["perfusion"]
    times = {title(label): sizes[label] / own for label in SMALLER_THAN}
    checks = [Check(f"{name}'s file, in files of Perfusion", Interval(k, k, k), FAR) for name, k in times.items()]
    if (budget := evidence.world.budget) is not None:
        longest = max(evidence.training_seconds(PERFUSION))
        interval = Interval(longest, longest, longest)
        checks.append(Check("Perfusion's longest training, seconds", interval, budget, above=False, decides=False))
    head = ("method", "trained for", "concept file", "for stock diffusers", "training")
    measured = Table(f"On {evidence.world.title}", head, tuple(rows))
    key = ", ".join(f"{name} {k:,.0f} times" for name, k in times.items())
    return Finding(checks, f"{own / 1000:.1f} kB; {key} as large", (measured, _stable_diffusion()))


def _length(run: RunFolder) -> str:
    """Steps and pictures of a training, in words."""
    method = read_config(run.config).method
    prior = f" and {method['batch_size']} of the prior" if method.get("prior_images") else ""
    return f"{method['steps']} steps of {method['batch_size']} pictures{prior}"


def _bytes(folder: Path) -> int:
    """The size of all files in a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _stable_diffusion() -> Table:
    """What a concept's tensors take in the layouts of larger models, which need no weights for that."""
    from perfusion.inspect import meta_backbone
    from perfusion.methods.base import Word, build

    rows = []
    backbones = [meta_backbone(layout, None) for layout in LAYOUTS]
    for training in METHODS:
        method = build({"name": training.label}, Word("<new*>", "object"))
        numbers = [sum(math.prod(shape) for shape in method.state_shapes(backbone).values()) for backbone in backbones]
        rows.append((title(training.label), *(f"{2 * count / 1000:,.1f} kB" for count in numbers)))
    head = ("method", *LAYOUTS.values())
    return Table("Tensors in half precision in larger models, with the published settings", head, tuple(rows))


EXPERIMENT = Experiment(
    id="size",
    place=7,
    claim="A concept is far smaller than those of methods that train weights of the model.",
    source="abstract; the table of sizes",
    test="The sizes of concept files, half precision and metadata included, exactly. The claim holds if DreamBooth's, "
    f"Custom Diffusion's and LoRA's are all more than {FAR:g} times as large as Perfusion's. Nothing here is drawn by "
    "chance.",
    series=(),
    trainings=METHODS,
    judge=judge,
    caveats="Textual Inversion's concept is smaller still. LoRA is no method that the paper compares with. Trainings "
    "ran beside one another, one on each core; their times are those of the optimization, with the snapshots that "
    "Textual Inversion, DreamBooth and Custom Diffusion leave on the way, and without the prior pictures, which "
    "DreamBooth and Custom Diffusion draw once for each superclass.",
)
