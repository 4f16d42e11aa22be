"""Adding to a chain (`protocol/chain.py`): its owner's side.

`append` returns once the entry survives a power cut. A crash leaves at most a torn last line, which was never
acknowledged and is cut away by the next `append`; readers pass over it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.protocol.chain import (
    FORMAT,
    MAX_LINE,
    Entry,
    Head,
    Scan,
    check_signatures,
    entries,
    opened,
    start_of,
)
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.files import sync_folder
from consortium.protocol.messages import canonical
from consortium.protocol.signing import CHAIN, sign


class Chain:
    """The log of its owner, at `path`; for any number of threads and processes, one appends at a time.

    name: what it is and whose, such as "audit hospitals site-1"; part of every hash.
    key: the owner's. earlier: public keys that the owner signed with before. start: the head that the first line in
    the file follows, where that is not the chain's beginning.

    Raises:
        IntegrityError: the log is damaged; the entry is named.
        InputError: it cannot be read.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        key: Ed25519PrivateKey,
        earlier: Sequence[Ed25519PublicKey] = (),
        start: Head | None = None,
    ) -> None:
        self.path, self.name, self._key = Path(path), name, key
        self._keys = (key.public_key(), *earlier)
        self._lock = threading.Lock()
        self._head, self._end, self._line = (
            start or start_of(name),
            0,
            b"",
        )  # the last line, and where it ends
        if self.path.exists():
            with opened(self.path) as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                self._catch_up(file)

    @property
    def head(self) -> Head:
        """The head as of the last `append` or opening."""
        return self._head

    @property
    def size(self) -> int:
        """Bytes of the whole lines, as of the last `append` or opening."""
        return self._end

    def append(self, kind: str, body: Mapping[str, Any], at: float, durable: bool = True) -> Head:
        """Add an entry; it is durable when this returns, or, if not `durable`, with the next one that is, or `sync`.

        Raises:
            IntegrityError: what others did to the file meanwhile is no continuation of it.
            InputError: the entry has more than `MAX_LINE` bytes, or holds something that JSON has not.
            OSError: it cannot be written; the log is as before.
        """
        with self._lock:
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._catch_up(file)
                line = self._next(kind, body, at)
                try:
                    os.ftruncate(descriptor, self._end)  # a torn line of an earlier crash
                    _write(descriptor, line, self._end)
                    if durable:
                        os.fsync(descriptor)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.ftruncate(descriptor, self._end)
                    raise
            if new:
                sync_folder(self.path.parent)
            self._head = Head(self._head.sequence + 1, hashlib.sha256(line[:-1]).hexdigest())
            self._end, self._line = self._end + len(line), line
            return self._head

    def refresh(self) -> bytes:
        """Take in what others appended; gives the torn last line that a crash left, which the next `append` removes.

        Raises:
            IntegrityError: as `append`.
        """
        with self._lock:
            if not self.path.exists():
                return b""
            with opened(self.path) as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                self._catch_up(file)
                file.seek(self._end)
                return file.read(MAX_LINE)

    def sync(self) -> None:
        """Make every entry durable."""
        with opened(self.path) as file:
            os.fsync(file.fileno())

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """The entries with a number above `after`, checked as far as hashes go."""
        return entries(self.path, self.name, after)

    def _next(self, kind: str, body: Mapping[str, Any], at: float) -> bytes:
        entry = {
            "format": FORMAT,
            "sequence": self._head.sequence + 1,
            "at": at,
            "kind": kind,
            "body": body,
            "previous": self._head.hash,
        }
        try:
            content = canonical(entry)
            line = canonical({**entry, "signature": sign(self._key, CHAIN, content).hex()}) + b"\n"
            same = json.loads(content) == entry
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"chain: an entry '{kind}' holds what JSON cannot: {error}") from error
        if not same:
            raise InputError(f"chain: an entry '{kind}' holds what would be read back otherwise")
        if len(line) > MAX_LINE:
            raise InputError(f"chain: an entry '{kind}' has {len(line)} bytes; at most {MAX_LINE} are kept")
        return line

    def _catch_up(self, file: BinaryIO) -> None:
        """Read what others appended since, and find that what was known is still there."""
        if self._line and os.pread(file.fileno(), len(self._line), self._end - len(self._line)) != self._line:
            raise IntegrityError(
                f"{self.path}: entry {self._head.sequence} is not what it was; the log was replaced or cut while it "
                "was in use"
            )
        file.seek(self._end)
        found = Scan(self.path, self._head, self._end, self._keys)
        for _ in found.over(file):
            pass
        if found.line:
            check_signatures([self.path], self.name, self._keys, self._keys, found.head, found.line)
            self._head, self._end, self._line = found.head, found.end, found.line


def _write(descriptor: int, content: bytes, at: int) -> None:
    left = memoryview(content)
    while left:
        count = os.pwrite(descriptor, left, at)
        left, at = left[count:], at + count
