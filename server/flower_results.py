"""What a Flower app leaves of its run, in the run's folder `app/`, taken from its confined process as from a stranger.

model.safetensors   the arrays of `Context.state`, or where it has none those that were sent to the sites last
result.json         metrics and settings of `Context.state`, which arrays these are, and their SHA-256
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.files import private_folder, write_private
from consortium.protocol.records import Packed, Records, unpack
from consortium.protocol.study import Study
from consortium.server import own_code
from consortium.server.link import Link
from consortium.server.plans import CODE

FORMAT = 1
FOLDER, MODEL, RESULT = "app", "model.safetensors", "result.json"
LARGEST = 2 << 30
"""Bytes of what the app leaves."""
_GIVEN, _LAST = "result.bin", "consortium.last"

Tell = Callable[[Mapping[str, Any]], None]


def run(link: Link, study: Study, first: Mapping[str, Any], folder: Path, tell: Tell) -> tuple[str, str]:
    """Run the study's ServerApp, confined, and keep what it leaves; status and reason of the run.

    Raises:
        InputError: the app failed, or left what is no result.
        ConsortiumError: it did what it must not, or died by itself.
    """
    scratch = Path(os.environ["TMPDIR"]) / "own"
    about = {**first, "folder": str(folder), "apart": str(folder)}

    def told(commit: Mapping[str, Any]) -> None:
        for event in commit["events"]:
            tell(event)

    said = own_code.hold(link, "consortium.server.flower_run", about, [str(folder / CODE)], scratch, told)
    if why := own_code.reason(said):
        raise InputError(why)
    keep(_given(scratch / _GIVEN), study, str(first["run"]), folder / FOLDER)
    return "finished", f"its results lie in {folder / FOLDER}"


def keep(packed: Packed, study: Study, run: str, folder: Path) -> None:
    """Write an app's result into a folder, `result.json` last and whole."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that died after it wrote them
    private_folder(folder)
    state = {name: one for name, one in packed.records.items() if name != _LAST}
    arrays = _arrays(state)
    which = "Context.state" if arrays else "sent to the sites last"
    arrays = arrays or _arrays(packed.records)
    found: dict[str, Any] = {
        "format": FORMAT,
        "run": run,
        "study": {"name": study.name, "digest": study.digest},
    }
    if arrays:
        save_file(arrays, folder / MODEL)
        sha = hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()
        found["model"] = {"file": MODEL, "sha256": sha, "arrays": which}
    found["state"] = {
        name: {key: _plain(value) for key, value in entries.items()}
        for name, (kind, entries) in state.items()
        if kind != "arrays"
    }
    write_private(
        folder / RESULT, json.dumps(found, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
    )


def _given(path: Path) -> Packed:
    """What the app left. Raises InputError where that is no file, or IntegrityError where it is no result."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(f"the app left no result ({error.strerror})") from error
    with os.fdopen(file, "rb") as stream:
        about = os.fstat(stream.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
            raise ConsortiumError(f"the app's result has more than {LARGEST} bytes, or is no file")
        return unpack(stream.read(LARGEST))


def _arrays(records: Records) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays; of several records their names are before those of the arrays."""
    found = {name: entries for name, (kind, entries) in records.items() if kind == "arrays" and entries}
    if len(found) == 1:
        return {key: np.ascontiguousarray(array) for key, array in next(iter(found.values())).items()}
    return {
        f"{name}.{key}": np.ascontiguousarray(array)
        for name, entries in found.items()
        for key, array in entries.items()
    }


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return value.hex()
    return None if isinstance(value, float) and not math.isfinite(value) else value
