"""The work that every contender does, and the record that it keeps: the same records, first model and cohorts.

W1 is softmax regression 784 -> 62 (48,670 parameters) on 1,000 clients of 20 to 50 records. A larger population
repeats them: client i has the records of client i mod 1,000. W2 is a convolutional network of 1,630,794 parameters
on ten clients of 50 images of 3 x 32 x 32. Both: batches of 10 in the order of the records (the last one may be
smaller), one local epoch of plain SGD, mean of the local models weighted by records.

The driver writes the arrays once; contenders map them, so no contender pays for making them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the driver makes the arrays and starts processes; it has no use for torch
    import torch

BATCH = 10
LEARNING_RATE = {"w1": 0.1, "w2": 0.05}
CHECK_ROUND = 3  # the global model after this round is saved and compared


@dataclass(frozen=True)
class Spec:
    """One case for one contender; `started` is the driver's monotonic clock, in seconds, just before the start."""

    workload: str  # "w1" or "w2"
    population: int
    cohort: int
    rounds: int  # the first is not part of the time per round
    processes: int
    folder: str  # of the arrays
    model_file: str = ""  # where the global model after CHECK_ROUND goes; empty: nowhere
    started: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Spec:
        return Spec(**json.loads(text))


def make_arrays(folder: Path) -> None:
    """Write records, counts and first model of both workloads under `folder`; the same bytes every time."""
    rng = np.random.default_rng(1)
    counts = rng.integers(20, 51, 1000)
    teacher = rng.standard_normal((784, 62), dtype=np.float32)
    # A spread of 0.3 keeps steps of 0.1 stable, so rounding differences between contenders stay small.
    x = 0.3 * rng.standard_normal((int(counts.sum()), 784), dtype=np.float32)
    first = np.zeros(784 * 62 + 62, np.float32)
    _save(folder, "w1", x, (x @ teacher).argmax(axis=1), counts, first)
    counts = np.full(10, 50)
    x = 0.3 * rng.standard_normal((500, 3, 32, 32), dtype=np.float32)
    layers = [(32 * 75, 75), (32, 75), (64 * 800, 800), (64, 800), (384 * 4096, 4096), (384, 4096)]
    layers += [(10 * 384, 384), (10, 384)]
    values = [rng.uniform(-(fan**-0.5), fan**-0.5, size).astype(np.float32) for size, fan in layers]
    _save(folder, "w2", x, rng.integers(0, 10, 500), counts, np.concatenate(values))


def _save(folder: Path, workload: str, x: NDArray[np.float32], y: NDArray[np.int64], counts: NDArray[np.int64],
          first: NDArray[np.float32]) -> None:  # fmt: skip
    for name, array in (("x", x), ("y", y), ("counts", counts), ("first", first)):
        np.save(folder / f"{workload}-{name}.npy", array)


@dataclass(frozen=True)
class Records:
    """Records of all clients: `x` (records, ...) float32, `y` (records,) int64, mapped from files.

    `offsets[i]` and `counts[i]` (population,) say where the records of client i start and how many there are.
    """

    x: torch.Tensor
    y: torch.Tensor
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]

    def client(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Records and labels of client `i`, as views."""
        rows = slice(self.offsets[i], self.offsets[i] + self.counts[i])
        return self.x[rows], self.y[rows]

    def batches(self, i: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        x, y = self.client(i)
        return zip(x.split(BATCH), y.split(BATCH), strict=True)


def load_records(spec: Spec) -> Records:
    import torch

    def load(name: str) -> NDArray[np.float32]:
        array: NDArray[np.float32] = np.load(Path(spec.folder) / f"{spec.workload}-{name}.npy", mmap_mode="c")
        return array

    counts = np.asarray(load("counts"), np.int64)
    offsets = np.concatenate([[0], counts.cumsum()[:-1]])
    which = np.arange(spec.population) % len(counts)
    return Records(torch.from_numpy(load("x")), torch.from_numpy(load("y")), offsets[which], counts[which])


def cohorts(spec: Spec) -> NDArray[np.int64]:
    """The clients of every round, (rounds, cohort): drawn without replacement, the same for every contender."""
    rng = np.random.default_rng(2)
    if spec.cohort == spec.population:
        return np.tile(np.arange(spec.population), (spec.rounds, 1))
    return np.stack([rng.choice(spec.population, spec.cohort, replace=False) for _ in range(spec.rounds)])


def first_model(spec: Spec) -> NDArray[np.float32]:
    """The first global model, one flat vector in the order of `build_model(...).parameters()`."""
    array: NDArray[np.float32] = np.load(Path(spec.folder) / f"{spec.workload}-first.npy")
    return array


def build_model(workload: str) -> torch.nn.Module:
    """The network of the workload; its parameters are torch's own draw until they are overwritten."""
    from torch import nn

    if workload == "w1":
        return nn.Linear(784, 62)
    convolutions = [nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4096, 384), nn.ReLU(), nn.Linear(384, 10))


@dataclass
class Recorder:
    """Times rounds from inside the contender and prints what the driver reads."""

    spec: Spec
    first: float = 0.0  # s, from the start of the process to the end of round 1
    times: list[float] = field(default_factory=list)  # s, rounds after the first
    mark: float = 0.0
    done: int = 0
    cpu: float = 0.0  # s, of this process and all below it until the end of round 1

    def end_round(self, model: NDArray[np.float32]) -> None:
        """Note the end of a round; `model` is the flat global model."""
        now = time.perf_counter()
        self.done += 1
        if self.done == 1:
            self.first = time.monotonic() - self.spec.started
            self.cpu = cpu_seconds(os.getpid())
        else:
            self.times.append(now - self.mark)
        if self.done == CHECK_ROUND and self.spec.model_file:
            np.save(self.spec.model_file, model)
        self.mark = time.perf_counter()

    def finish(self) -> None:
        """Print the result, then stay until the driver has looked at the memory and closes our input."""
        cpu = (cpu_seconds(os.getpid()) - self.cpu) / max(len(self.times), 1)
        print(json.dumps({"first": self.first, "times": self.times, "cpu": cpu}), flush=True)
        sys.stdin.read()


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and all that live below it: it hardly depends on what else the machine does."""
    try:
        children = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
        own = time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) makes it
    except OSError:
        return 0.0  # it ended while we looked
    return own + sum(cpu_seconds(int(child)) for text in children for child in text.split())
