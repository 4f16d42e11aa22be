"""What is left of programs: processes, and the descriptors that they hold."""

from __future__ import annotations

import os
from pathlib import Path


def living(marker: str) -> list[str]:
    """Command lines of living processes that mention `marker` there, in their environment or as where they work."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            around = (path / "environ").read_bytes().decode(errors="replace")
            place = str((path / "cwd").readlink())
        except OSError:
            continue
        if marker in line + around + place and state != "Z" and int(path.name) != os.getpid():
            found.append(line)
    return found


def descriptors(pid: int) -> dict[int, str]:
    """What a process has open, by descriptor."""
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[int(path.name)] = str(path.readlink())
        except OSError:
            continue
    return found


def holders(folder: Path) -> list[str]:
    """Open files and sockets of any process that lie under `folder`, named or not."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += [
                f"{process.name}: {target}"
                for target in descriptors(int(process.name)).values()
                if target.startswith(f"{folder}/")
            ]
        except OSError:
            continue
    return found
