"""The results folder of an experiment, for people and for programs, with all that is needed to run it again.

    report.html    one page, self-contained
    table.csv      a line a model and metric: mean, 95 % interval over seeds (Student's t), seeds
    rounds.jsonl   a line an attempt at a round: strategy, seed, who was asked, who counted, who was left out and why
    rounds.png, sites.png
    run.json       what was run: study and digests, seeds, sites, data files by SHA-256, versions, command
    study.toml     the study, with the study's own code beside it
    rerun.sh       the command, where the experiment came from the command line

Data are not copied: they may be records. `run.json` names them by SHA-256, so that a change is noticed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from consortium.protocol.code import files
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.simulations import attacked, page, plots, table
from consortium.simulations.experiment import Experiment

FORMAT = 1
_PACKAGES = ("consortium", "numpy", "torch", "pandas", "pyarrow", "flwr")


@dataclass(frozen=True)
class Origin:
    """Where an experiment came from: options of `consortium simulate`, but --data and --out, and files or folders."""

    options: Sequence[str]
    data: Sequence[Path]

    @property
    def arguments(self) -> list[str]:
        """All that follows the study on the command line, from whatever folder."""
        data = [str(path.resolve()) for path in self.data]
        return [*(["--data", *data] if data else []), *self.options]


def new_folder(path: Path) -> Path:
    """A folder for results, made.

    Raises:
        InputError: it is there already and not empty or not writable, or cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        taken = any(path.iterdir())
    except OSError as error:
        raise InputError(f"--out: {path} cannot be made a folder ({error.strerror}); give another") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(
            f"--out: nothing can be written into {path}; correct its permissions, or give another"
        )
    if taken:
        raise InputError(f"--out: {path} is not empty; give a new folder, so that no result is overwritten")
    return path


def write(experiment: Experiment, folder: Path, origin: Origin | None = None) -> Path:
    """Write the results into `folder`, an empty one; returns the path of the page.

    Raises:
        InputError: the folder is not empty, or cannot be made.
        ConsortiumError: a file could not be written, or the data are gone.
    """
    new_folder(folder)
    try:
        return _write(experiment, folder, origin)
    except OSError as error:
        raise ConsortiumError(
            f"the results could not be written into {folder} ({error.strerror}"
            + (f": {error.filename}" if error.filename else "")
            + "); make room there, and run it again with another --out"
        ) from error


