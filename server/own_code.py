"""The part of a run that a study's own code decides, in a confined process of its own.

The run's process starts it, carries its calls to the server, and goes on by itself where it ends: that process has no
key but the run's own, no way to start, sign or export anything, and writes in a scratch folder alone. Of its calls
(`server/link.py`) those of `CARRIED` are carried, with files that it wrote; whatever else it says ends it. It says
`over` when it is through. What it writes to stderr goes to the run's log, line by line, and is bounded.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from consortium.protocol import local
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.lifeline import end_with
from consortium.protocol.local import ClosedError
from consortium.protocol.sandbox import MAX_DISK, missing
from consortium.protocol.watching import FORBIDDEN, LOOK_EVERY, beyond, plain, pump
from consortium.server.link import Link
from consortium.server.plans import CODE

CARRIED = ("load", "sites", "ready", "interrupted", "ask", "answers", "records", "keep", "commit", "wait")
LARGEST = 1 << 30
"""Bytes of a layout, or of a message, that it may announce; answers may be a little larger."""
MOST_SAID = 8 << 20
"""Bytes of one call."""
LONGEST_REASON = 2000
OVER = "over"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What a disk says that is full, read-only or broken; no fault of the study's code."""

Told = Callable[[Mapping[str, Any]], None]


def hold(
    link: Link, module: str, about: Mapping[str, Any], read: list[str], scratch: Path, told: Told
) -> Mapping[str, Any]:
    """Run a program of `protocol/confined.py` to its end; what it said then.

    about: what it is told first. read: what it may read. scratch: a new folder, where it may write. told: gets the call
    of each commit once that is durable.

    Raises:
        ConsortiumError: the study's code did what it must not, or died by itself.
        ClosedError: the server has ended.
    """
    if why := missing():
        raise ConsortiumError(f"the server has no sandbox for code that a study brings: {why}")
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    one = _Confined(module, about, read, scratch)
    try:
        while True:
            document, files = one.receive()
            try:
                if document.get("call") == OVER:
                    one.release()
                    return document
                one.answer(link, document, files)
                if document["call"] == "commit":
                    told(document)
            finally:
                local.close(files)
    finally:
        one.end()


class _Confined:
    def __init__(self, module: str, about: Mapping[str, Any], read: list[str], scratch: Path) -> None:
        self._write, self._why = [str(scratch)], ""
        self._connection, theirs = socket.socketpair()
        places = {"read": read, "write": self._write, "apart": [about["apart"]]}
        command = [sys.executable, "-s", "-P", "-B", "-m", "consortium.protocol.confined", json.dumps(places)]
        with theirs:
            self._process = subprocess.Popen(
                [*command, module, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, "HOME": str(scratch), "TMPDIR": str(scratch), "LOGNAME": "worker"},
                cwd=scratch,
                pass_fds=[theirs.fileno()],
            )
        assert self._process.stderr is not None
        self._ending = threading.Lock()
        log = (self._process.stderr, _log, True)
        self._pump = threading.Thread(target=pump, args=log, name="study's log", daemon=True)
        self._pump.start()
        threading.Thread(target=self._watch, name="study's limits", daemon=True).start()
        with contextlib.suppress(ClosedError):  # it has died, which the next look shows
            local.send(self._connection, about)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Its next call. Raises ConsortiumError where there is none any more, and why."""
        try:
            return local.receive(self._connection, MOST_SAID)
        except (ClosedError, IntegrityError) as error:
            self.end()
            code = self._process.returncode
            if code == -signal.SIGSYS:
                raise ConsortiumError(FORBIDDEN) from error
            if code == -signal.SIGKILL and not self._why and isinstance(error, ClosedError):
                os.kill(
                    os.getpid(), signal.SIGKILL
                )  # killed by a stranger: start both again, from the commit
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            if isinstance(error, IntegrityError):
                how = "said what is no call, and was ended"
            raise ConsortiumError(f"the study's code {self._why or how}; the run's log says more") from error

    def answer(self, link: Link, document: dict[str, Any], files: list[int]) -> None:
        """Carry a call to the server, and its answer back."""
        name, fields = str(document.get("call", "")), {k: v for k, v in document.items() if k != "call"}
        if name not in CARRIED:
            raise ConsortiumError(f"the study's code asked for {plain(name[:40])!r}, and was ended")
        if name == "ready" and not 0 <= int(fields.get("layout_bytes", 0)) <= LARGEST:
            raise ConsortiumError(
                f"the study's code asks for more than {LARGEST} bytes at once, and was ended"
            )
        for file in files:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_DISK:
                raise ConsortiumError(
                    "the study's code handed over what is no file, or too large, and was ended"
                )
        reply, back = _asked(link, name, files, fields)
        try:
            with contextlib.suppress(ClosedError):  # the next look shows it
                local.send(self._connection, reply, [] if back is None else [back])
        finally:
            if back is not None:
                os.close(back)

    def release(self) -> None:
        """Let it end by itself."""
        with contextlib.suppress(ClosedError):
            local.send(self._connection, {})

    def end(self) -> None:
        """End it, with all that is left of it."""
        with self._ending:
            if self._process.poll() is None:
                # What it has closed its socket for, it may be dying of by itself: its own way says more.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.5)
            if self._process.poll() is None:
                self._why = self._why or "closed its socket, and was ended"
                self._process.kill()
            self._process.wait()
        self._pump.join(5.0)
        self._connection.close()

    def _watch(self) -> None:
        while self._process.returncode is None:
            time.sleep(LOOK_EVERY)
            with contextlib.suppress(OSError):  # it is ending
                if why := beyond(self._process.pid, self._write):
                    self._why = why
                    with self._ending:
                        if self._process.poll() is None:
                            self._process.kill()
                    return


def _asked(
    link: Link, name: str, files: list[int], document: Mapping[str, Any]
) -> tuple[dict[str, Any], int | None]:
    """What the server answers, its refusals too. Raises ClosedError where it has ended."""
    try:
        return link.call_for_file(name, files, **document)
    except ClosedError:
        raise
    except ConsortiumError as error:
        return {"error": str(error), "kind": type(error).__name__}, None


def _log(line: str) -> None:
    print(f"perhaps the study's own words: {line}", file=sys.stderr, flush=True)


def reason(said: Mapping[str, Any]) -> str:
    """The reason that it gave at its end, as it is shown."""
    return plain(str(said.get("why", "")))[:LONGEST_REASON]


def run_inside(arguments: Sequence[str], confine: Callable[[], None], work: Callable[[Link], None]) -> int:
    """The main of a confined program: do `work` and say how it ended; returns the exit code, 0 where that was said.

    arguments: the number of the socket, and of the process with which it ends. confine: shuts it in.
    """
    end_with(int(arguments[1]))
    link = Link(socket.socket(fileno=int(arguments[0])))
    try:
        why = ""
        try:
            confine()
            work(link)
        except ClosedError:
            raise
        except ConsortiumError as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001 - the study's own code may raise anything; it is reported
            why = fault(error)
            if isinstance(error, OSError) and error.errno in DISK:
                why = f"the server's disk: {error.strerror}; is it full?"
        link.call(OVER, why=why)
    except ClosedError:
        return 1
    return 0


def fault(error: Exception) -> str:
    """What went wrong in code that is not ours, with its innermost line."""
    place, step = "", error.__traceback__
    while step is not None:
        path = Path(step.tb_frame.f_code.co_filename)
        if CODE in path.parts:
            place = f"{path.name}, line {step.tb_lineno}: "
        step = step.tb_next
    return f"study code: {place}{type(error).__name__}: {error}; correct the code, then submit it again"
