"""A program, confined before anything that a study brings is loaded.

    python -m consortium.protocol.confined PLACES MODULE ITS ARGUMENTS…

MODULE is one of Consortium's (`PROGRAMS`); its `main(arguments, confine)` calls `confine` once its libraries are
loaded. PLACES is JSON: `read` and `write`, the paths that the study's code may use; `apart`, folders with keys that
must not lie among what the interpreter needs; perhaps `memory`, the bytes that it may take. This module and
`protocol/sandbox.py` import nothing heavy: libraries may start threads, which would not be confined.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consortium.protocol import sandbox
from consortium.protocol.errors import ConsortiumError

PROGRAMS = ("consortium.client.worker", "consortium.server.own_rounds", "consortium.server.flower_run")
TOLD = 20
"""How many files outside its places the log names that the study's code asked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Enter the sandbox, then run the program; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    places = json.loads(given[0])
    try:
        for folder in places["apart"]:
            sandbox.check_apart(Path(folder))
        size = sandbox.enter(places["read"], places["write"])
    except ConsortiumError as error:
        print(error, file=sys.stderr)
        return error.exit_code

    if given[1] not in PROGRAMS:
        print(f"{given[1][:80]}: is no program that runs confined", file=sys.stderr)
        return 2
    program: Any = importlib.import_module(given[1])

    def confine() -> None:
        sandbox.limit(size, places.get("memory") or sandbox.memory())
        sys.addaudithook(
            _Telling([*sandbox.needed(), *places["read"], *places["write"], "/dev", "/proc", "/sys"])
        )

    return int(program.main(given[2:], confine))


class _Telling:
    """Writes to the log which files the study's code asks for that it cannot have. The kernel refuses them; this only
    tells, of what Python opens."""

    def __init__(self, places: Sequence[str]) -> None:
        self._places = tuple(os.path.realpath(place) for place in places)
        self._left = TOLD

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.listdir", "os.scandir") or not self._left or not arguments:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike) or str(path).startswith("__editable__"):
            return  # what Python asks its own importers
        try:
            real = os.path.realpath(os.fsdecode(path))
        except (OSError, ValueError):
            return
        if real.startswith("/memfd:"):
            return  # data that the worker holds in memory
        if not any(real == place or real.startswith(place + "/") for place in self._places):
            self._left -= 1
            os.write(
                2,
                f"sandbox: the study's code asked for {os.fsdecode(path)[:200]!r}\n".encode(errors="replace"),
            )


if __name__ == "__main__":
    raise SystemExit(main())
