"""A terminal in which a test types what the docs show."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

from consortium.simulations.programs import Programs

BIN = Path(sys.executable).parent


class Terminal:
    """A folder in which commands are typed, as a person does: some of them stay in the foreground."""

    def __init__(self, programs: Programs, folder: Path) -> None:
        folder.mkdir()
        self.folder, self._programs, self._count = folder, programs, 0
        self._environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}

    def type(self, command: str, typed: str = "", seconds: float = 90.0) -> str:
        """What a command prints; `start` of a server or client goes on in the background, and its log is awaited."""
        self._count += 1
        name = f"command-{self._count}"
        (self.folder / "typed").write_text(typed)
        stays = re.search(r"(server|client) start", command) is not None
        line = f"exec {command}" if stays else f"({command}) < typed; echo exit $?; sleep 1000"
        self._programs.start(name, ["bash", "-c", line], self._environment, self.folder)
        wanted = r"admin door on|connected" if stays else r"^exit (\d+)$"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            said = (self.folder / f"{name}.log").read_text()
            found = re.search(wanted, said, re.M)
            if found:
                assert stays or found[1] == "0", f"$ {command}\n{said}"
                return said
            self._programs.check()
            time.sleep(0.1)
        raise AssertionError(f"$ {command}\n{said}")
