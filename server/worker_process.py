"""Starting the worker program, which alone runs a study's code, and taking what it made.

The worker gets a fresh folder, an environment without anything of ours, a session of its own, and a time limit; it ends
when this process does.
What it leaves is data; a failure comes back as the error that it named.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError, StudyError
from consortium.protocol.layout import Layout, Vector, digest_of
from consortium.protocol.study import Study
from consortium.strategies.base import Local

TIMEOUT = 600.0
"""Seconds that a worker may take."""

LONGEST = 4000
"""Characters of a worker's message that are shown."""
MOST_SAID = 16 << 20
"""Bytes of a document of a worker."""

_log = logging.getLogger(__name__)
_KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
_ERRORS: Mapping[str, type[ConsortiumError]] = {
    "InputError": InputError,
    "IntegrityError": IntegrityError,
    "RefusedError": RefusedError,
    StudyError.__name__: InputError,
}


@dataclass(frozen=True)
class Initial:
    """A study's first model, as the worker made it.

    vector: the `shared` vector. prepares: whether the task asks for statistics before round 1.
    """

    layout: Layout
    vector: Vector
    prepares: bool


def initial(study: Study, local: Local, *, timeout: float = TIMEOUT, trusted: bool = False) -> Initial:
    """Make a study's first model in a worker; the same study gives the same numbers as at any site.

    timeout: seconds. trusted: as in `run`.

    Raises:
        InputError: the study's code fails or names no task.
        ConsortiumError: the worker died or took too long.
    """
    with exchange() as folder:
        run("initial", study, local, folder, timeout=timeout, trusted=trusted)
        about = _document(folder / "task.json")
        layout = Layout.parse(_document(folder / "layout.json"))
        segment = layout["shared"]
        if (folder / "initial.bin").stat().st_size != segment.size * segment.numpy_dtype.itemsize:
            raise IntegrityError(f"study '{study.name}': the worker's model is not of the layout's size")
        vector = np.fromfile(folder / "initial.bin", layout["shared"].numpy_dtype)
    if about.get("study") != study.digest or len(vector) != layout["shared"].size:
        raise IntegrityError(f"study '{study.name}': the worker answered for another study or layout")
    if about.get("model") != digest_of([vector]):
        raise IntegrityError(f"study '{study.name}': the initial model is not what the worker wrote")
    return Initial(layout, vector, bool(about.get("prepares")))


@contextmanager
def exchange() -> Iterator[Path]:
    """A fresh private folder for one worker."""
    with tempfile.TemporaryDirectory(prefix="consortium-worker-") as name:
        yield Path(name)


def run(
    command: Literal["initial", "export"],
    study: Study,
    local: Local,
    folder: Path,
    *,
    timeout: float = TIMEOUT,
    trusted: bool = False,
) -> None:
    """Run one command of the worker over `folder`, into which the study is written; its outputs lie there after.

    trusted: whether code that the study brings runs without a sandbox.
    """
    (folder / "study.toml").write_text(study.text, encoding="utf-8")
    flags = ["--control-variates"] if local.control_variates else []
    where, module = str(study.folder.resolve()), ["consortium.client.worker"]
    if not (trusted or study.built_in):
        places = {"read": [where], "write": [str(folder)], "apart": [str(Path.cwd())]}
        module = ["consortium.protocol.confined", json.dumps(places), *module]
    # -s, -P: neither the user's packages nor the working folder are importable; -B: nothing is written beside code.
    arguments = [
        *(sys.executable, "-s", "-P", "-B", "-m", *module, command, str(folder)),
        *("--code", where, *flags, "--parent", str(os.getpid())),
    ]
    code = _run(arguments, folder, timeout, f"study '{study.name}': {command}")
    if code:
        raise _error(study, command, folder, code)


def _run(arguments: list[str], folder: Path, timeout: float, what: str) -> int:
    """Exit code of a process in a session of its own; killed with all it started when it is late or we leave."""
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(folder),
            cwd=folder,
            start_new_session=True,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise ConsortiumError(f"{what} took longer than {timeout:g} s and was stopped") from error
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # it has ended, and so has all that it started
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(folder: Path) -> dict[str, str]:
    """Variables of a worker: what is needed to find programs and libraries, and nothing that may hold a secret."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    home = str(folder)
    fixed = {"HOME": home, "TMPDIR": home, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    fixed["LOGNAME"] = "worker"  # libraries ask who runs them; a confined worker cannot look it up
    return {**kept, **fixed}


def _error(study: Study, command: str, folder: Path, code: int) -> ConsortiumError:
    """The error that a worker named; else what is known of how it died."""
    path = folder / "error.json"
    if path.is_file():
        said = _document(path)
        return _ERRORS.get(str(said.get("kind")), ConsortiumError)(_plain(str(said.get("message"))))
    if code == -signal.SIGSYS:
        _log.warning("study '%s': its code asked the kernel for what the sandbox forbids", study.name)
        return RefusedError(
            f"study '{study.name}': its code asked the kernel for what the sandbox forbids, and was ended"
        )
    with (folder / "log.txt").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST))
        log = file.read().decode(errors="replace").strip().splitlines()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    last = f": {_plain(log[-1])}" if log else ""
    return ConsortiumError(f"study '{study.name}': the worker for '{command}' {how}{last}")


def _plain(text: str) -> str:
    """A text of a worker, as it is shown: it may have been written by the study's code."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text[:LONGEST])


def _document(path: Path) -> dict[str, Any]:
    """A JSON object that a worker wrote."""
    try:
        if path.stat().st_size > MOST_SAID:
            raise ConsortiumError(f"the worker's {path.name} has more than {MOST_SAID} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConsortiumError(f"the worker left no valid {path.name} ({error})") from error
    if not isinstance(document, dict):
        raise ConsortiumError(f"the worker's {path.name} is not a JSON object")
    return document
