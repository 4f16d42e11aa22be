"""Starting programs, and leaving nothing of them behind.

Every program has a session of its own, so that Ctrl-C reaches only us; on the way out, whatever the reason, each is
asked to end with all that it started, and killed where it does not. Should we be killed ourselves, Linux ends them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from consortium.protocol.errors import ConsortiumError

GRACE = 4.0
"""Seconds in which a program may end by itself."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Programs:
    """Programs that live as long as the `with` block. SIGTERM and SIGHUP end the block like Ctrl-C."""

    def __init__(self) -> None:
        self._started: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Programs:
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, _interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        try:
            self._end()
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def start(
        self, name: str, arguments: Sequence[str | Path], environment: Mapping[str, str], folder: Path
    ) -> int:
        """Start a program in `folder`; what it says goes to `NAME.log` there. Its process id."""
        path = folder / f"{name}.log"
        with path.open("ab") as log:
            process = subprocess.Popen(
                [str(one) for one in arguments],
                env=dict(environment),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._started.append((name, process, path))
        return process.pid

    def check(self) -> None:
        """See that all are running.

        Raises:
            ConsortiumError: one has ended, with the last lines of its log.
        """
        for name, process, path in self._started:
            if process.poll() is not None:
                last = "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
                raise ConsortiumError(
                    f"{name} ended by itself (exit code {process.returncode}); its log is {path}:\n{last}"
                )

    def _end(self) -> None:
        processes = [process for _, process, _ in self._started]
        # Listed before the first signal: a child whose parent has gone cannot be found any more.
        family = descendants([process.pid for process in processes])
        for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
            for pid in reversed(family):
                if _lives(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            end = time.monotonic() + seconds
            while any(_lives(pid) for pid in family) and time.monotonic() < end:
                time.sleep(0.05)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)


def descendants(roots: Sequence[int]) -> list[int]:
    """The processes `roots` and all that they started, parents before children."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat(path)
        if fields:
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = [], list(roots)
    while todo:
        pid = todo.pop(0)
        found.append(pid)
        todo += children.get(pid, [])
    return found


def free_ports(number: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _stat(path: Path) -> list[str]:
    """Fields of /proc/PID/stat after the name: state, parent, and so on; none where the process is gone."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _lives(pid: int) -> bool:
    fields = _stat(Path(f"/proc/{pid}/stat"))
    return bool(fields) and fields[0] not in ("Z", "X")
