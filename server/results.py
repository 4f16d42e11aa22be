"""What is kept of a run for people: documents of rounds and evaluations, the result, the model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from consortium.protocol.files import write_private
from consortium.server.records import Evaluation, Outcome, Plan, Round, RunState

FORMAT = 1
MODEL = "model.npy"


def document(one: Round | Evaluation) -> dict[str, Any]:
    """A round or an evaluation as plain JSON values; `kind` says which."""
    kind = "round" if isinstance(one, Round) else "evaluation"
    found: dict[str, Any] = _plain({"kind": kind, **asdict(one)})
    return found


def _plain(value: Any) -> Any:
    """A value as JSON has it: None for what is no number (an AUROC of one class)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reporter(path: Path) -> Callable[[Round | Evaluation], None]:
    """As `teller`, for what the round loop reports."""
    tell = teller(path)
    return lambda one: tell(document(one))


def teller(path: Path, so_far: RunState | None = None) -> Callable[[Mapping[str, Any]], None]:
    """Writes a JSON line for each document of a round or an evaluation, to a file and to stdout.

    so_far: the state that a run continues from; the file then holds exactly its lines before the next one.
    """
    if so_far is not None:
        kept: list[Round | Evaluation] = [*so_far.evaluations, *so_far.rounds]
        lines = [_line(document(one)) + "\n" for one in kept]
        path.write_text("".join(lines), encoding="utf-8")

    def tell(one: Mapping[str, Any]) -> None:
        line = _line(one)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    return tell


def _line(one: Mapping[str, Any]) -> str:
    return json.dumps(one, allow_nan=False)


def write(folder: Path, plan: Plan, outcome: Outcome) -> None:
    """The result; `result.json` comes last and whole, so whoever sees it has everything else."""
    with (folder / MODEL).open("wb") as file:
        np.save(file, outcome.model, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    state = outcome.state
    found = {
        "format": FORMAT,
        "run": plan.run,
        "study": {"name": plan.study.name, "digest": plan.study.digest},
        "strategy": plan.strategy.name,
        "status": outcome.status,
        "why": outcome.why,
        "model": outcome.digest,
        "evaluation": document(outcome.evaluation) if outcome.evaluation else None,
        "layout": plan.layout.document(),
        "rounds": [document(one) for one in state.rounds],
        "evaluations": [document(one) for one in state.evaluations],
    }
    content = json.dumps(found, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_private(folder / "result.json", content.encode())


def laid_down(folder: Path, outcome: Outcome) -> Outcome:
    """An outcome that was written, its model mapped from the file; nothing else of its state that is large is held."""
    model = np.load(folder / MODEL, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    state = replace(outcome.state, model=model, control=None, optimizer={}, best=None)
    return replace(outcome, model=model, state=state)
