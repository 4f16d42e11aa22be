"""Starts a contender, watches the memory of its process tree and reads its result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from contenders.workloads import Spec

BENCHMARKS = Path(__file__).parents[1]
ENVIRONMENTS = BENCHMARKS / ".envs"
PFL = "0.6.0"
LIMIT = 900.0  # s, for one run of one contender


class ContenderError(Exception):
    """A contender that gave no result; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """One or several runs of a contender; `model` is the flat global model after the round that is compared.

    cpu_seconds: of each run, the processor time of a round after the first, all its processes together.
    """

    first_seconds: list[float]
    round_seconds: list[float]
    cpu_seconds: list[float]
    peak_mb: float
    model: NDArray[np.float64]

    def pooled(self, other: Outcome) -> Outcome:
        first, rounds = self.first_seconds + other.first_seconds, self.round_seconds + other.round_seconds
        cpu = self.cpu_seconds + other.cpu_seconds
        return Outcome(first, rounds, cpu, max(self.peak_mb, other.peak_mb), other.model)


def launch(python: Path, target: str, spec: Spec) -> Outcome:
    """Run the contender `target` (module:function) on `spec`; raises `ContenderError`."""
    model_file = Path(spec.folder) / "model.npy"
    model_file.unlink(missing_ok=True)
    with tempfile.TemporaryFile("w+") as log:
        spec = replace(spec, model_file=str(model_file), started=time.monotonic())
        command = [str(python), "-m", "contenders", target, spec.to_json()]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=BENCHMARKS, env=_environment(), stdin=pipe, stdout=pipe, stderr=log, text=True
        )
        with process, _Watch(process.pid) as watch:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("{")), "")
            watch.look()
            process.communicate()
        if not line:
            log.seek(0)
            raise ContenderError((log.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    result = json.loads(line)
    model = np.load(model_file).astype(np.float64)
    return Outcome([result["first"]], result["times"], [result["cpu"]], watch.peak_mb, model)


def _environment() -> dict[str, str]:
    """One thread a process; a numpy that picks its own kernels; no telemetry."""
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS)}
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    dropped = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    return {k: v for k, v in os.environ.items() if k not in dropped} | ours | quiet


class _Watch:
    """Peak proportional set size (MB) of a process and all below it, seen twice a second; ends them after LIMIT."""

    def __init__(self, pid: int) -> None:
        self.peak_mb = 0.0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        end = time.monotonic() + LIMIT
        while not self._stop.wait(0.5):
            self.look()
            if time.monotonic() > end:
                for pid in _tree(self._pid):
                    os.kill(pid, signal.SIGKILL)
                return

    def look(self) -> None:
        self.peak_mb = max(self.peak_mb, sum(map(_pss_mb, _tree(self._pid))))


def _tree(pid: int) -> list[int]:
    try:
        children = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []  # it ended while we looked
    return [pid] + [p for text in children for child in text.split() for p in _tree(int(child))]


def _pss_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:")), 0.0)


def pfl_python() -> Path:
    """The interpreter of an environment with pfl-research and our torch, made at first use; raises `ContenderError`."""
    home = ENVIRONMENTS / f"pfl-{PFL}"
    python, complete = home / "bin" / "python", home / "complete"
    if not complete.exists():
        ENVIRONMENTS.mkdir(exist_ok=True)
        (ENVIRONMENTS / ".gitignore").write_text("*\n")
        same = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "numpy")]
        try:
            install = ["-m", "pip", "install", "-q", f"pfl[pytorch]=={PFL}", *same]
            for command in ([sys.executable, "-m", "venv", "--clear", str(home)], [str(python), *install]):
                subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            said = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ContenderError(f"the environment {home} could not be made: {said}") from error
        complete.touch()
    return python