def _write(experiment: Experiment, folder: Path, origin: Origin | None) -> Path:
    facts = _facts(experiment, origin)
    _study(experiment, folder)
    with (folder / "rounds.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in _rounds(experiment))
    _table(experiment, folder / "table.csv")
    (folder / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if origin is not None:
        script = folder / "rerun.sh"
        script.write_text(_script(origin), encoding="utf-8")
        script.chmod(0o755)
    drawn = plots.draw(experiment, folder)
    path = folder / "report.html"
    path.write_text(page.render(experiment, facts, drawn), encoding="utf-8")
    return path


def _study(experiment: Experiment, folder: Path) -> None:
    study = experiment.study
    (folder / "study.toml").write_text(study.text, encoding="utf-8")
    for path, content in files(
        (study.task, study.strategy.name, *experiment.strategies), study.folder
    ).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def _rounds(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """A line an attempt; row 0 is the initial model. `metrics` and `sites` are those of the model after the round."""
    for trial in experiment.trials:
        state = trial.result.outcome.state
        scores = {one.round: one for one in state.evaluations}
        head = {"strategy": trial.strategy, "seed": trial.seed}
        if 0 in scores:
            yield {**head, "round": 0, **_scores(scores[0].pooled, scores[0].sites)}
        for one in state.rounds:
            line = {**head, "round": one.round, "attempt": one.attempt, "asked": list(one.asked)}
            line |= {"admitted": dict(one.admitted), "left_out": dict(one.left_out)}
            line |= {"void": one.void, "model": one.model, "seconds": round(one.seconds, 6)}
            if one.round in scores and one.round and not one.void:
                line |= _scores(scores[one.round].pooled, scores[one.round].sites)
            yield line


def _scores(pooled: Mapping[str, float], sites: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    return {"metrics": numbers(pooled), "sites": {site: numbers(own) for site, own in sites.items()}}


def numbers(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics for JSON, which has no NaN."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def _table(experiment: Experiment, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "metric", "mean", "low", "high", "seeds"])
        for row in table.rows(experiment):
            for metric, spread in row.metrics.items():
                cells = ["" if math.isnan(v) else repr(v) for v in (spread.mean, spread.low, spread.high)]
                writer.writerow([row.name, metric, *cells, spread.seeds])


def document(experiment: Experiment) -> dict[str, Any]:
    """The outcome as JSON values: what `--json` prints and run.json holds."""
    study, sites = experiment.study, experiment.sites
    found = {row.name: {m: _spread(s) for m, s in row.metrics.items()} for row in table.rows(experiment)}
    strategies = {
        name: {
            "status": {str(t.seed): t.result.status for t in experiment.trials if t.strategy == name},
            "models": {str(t.seed): t.result.outcome.digest for t in experiment.trials if t.strategy == name},
            "metrics": found.get(name, {}),
        }
        for name in experiment.strategies
    }
    kept = {"local": table.LOCAL, "pooled": table.POOLED}
    return {
        "study": study.name,
        "digest": study.digest,
        "status": experiment.status,
        "rounds": study.rounds,
        "seeds": experiment.seeds,
        "sites": {name: {"train": n, "test": held} for name, (n, held) in sites.counts.items()}
        if sites
        else {},
        "partition": str(sites.partition) if sites and sites.partition else None,
        "metric": experiment.metric,
        "judged": table.judged(experiment),
        "strategies": strategies,
        "baselines": {key: found[name] for key, name in kept.items() if name in found},
        "attacks": attacked.document(experiment),
        "left_out": left_out(experiment),
        "seconds": round(experiment.seconds, 3),
    }


def _spread(spread: table.Spread) -> dict[str, float | int | None]:
    return {**numbers({k: v for k, v in asdict(spread).items() if k != "seeds"}), "seeds": spread.seeds}


def left_out(experiment: Experiment) -> dict[str, dict[str, int]]:
    """By site, how often it was left out for each reason, over all strategies and seeds."""
    found: dict[str, dict[str, int]] = {}
    for trial in experiment.trials:
        for one in trial.result.outcome.state.rounds:
            for site, why in one.left_out.items():
                reasons = found.setdefault(site, {})
                reasons[why] = reasons.get(why, 0) + 1
    return dict(sorted(found.items()))


def _facts(experiment: Experiment, origin: Origin | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **document(experiment),
        "sites_from": experiment.sites.origin if experiment.sites else "given in Python",
        "faults": [
            {"site": f.site, "kind": f.kind, "rounds": None if f.rounds is None else sorted(f.rounds)}
            for f in experiment.faults
        ],
        "command": None if origin is None else ["consortium", "simulate", "study.toml", *origin.arguments],
        "data": {} if origin is None else {str(path.resolve()): _sha256(path) for path in origin.data},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of all that decides a model's bits, and of the machine's kind."""
    found = {"python": platform.python_version(), "platform": f"{sys.platform} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _sha256(path: Path) -> str:
    """Of a file; of a folder, of its files' names and digests in name order."""
    sha = hashlib.sha256()
    if path.is_dir():
        for file in sorted(one for one in path.rglob("*") if one.is_file() and one.name != "holdout.key"):
            sha.update(f"{file.relative_to(path).as_posix()}\0{_sha256(file)}\n".encode())
        return sha.hexdigest()
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _script(origin: Origin) -> str:
    return (
        "#!/bin/sh\n"
        "# Run this experiment again; results go to the folder given, or to a new one beside this.\n"
        "set -eu\n"
        'here=$(cd -- "$(dirname -- "$0")" && pwd)\n'
        f'exec consortium simulate "$here/study.toml" {shlex.join(origin.arguments)} '
        '--out "${1:-$here-again}"\n'
    )
