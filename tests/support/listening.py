"""Where a process can be spoken to, read from the kernel's tables."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LISTEN = "0A"


def listening(pid: int) -> set[str]:
    """`tcp HOST:PORT` and so on of every socket of a process that takes connections or datagrams, and `unix PATH`."""
    inodes = set(_inodes(pid))
    found = set()
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for fields in _table(pid, kind):
            if fields[9] in inodes and (fields[3] == _LISTEN or kind.startswith("udp")):
                found.add(f"{kind} {_address(fields[1])}")
    for fields in _table(pid, "unix"):
        if len(fields) > 7 and fields[6] in inodes and fields[5] == "01" and int(fields[3], 16) & 0x10000:
            found.add(f"unix {fields[7]}")
    return found


def _inodes(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for one in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = str(one.readlink())
                if target.startswith("socket:["):
                    yield target[8:-1]


def _table(pid: int, kind: str) -> Iterator[list[str]]:
    path = Path(f"/proc/{pid}/net/{kind}")
    if path.exists():
        for line in path.read_text().splitlines()[1:]:
            yield line.split()


def _address(text: str) -> str:
    host, _, port = text.partition(":")
    words = [int(host[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(host), 8)]
    return f"{ipaddress.ip_address(b''.join(words))}:{int(port, 16)}"
