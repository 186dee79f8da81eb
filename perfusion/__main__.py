"""`perfusion <command> ...`: the commands under one name. `perfusion train` is `python -m perfusion.train`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from perfusion.cli import aligned, run_cli
from perfusion.config import ConfigError

# command -> module with `main`, and what it is for
COMMANDS = {
    "train": ("perfusion.train", "from a few pictures to a concept file"),
    "generate": ("perfusion.generate", "pictures of a concept"),
    "inspect": ("perfusion.inspect", "what is in a concept file, or what there is to edit in a model"),
    "export": ("perfusion.export", "one strength of a concept as a LoRA, for other programs"),
    "convert": ("perfusion.convert", "a concept of perfusion-pytorch as a concept file"),
    "demo": ("perfusion.demo", "a cat from one picture, on a small model that comes along"),
    "studio": ("perfusion.studio.__main__", "teach, draw and compare concepts in the browser"),
    "sweep": ("perfusion.sweep", "what became of the trainings of a sweep"),
    "covariance": ("perfusion.covariance.__main__", "the second moment C of a model's text encodings"),
    "score": ("eval.score", "pictures in, a table of scores out"),
    "strength": ("eval.strength", "the strength at which a concept looks like itself and follows prompts"),
    "pareto": ("eval.pareto", "fronts of scores"),
    "report": ("eval.report", "scores as one page"),
    "paper": ("experiments.paper", "the paper's claims, tried"),
}


def main(argv: Sequence[str]) -> int | None:
    """Run the command that the first word names, with the others."""
    if not argv or argv[0] in ("-h", "--help"):
        print("Usage: perfusion <command> [key=value ...]      perfusion <command> --help", "", sep="\n")
        print(
            *(f"  {line}" for line in aligned([(name, purpose) for name, (_, purpose) in COMMANDS.items()])), sep="\n"
        )
        return None
    name, *words = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(COMMANDS)}"
        raise ConfigError(f"{name}: no such command; {hint}")
    return importlib.import_module(COMMANDS[name][0]).main(words)


def console() -> None:
    """What the installed `perfusion` runs."""
    sys.exit(run_cli(main))


if __name__ == "__main__":
    console()
