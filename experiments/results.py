"""`results/<id>.json`: what an experiment found, with everything that it was found with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.aggregate import Interval, Summary, as_json
from experiments.evidence import Evidence
from experiments.experiment import Experiment, Finding
from experiments.protocol import Protocol
from experiments.runner import Together
from experiments.settings import Training
from perfusion.config import ConfigError
from perfusion.files import atomic_write_text

VERSION = 1
PAPER = "Tewel et al. 2023 (arXiv 2305.01644)"


def document(experiment: Experiment, finding: Finding, evidence: Evidence) -> dict[str, Any]:
    """The file's content, in JSON values. `notes` were written by people, `verdict` follows from `checks` alone."""
    drawn = described(evidence.runner.protocol, evidence.groups, experiment)
    used = trainings_of(experiment)
    runs = {t.label: [run.path.name for run in evidence.runs(t)] for t in used}
    return {
        "version": VERSION,
        "id": experiment.id,
        "place": experiment.place,
        "claim": experiment.claim,
        "source": f"{PAPER}: {experiment.source}" if experiment.of_paper else experiment.source,
        "verdict": finding.verdict.value,
        "key": finding.key,
        "test": experiment.test,
        "checks": [
            {
                "what": check.what,
                **_numbers(check.value),
                "expected": f"{'above' if check.above else 'below'} {check.threshold:g}",
                "decides": check.decides,
                "verdict": check.verdict.value,
            }
            for check in finding.checks
        ],
        "series": [
            {"label": one.label, "settings": [_scores(evidence.summary(s, one.label), s.name) for s in one.settings]}
            for one in experiment.series
        ],
        "tables": [asdict(table) for table in finding.tables],
        "axes": [experiment.x, experiment.y],
        "caveats": experiment.caveats,
        "notes": experiment.notes,
        "protocol": drawn,
        "bootstrap": asdict(evidence.bootstrap),
        "runs": runs,
        "weights": evidence.runner.weights,
        "config_hash": _hash([runs, drawn, experiment.test]),
        "seconds": _seconds(experiment, evidence, used),
        "provenance": evidence.runner.made_with,
    }


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write one experiment's file, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['id']}.json"
    atomic_write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def read_all(folder: Path) -> list[dict[str, Any]]:
    """All files of a folder, in the order of the experiments.

    Raises:
        ConfigError: one that cannot be read.
    """
    found = []
    for path in folder.glob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            assert content["version"] == VERSION and content["weights"]
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise ConfigError(f"{path}: no result of this version ({error}); remove it to have it made anew") from error
        found.append(content)
    return sorted(found, key=lambda content: content["place"])


def described(protocol: Protocol, groups: Sequence[Together], experiment: Experiment) -> dict[str, Any]:
    """What was drawn of every setting."""
    toys = dict.fromkeys(toy for group in groups for toy in group)
    return {
        "groups": len(groups),
        "concepts": [{"name": toy.name, **asdict(toy.looks)} for toy in toys],
        "prompts": [
            list(alternatives) for alternatives in (protocol.pair_prompts if experiment.pairs else protocol.prompts)
        ],
        "seeds": list(protocol.seeds),
        "steps": protocol.steps,
        "guidance": protocol.guidance,
    }


def trainings_of(experiment: Experiment) -> list[Training]:
    """All that an experiment trains."""
    drawn = [s.training for one in experiment.series for s in one.settings if s.training is not None]
    return [*dict.fromkeys((*drawn, *experiment.trainings))]


def _scores(summary: Summary, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "setting": dict(summary.setting),
        "concepts": len(summary.concepts),
        "images": summary.images,
        "scores": as_json(summary.scores),
    }


def _numbers(value: Interval) -> dict[str, float | None]:
    return {key: None if v is None or v != v else round(v, 6) for key, v in asdict(value).items()}


def _seconds(experiment: Experiment, evidence: Evidence, used: Sequence[Training]) -> dict[str, float]:
    """Of one core, what other experiments use as well included."""
    drawing = sum(evidence.runner.seconds(one) for one in experiment.wanted(evidence.runner.protocol))
    training = sum(seconds for one in used for seconds in evidence.training_seconds(one))
    return {"training": round(training, 1), "drawing": round(drawing, 1)}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
