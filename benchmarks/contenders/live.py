"""Our own server and clients as processes on this machine's loopback, over mTLS, and what is seen of them.

The same programs that people start (`consortium server start`, `consortium client start`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from consortium.protocol.errors import ConsortiumError
from consortium.protocol.study import Study
from consortium.simulations.deployment import Federation, federation
from consortium.simulations.programs import Programs, descendants

FEATURES = 9
ROWS = 20
_TICKS = os.sysconf("SC_CLK_TCK")

_STUDY = """\
format = 1
[study]
name = "{name}"
task = "consortium.client.tasks.tabular:Regressor"
rounds = {rounds}
[data]
target = "y"
holdout = 0.5
target_range = {{ min = -5.0, max = 5.0 }}
[data.features]
{features}
[model]
hidden = {hidden}
[training]
lr = 0.001
batch_size = 1
local_steps = 1
[cohort]
deadline = "5m"
"""


def study_of(name: str, rounds: int, hidden: Sequence[int] = ()) -> Study:
    """A study of our own regression over `FEATURES` numbers: ten parameters where `hidden` is empty. A site does one
    step with one row, and evaluates the model on about half of its `ROWS` rows."""
    features = "\n".join(f"x{i} = {{ min = -5.0, max = 5.0 }}" for i in range(FEATURES))
    return Study.parse(_STUDY.format(name=name, rounds=rounds, features=features, hidden=list(hidden)))


def write_table(folder: Path, seed: int) -> Path:
    """A site's data for `study_of`, the same for the same seed; the folder, a new one."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(seed).uniform(-5, 5, (ROWS, FEATURES + 1))
    names = ",".join([*(f"x{i}" for i in range(FEATURES)), "y"])
    np.savetxt(folder / "table.csv", numbers, "%.6f", ",", header=names, comments="")
    return folder


@contextmanager
def own_folder() -> Iterator[Path]:
    """A new folder on a disk; where the block raises it stays, and its name is said, for the logs in it."""
    folder = Path(tempfile.mkdtemp(prefix="consortium-benchmark-"))
    try:
        yield folder
    except BaseException:
        print(f"the logs are in {folder}", flush=True)
        raise
    shutil.rmtree(folder)


@contextmanager
def live_federation(folder: Path) -> Iterator[Federation]:
    """A new federation in `folder`, whose server runs while the block lasts; so do clients that are started."""
    (folder / "clients").mkdir(parents=True)
    with Programs() as programs, federation(programs, folder) as live:
        yield live


@dataclass
class Followed:
    """A run that has finished. ends: seconds since the epoch at which the commits of rounds 1, 2 ... were durable."""

    ends: list[float] = field(default_factory=list)

    @property
    def rounds(self) -> list[float]:
        """Seconds of each round after the first: from commit to commit, everything in between included."""
        return [after - before for before, after in pairwise(self.ends)]


def follow(
    live: Federation, study: Study, at_round: Callable[[int], None] = lambda _: None, *, export: bool = False
) -> Followed:
    """Run a study to its last round, then stop it, or to the exported model. Every site must count in every round.

    at_round: called with the number of each round after its commit.
    """
    live.start(study)
    found = Followed()
    for event in live.events(study):
        if event["kind"] == "round":
            number, left_out = event["round"], event["left_out"]
            if left_out or event["void"]:
                raise RuntimeError(f"round {number}: left out: {left_out}")
            if number:
                assert isinstance(event["at"], float)
                found.ends.append(event["at"])
                assert isinstance(number, int)
                at_round(number)
            if number == study.rounds and not export:
                with suppress(ConsortiumError):  # it is over already
                    live.admin.post(f"/v1/studies/{study.name}/stop")
                break
    return found


class Processes:
    """The server's process and those that it started, as they are now."""

    def __init__(self, folder: Path) -> None:
        """folder: the federation's."""
        self._folder = str(folder / "server").encode()
        self._server = 0

    @property
    def server(self) -> int:
        """The server's process id."""
        if not self._server:
            for pid in descendants([os.getpid()]):
                words = command_of(pid)
                if self._folder in words and b"server" in words:
                    self._server = pid
        return self._server

    def loop(self) -> list[int]:
        """The server, and the processes of its runs, but not the workers that these start."""
        runs = [
            pid for pid in children_of(self.server) if b"consortium.server.run_process" in command_of(pid)
        ]
        return [self.server, *runs]

    def all(self) -> list[int]:
        """The server and all below it."""
        return descendants([self.server])


class Watch:
    """Peak memory of some processes while the block runs: the sum of their anonymous and shared memory, page cache left
    out, seen every 20 ms. mb: the peak in MB (1e6 bytes)."""

    def __init__(self, pids: Callable[[], Sequence[int]]) -> None:
        self.mb = 0.0
        self._pids = pids
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            self.mb = max(self.mb, memory_mb(self._pids()))


def memory_mb(pids: Sequence[int]) -> float:
    """Anonymous and shared memory of processes that hold no page together, MB."""
    kilobytes = 0
    for pid in pids:
        lines = _read(pid, "status").splitlines()
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith((b"RssAnon", b"RssShmem")))
    return kilobytes * 1024 / 1e6


def cpu_seconds(pids: Sequence[int]) -> float:
    """Seconds of processor that processes have used so far, theirs and those of children that ended."""
    total = 0
    for pid in pids:
        fields = _read(pid, "stat").rpartition(b")")[2].split()
        total += sum(int(one) for one in fields[11:15])
    return total / _TICKS


def command_of(pid: int) -> list[bytes]:
    """The words of a process's command line; none where it has gone."""
    return _read(pid, "cmdline").split(b"\0")


def children_of(pid: int) -> list[int]:
    """Children of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        found += [int(one) for one in _read(pid, f"task/{task.name}/children").split()]
    return found


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
