"""How an audit log is shown: which entries, and each as a line for people or as it was signed."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from consortium.protocol import audit, chain
from consortium.protocol.chain import Entry
from consortium.protocol.errors import InputError

LONGEST = 160
"""Characters of a value that people are shown."""
_HIDDEN = {"header", "signature", "trust", "instruction", "server", "statement"}
"""Fields that are for machines."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Filter:
    """Which entries. since: seconds since the epoch. run: a run's name, or its study's. limit: the last so many; 0 for
    all."""

    since: float = 0.0
    run: str = ""
    kind: str = ""
    limit: int = 0

    def takes(self, entry: Entry) -> bool:
        """Whether an entry is one of them."""
        run = str(entry.body.get("run", ""))
        named = not self.run or run == self.run or run.rpartition(".")[0] == self.run
        return entry.at >= self.since and named and self.kind in ("", entry.kind)

    def of(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Those of the entries, in order."""
        found = (entry for entry in entries if self.takes(entry))
        yield from deque(found, self.limit) if self.limit else found


def since(text: str, now: float) -> float:
    """A moment, in seconds since the epoch: "2h" (ago; s, m, h, d), or a date and perhaps a time as ISO 8601 writes it.

    Raises:
        InputError: it is neither.
    """
    if not text:
        return 0.0
    ago = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhd])", text)
    if ago:
        return now - float(ago[1]) * _UNITS[ago[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise InputError(
            f"--since: got {text[:40]!r}; 2h, 7d, or a date such as 2026-01-31 or 2026-01-31T08:00 would be right"
        ) from error


def document(entry: Entry) -> dict[str, Any]:
    """An entry as a document; its keys stay."""
    return {
        "sequence": entry.sequence,
        "at": entry.at,
        "kind": entry.kind,
        "body": dict(entry.body),
        "hash": entry.hash,
    }


def line(entry: Entry) -> str:
    """An entry for people."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at))
    words = " ".join(f"{key}={_short(value)}" for key, value in entry.body.items() if key not in _HIDDEN)
    return f"{entry.sequence:>7}  {when}  {entry.kind:<12} {words}".rstrip()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=True)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:16]
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def export(folder: Path, out: Path, chosen: Filter, name: str) -> int:
    """Write entries into a new file, each as it is signed; how many.

    Raises:
        InputError: the file is there already, or cannot be written.
    """
    try:
        with out.open("xb") as file, _unless_it_fails(out):
            wanted = {entry.sequence for entry in chosen.of(chain.entries(audit.segments(folder), name))}
            for one in _lines(audit.segments(folder)):
                if int(json.loads(one)["sequence"]) in wanted:
                    file.write(one)
    except FileExistsError as error:
        raise InputError(f"{out}: is there already; give a new file") from error
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror}); give a file in a folder with room"
        ) from error
    return len(wanted)


@contextmanager
def _unless_it_fails(out: Path) -> Iterator[None]:
    """Remove the file that was begun where it cannot be completed."""
    try:
        yield
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def _lines(files: Sequence[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            yield from (one for one in file if one.endswith(b"\n"))
