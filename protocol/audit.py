"""An audit log: what happened at one side, in a chain (`protocol/chain.py`) over files that are each bounded.

    audit/000000000001.jsonl    the entries from 1; begun anew after `SEGMENT` bytes
    audit/000000004711.jsonl    the entries from 4711, the first of which names the last of the file before

Entries say that something happened, and name it by digests and sizes; they never hold what a record holds. `note`
returns once an entry survives a power cut. One that may wait (`durable=False`) survives the end of the program at
once, and a power cut from the next `note` or `flush` on; the `head` that is shown to others never names one that waits.
A torn last line, which a crash left and nobody was told of, is cut away, and an entry "repaired" says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.protocol import chain
from consortium.protocol.chain import Entry, Head, start_of
from consortium.protocol.chain_writer import Chain
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.files import private_folder
from consortium.protocol.messages import canonical

FOLDER = "audit"
SEGMENT = 4 << 20
"""Bytes after which another file is begun."""
LONGEST_BODY = 200_000
"""Bytes of an entry's body; of a longer one its digest is kept."""
RECENT = 64
"""Entries whose hashes are known without reading a file: what the other side has seen is mostly one of them."""
REPAIRED = "repaired"


def name_at_site(federation: str, site: str, identity: str) -> str:
    """The name of a site's audit log. identity: SHA-256 (hex) of its public key."""
    return f"audit {federation} {site} {identity}"


def name_at_server(federation: str, root: str) -> str:
    """The name of a server's audit log. root: SHA-256 (hex) of the federation's root certificate."""
    return f"audit {federation} server {root}"


class Audit:
    """The log in a folder; for any number of threads and processes, one writes at a time.

    key: the owner's now. keys: public keys, any of which may have signed the last entry that is there.

    Raises:
        IntegrityError: its last file is damaged; the entry is named.
        InputError: it cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        key: Callable[[], Ed25519PrivateKey],
        keys: Callable[[], Sequence[Ed25519PublicKey]] = tuple,
        clock: Callable[[], float] = time.time,
        segment: int = SEGMENT,
    ) -> None:
        self.folder, self.name = private_folder(folder), name
        self._key, self._keys, self._clock, self._segment = key, keys, clock, segment
        self._lock = threading.RLock()
        self._recent: dict[int, str] = {}
        self._signs: Ed25519PrivateKey = key()
        with self._lock, self._alone():
            self._chain = self._last()
            if self._chain.path.exists():
                self._chain.sync()
        self._durable = self._chain.head

    @property
    def head(self) -> Head:
        """The last entry that would survive a power cut, as far as this program knows."""
        return self._durable

    def note(self, kind: str, body: Mapping[str, Any], *, durable: bool = True) -> Head:
        """Add an entry.

        Raises:
            IntegrityError: what others did to the files meanwhile is no continuation.
            ConsortiumError: it cannot be written; nothing may be done then that it would have told of.
        """
        try:
            with self._lock, self._alone():
                now = self._clock()
                torn = self._follow()
                if torn:
                    about = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
                    self._chain.append(REPAIRED, about, now)
                if self._chain.size >= self._segment:
                    self._chain.sync()
                    self._chain = self._chain_at(self._chain.head.sequence + 1, self._chain.head)
                head = self._chain.append(kind, _fitted(body), now, durable)
                self._recent[head.sequence] = head.hash
                self._recent.pop(head.sequence - RECENT, None)
                if durable:
                    self._durable = head
                return head
        except OSError as error:
            raise ConsortiumError(
                f"{self.folder}: the audit log cannot be written ({error.strerror}); is the disk full or read-only?"
            ) from error

    def flush(self) -> None:
        """Make every entry durable. Raises ConsortiumError where that cannot be."""
        with self._lock:
            if self._durable == self._chain.head:
                return
            try:
                self._chain.sync()
            except OSError as error:
                raise ConsortiumError(
                    f"{self.folder}: the audit log cannot be written ({error.strerror})"
                ) from error
            self._durable = self._chain.head

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """The entries with a number above `after`, checked as far as hashes go."""
        return chain.entries(segments(self.folder), self.name, after)

    def backwards(self) -> Iterator[Entry]:
        """The entries, the last one first; checked as far as hashes go within each file."""
        files = segments(self.folder)
        for path in reversed(files):
            start = _start(path, files, self.name)
            yield from reversed(list(chain.entries(path, self.name, start=start)))

    def contains(self, head: Head) -> bool:
        """Whether the log once ended with this head."""
        if head.sequence == 0:
            return head == start_of(self.name)
        return (self._recent.get(head.sequence) or self._hash(head.sequence)) == head.hash

    def _hash(self, sequence: int) -> str:
        for path in reversed(segments(self.folder)):
            if int(path.stem) <= sequence:
                with path.open("rb") as file:
                    for number, line in enumerate(file, int(path.stem)):
                        if number == sequence and line.endswith(b"\n"):
                            return hashlib.sha256(line[:-1]).hexdigest()
                break
        return ""

    def _follow(self) -> bytes:
        """Be at the end of the log, with the key of now; the torn line that was found there."""
        last = segments(self.folder)[-1:]
        if self._key() is not self._signs or (last and last[0] != self._chain.path):
            self._signs = self._key()
            self._chain = self._last()
        return self._chain.refresh()

    def _last(self) -> Chain:
        files = segments(self.folder)
        if not files:
            return self._chain_at(1, start_of(self.name))
        return self._chain_at(int(files[-1].stem), _start(files[-1], files, self.name))

    def _chain_at(self, first: int, start: Head) -> Chain:
        return Chain(self.folder / f"{first:012}.jsonl", self.name, self._signs, tuple(self._keys()), start)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process writes meanwhile."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def segments(folder: Path) -> list[Path]:
    """The files of an audit log, in order."""
    return sorted(path for path in folder.glob("*.jsonl") if path.stem.isdecimal())


def verify(
    folder: Path,
    name: str,
    keys: Sequence[Ed25519PublicKey],
    witnessed: Sequence[Head] = (),
    earlier: Sequence[Ed25519PublicKey] = (),
) -> Head:
    """The log's head, once every entry was checked, and that it contains every head in `witnessed`. Raises as
    `chain.verify`."""
    return chain.verify(segments(folder) or folder / "000000000001.jsonl", name, keys, witnessed, earlier)


def _start(path: Path, files: Sequence[Path], name: str) -> Head:
    """The head that the first line of a file follows."""
    before = [one for one in files if one < path]
    if not before:
        return start_of(name)
    with before[-1].open("rb") as file:
        number, last = int(before[-1].stem) - 1, b""
        for line in file:
            number, last = number + 1, line
    if not last.endswith(b"\n") or number + 1 != int(path.stem):
        raise IntegrityError(f"{before[-1]}: entry {number + 1} is missing; the log was cut")
    return Head(number, hashlib.sha256(last[:-1]).hexdigest())


def _fitted(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """A body that fits into a line: of a longer one what is short of it, and the digest of the whole."""
    content = canonical(body)
    if len(content) <= LONGEST_BODY:
        return body
    short = {key: value for key, value in body.items() if len(canonical({key: value})) < 1000}
    return {**short, "cut": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
