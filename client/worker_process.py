"""The agent's side of a run's worker: a process that is started, asked, and ended with all that it started.

A worker that runs a study's own code is confined (`protocol/confined.py`), and nothing that it says is trusted:
messages, files and lines are bounded, and it is ended where it takes more threads, disk or time than it may.

It gets an environment without anything of ours, a session of its own, a folder to work in, and one open socket. What it
writes to stderr goes to the agent's log, line by line.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from consortium.protocol import local
from consortium.protocol.errors import ConsortiumError, IntegrityError, RefusedError
from consortium.protocol.files import private_folder
from consortium.protocol.messages import parse
from consortium.protocol.sandbox import MAX_DISK
from consortium.protocol.watching import FORBIDDEN, LONGEST_LINE, LOOK_EVERY, beyond, plain, pump

_KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
MOST_SAID = 8 << 20
"""Bytes of an answer's document, without its content."""
SPARE = 4 << 20
"""Bytes that an answer's content may have beside twice those of the instruction's."""


class WorkerDied(ConsortiumError):  # noqa: N818 - it is what happened, not a mistake
    """The worker ended in the middle of an instruction."""


class WorkerLate(ConsortiumError):  # noqa: N818 - likewise
    """The worker did not answer before the instruction expired. It was ended, unless it has not even started."""


class WorkerProcess:
    """One worker, started at once. For one thread at a time; `kill` may be called by any.

    about: what it works on (`client/serving_worker.py`). log: gets each line that it writes.
    places: what a confined worker may read and write, and what must lie apart; None where it is not confined.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        folder: Path,
        log: Callable[[str], None],
        places: Mapping[str, Any] | None = None,
    ) -> None:
        private_folder(folder)
        self._places, self._end, self._why = places, float("inf"), ""
        ours, its = socket.socketpair()
        self._connection, self._ending = ours, threading.Lock()
        self.up = False  # whether it has started
        self.freed = (
            False  # whether it holds nothing of the last instruction's content, as far as its word counts
        )
        module = ["consortium.client.worker"]
        if places is not None:
            module = ["consortium.protocol.confined", json.dumps(places), *module]
        program = (sys.executable, "-s", "-P", "-B", "-m", *module, "serve")
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
        if places is not None:
            threading.Thread(target=self._watch, name="worker's limits", daemon=True).start()
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
        self._end = end
        try:
            self._connection.settimeout(max(0.001, end - time.monotonic()))
            local.send(self._connection, {"run": run, "header": header.decode(), "model": model}, files)
            reply, got = self._receive()
        except ConsortiumError as error:
            late = time.monotonic() >= end
            self._end_with(error)
            if late:
                raise WorkerLate(f"the work was not done within {seconds:.0f} s") from error
            raise WorkerDied(f"the worker {self._how()}") from error
        finally:
            self._end = float("inf")
        local.close(got[1:])
        self.freed = self._places is None and reply.get("freed") is True
        file = os.fdopen(got[0], "rb", buffering=0) if got else None
        if isinstance(reply.get("header"), str):
            if self._places is not None:
                _check_answer(reply["header"], file, content)
            return reply["header"].encode(errors="replace"), file
        if file is not None:
            file.close()
        raise RefusedError(plain(str(reply.get("error", "the worker gave no answer"))[:LONGEST_LINE]))

    def _wait_until_up(self, seconds: float) -> None:
        if self.up:
            return
        if not select.select([self._connection], [], [], max(0.0, seconds))[0]:
            raise WorkerLate(f"the worker was not started within {seconds:.0f} s; it goes on")
        try:
            self._connection.settimeout(max(1.0, seconds))
            local.close(self._receive()[1])
        except ConsortiumError as error:
            self._end_with(error)
            raise WorkerDied(f"the worker {self._how()}") from error
        self.up = True

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        return local.receive(self._connection, local.MAX_MESSAGE if self._places is None else MOST_SAID)

    def _end_with(self, error: ConsortiumError) -> None:
        """End it after `error`; raises RefusedError where it was ended for what the study's code did."""
        self.kill()
        if self._places is not None and self._process.returncode == -signal.SIGSYS:
            raise RefusedError(FORBIDDEN) from error
        if self._places is not None and (self._why or isinstance(error, IntegrityError)):
            raise RefusedError(f"the study's code {self._why or 'gave what is no answer'}") from error

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
        pump(self._process.stderr, log, self._places is not None)

    def _watch(self) -> None:
        """End it where it takes more than a confined worker may; for a thread of its own."""
        assert self._places is not None
        while self._process.returncode is None:
            time.sleep(LOOK_EVERY)
            why = ""
            try:
                why = beyond(self.pid, self._places["write"], MAX_DISK)
            except OSError:
                continue  # it is ending
            if why:
                self._why = why
            if why or time.monotonic() > self._end:
                self._signal()
                return

    def _signal(self) -> None:
        with self._ending:
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)


def _check_answer(header: str, file: BinaryIO | None, content: BinaryIO | None) -> None:
    """Raises RefusedError where what a confined worker gave is no answer, or larger than one can be."""
    about = os.fstat(file.fileno()) if file is not None else None
    asked = os.fstat(content.fileno()).st_size if content is not None else 0
    try:
        length = parse(header.encode(errors="replace")).length
    except IntegrityError:
        length = -1
    large = about is not None and (not stat.S_ISREG(about.st_mode) or about.st_size > MAX_DISK)
    if large or not 0 <= length <= 2 * asked + SPARE:
        if file is not None:
            file.close()
        what = "gave what is no answer" if length < 0 else "gave more than an answer can have"
        raise RefusedError(f"the study's code {what}")


def environment(folder: Path) -> dict[str, str]:
    """Variables of a worker: what is needed to find programs and libraries, and nothing that may hold a secret."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    home = str(folder)
    fixed = {"HOME": home, "TMPDIR": home, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    fixed["LOGNAME"] = "worker"  # libraries ask who runs them; a confined worker cannot look it up
    return {**kept, **fixed}
