"""Starting the process of one run, and ending it: a clean environment, a socket, a session of its own, a log."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from consortium.protocol import local
from consortium.protocol.errors import ConsortiumError
from consortium.protocol.files import private_folder

ENDING = 5.0
"""Seconds from SIGTERM to SIGKILL."""
LOG = "log.txt"
SCRATCH = ".work"
"""A folder in the run's for workers and caches, which is there while the process is."""
COMMAND = (sys.executable, "-s", "-P", "-B", "-m", "consortium.server.run_process")

_KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")


class Child:
    """A run's process. Its kernel kills it when the thread that started it ends, so that thread must outlive it.

    folder: the run's, where it works. first: what it is told. gone: called by another thread once it has ended.
    """

    def __init__(
        self,
        folder: Path,
        first: Mapping[str, Any],
        gone: Callable[[], None],
        command: tuple[str, ...] = COMMAND,
    ) -> None:
        self._log = folder / LOG
        self._scratch = folder / SCRATCH
        shutil.rmtree(self._scratch, ignore_errors=True)
        private_folder(self._scratch)
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._said = os.fstat(log).st_size  # what stands there is of processes before it
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(self._scratch),
                cwd=folder,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError as error:
            self.connection.close()
            raise ConsortiumError(f"{command[0]}: cannot be started ({error.strerror})") from error
        finally:
            os.close(log)
            theirs.close()
        self.ended = threading.Event()
        self._reaping = threading.Lock()  # its number is its own while this is held and it has not ended
        self._gone = gone
        self._reaper = threading.Thread(target=self._reap, name=f"reaper of {self.pid}", daemon=True)
        self._reaper.start()
        with suppress(local.ClosedError):  # it has died already, which the next call shows
            local.send(self.connection, first)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def _reap(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with suppress(ProcessLookupError, PermissionError):  # while its number cannot be another's yet
            os.killpg(self.pid, signal.SIGKILL)
        with self._reaping:
            self._process.wait()
            self.ended.set()
        self._gone()

    def end(self, seconds: float = ENDING) -> None:
        """End it and all of its session: asked first, killed when it has not ended in time. From any thread."""
        self._signal(signal.SIGTERM)
        if not self.ended.wait(seconds):
            self._signal(signal.SIGKILL)
        self._reaper.join()

    def _signal(self, number: signal.Signals) -> None:
        """Not by `Popen.send_signal`, which may reap the process before the reaper sees it."""
        with self._reaping:
            if not self.ended.is_set():
                os.kill(self.pid, number)

    def close(self) -> None:
        """End it if it has not, and let go of its socket and scratch folder."""
        self.end()
        self.connection.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def killed(self) -> bool:
        """Whether it was ended by a signal."""
        code = self._process.returncode
        return code is not None and code < 0

    def death(self) -> str:
        """How it ended, with the last line of its log."""
        code = self._process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = _tail(self._log, self._said).strip().splitlines()
        said = "".join(c if c.isprintable() else "?" for c in lines[-1][:300]) if lines else ""
        return f"its process {how}" + (f": {said}" if said else "")


def _tail(path: Path, start: int, length: int = 4096) -> str:
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(start, os.fstat(file.fileno()).st_size - length))
        return file.read(length).decode(errors="replace")
    return ""


def _environment(scratch: Path) -> dict[str, str]:
    """What is needed to find programs and libraries, and nothing that may hold a secret."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    home = str(scratch)
    fixed = {"HOME": home, "TMPDIR": home, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    return {**kept, **fixed, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
