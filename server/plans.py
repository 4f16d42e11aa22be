"""What a worker made of a study, in the folder of its run, so that a restart need not make it again (seconds of work).

plan.json      the layout, and whether the task asks for statistics first
initial.bin    the first model's `shared` vector, until the first commit
code/          the study's own code
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from consortium.protocol.errors import InputError
from consortium.protocol.files import write_private
from consortium.protocol.layout import Layout, digest_of
from consortium.protocol.study import Study
from consortium.server import worker_process
from consortium.server.records import Plan
from consortium.server.standing import FAILURES
from consortium.strategies.base import Strategy

FORMAT = 1
PLAN, INITIAL, CODE = "plan.json", "initial.bin", "code"


def plan(study: Study, strategy: Strategy, first: Mapping[str, Any], folder: Path, begun: bool) -> Plan:
    """The plan, from the run's folder where it is there and of this study, else by a worker.

    first: what the run's process was told. begun: whether there is a commit, so that the first model is not needed.
    """
    if kept(study, folder, begun) is None:
        keep(study, worker_process.initial(study, strategy.local), folder)
    if begun:
        (folder / INITIAL).unlink(missing_ok=True)
    return kept_plan(study, strategy, first, folder, begun)


def kept_plan(study: Study, strategy: Strategy, first: Mapping[str, Any], folder: Path, begun: bool) -> Plan:
    """As `plan`, where it is in the folder.

    Raises:
        InputError: it is not.
    """
    found = kept(study, folder, begun)
    if found is None:
        raise InputError(f"{folder / PLAN}: is not whole, or of another study")
    layout = Layout.parse(found["layout"])
    dtype = layout["shared"].numpy_dtype
    # Mapped, not read: it is needed before the first commit alone.
    initial = np.empty(0, dtype) if begun else np.memmap(folder / INITIAL, dtype, "r").view(np.ndarray)
    names = str(first["federation"]), str(first["run"])
    prepares, spare = bool(found["prepares"]), study.cohort.spare
    return Plan(study, strategy, layout, initial, *names, prepares, spare, FAILURES)


def kept(study: Study, folder: Path, begun: bool) -> dict[str, Any] | None:
    """What `keep` wrote, or None where that is not whole or of another study."""
    try:
        found = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        dtype = Layout.parse(found["layout"])["shared"].numpy_dtype
        whole = found["format"] == FORMAT and found["study"] == study.digest and "prepares" in found
        if whole and not begun:
            whole = digest_of([np.memmap(folder / INITIAL, dtype, "r")]) == found["model"]
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None
    return dict(found) if whole else None


def keep(study: Study, first: worker_process.Initial, folder: Path) -> dict[str, Any]:
    """Put a study's first model and its plan into a run's folder; returns what `plan.json` holds."""
    first.vector.tofile(folder / INITIAL)
    found = {
        "format": FORMAT,
        "study": study.digest,
        "layout": first.layout.document(),
        "model": digest_of([first.vector]),
        "prepares": first.prepares,
    }
    write_private(folder / PLAN, json.dumps(found).encode())
    return found
