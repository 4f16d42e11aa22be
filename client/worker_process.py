"""The agent's side of a run's worker: a process that is started, asked, and ended with all that it started.

It gets an environment without anything of ours, a session of its own, a folder to work in, and one open socket. What it
writes to stderr goes to the agent's log, line by line.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from consortium.protocol import local
from consortium.protocol.errors import ConsortiumError, RefusedError
from consortium.protocol.files import private_folder

_KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
LONGEST_LINE = 4000


class WorkerDied(ConsortiumError):  # noqa: N818 - it is what happened, not a mistake
    """The worker ended in the middle of an instruction."""


class WorkerLate(ConsortiumError):  # noqa: N818 - likewise
    """The worker did not answer before the instruction expired. It was ended, unless it has not even started."""


class WorkerProcess:
    """One worker, started at once. For one thread at a time; `kill` may be called by any.

    about: what it works on (`client/serving_worker.py`). log: gets each line that it writes.
    """

    def __init__(self, about: Mapping[str, Any], folder: Path, log: Callable[[str], None]) -> None:
        private_folder(folder)
        ours, its = socket.socketpair()
        self._connection, self._ending = ours, threading.Lock()
        self.up = False  # whether it has started
        program = (sys.executable, "-s", "-P", "-B", "-m", "consortium.client.worker", "serve")
        with its:
            self._process = subprocess.Popen(
                (*program, str(its.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment(folder),
                cwd=folder,
                start_new_session=True,
                pass_fds=[its.fileno()],
            )
        threading.Thread(target=self._pump, args=(log,), name="worker's log", daemon=True).start()
        with contextlib.suppress(local.ClosedError):  # then the first question finds it dead
            local.send(ours, about)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ask(
        self, run: str, header: bytes, content: BinaryIO | None, model: str, seconds: float
    ) -> tuple[bytes, BinaryIO | None]:
        """The header of the answer to an instruction, and the encrypted file that begins with its content.

        model: the digest of the model in `content`, as it was hashed; "" where there is none.

        Raises:
            RefusedError: the worker gave none; the text may be sent to the server.
            WorkerLate: nothing came in `seconds`. The worker is ended, unless it has not started: then it goes on, for
                the next question. Else a machine that takes longer to start one than a study waits would never begin.
            WorkerDied: it ended meanwhile.
        """
        end = time.monotonic() + seconds
        files = [content.fileno()] if content is not None else []
        self._wait_until_up(seconds)
        try:
            self._connection.settimeout(max(0.001, end - time.monotonic()))
            local.send(self._connection, {"run": run, "header": header.decode(), "model": model}, files)
            reply, got = local.receive(self._connection)
        except ConsortiumError as error:
            late = time.monotonic() >= end
            self.kill()
            if late:
                raise WorkerLate(f"the work was not done within {seconds:.0f} s") from error
            raise WorkerDied(f"the worker {self._how()}") from error
        local.close(got[1:])
        file = os.fdopen(got[0], "rb", buffering=0) if got else None
        if isinstance(reply.get("header"), str):
            return reply["header"].encode(), file
        raise RefusedError(str(reply.get("error", "the worker gave no answer")))

    def _wait_until_up(self, seconds: float) -> None:
        if self.up:
            return
        if not select.select([self._connection], [], [], max(0.0, seconds))[0]:
            raise WorkerLate(f"the worker was not started within {seconds:.0f} s; it goes on")
        try:
            local.receive(self._connection)
        except ConsortiumError as error:
            self.kill()
            raise WorkerDied(f"the worker {self._how()}") from error
        self.up = True

    def _how(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def kill(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with self._ending:
            if self._process.returncode is None:  # else its number may be another's by now
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def close(self) -> None:
        """As `kill`, for good."""
        self.kill()
        self._connection.close()

    def _pump(self, log: Callable[[str], None]) -> None:
        """Hand on what it writes."""
        assert self._process.stderr is not None
        with io.TextIOWrapper(self._process.stderr, "utf-8", "replace") as lines:
            while line := lines.readline(LONGEST_LINE):
                if line.strip():
                    log("".join(c if c.isprintable() else " " for c in line.rstrip()))


def environment(folder: Path) -> dict[str, str]:
    """Variables of a worker: what is needed to find programs and libraries, and nothing that may hold a secret."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    home = str(folder)
    fixed = {"HOME": home, "TMPDIR": home, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **fixed}
