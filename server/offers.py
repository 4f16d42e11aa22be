"""What the table between sites and runs (`server/exchange.py`) holds: offers, answers, and files without a name."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from consortium.protocol import wire
from consortium.protocol.files import MEMORY, working_file, written_over
from consortium.protocol.sealed import DataKey, Sealed

SLACK = 1.05
"""How much larger than one travelling vector an answer's content may be, beside 1 MiB for its counts."""


class Spooled:
    """A file without a name, on disk: nothing is left of it when nobody refers to it any more.

    fd: its descriptor; whoever hands it on duplicates it. key: what it is encrypted under, None where it is not.
    """

    def __init__(self, fd: int, key: DataKey | None = None) -> None:
        self.fd, self._key = fd, key
        self._closed = weakref.finalize(self, os.close, fd)

    @classmethod
    def new(cls, folder: Path, size: int = 0) -> Spooled:
        """An empty one for `size` bytes: in memory where they are few, else on the disk of `folder`."""
        return cls(working_file(folder, size))

    @property
    def reusable(self) -> bool:
        """Whether writing it over spares much: it is large, and so on disk."""
        return self._key is None and os.fstat(self.fd).st_size > MEMORY

    def over(self, size: int) -> Spooled:
        """The same file, to be written over with `size` bytes."""
        written_over(self.fd, size)
        return self

    def pieces(self, length: int) -> Iterator[bytes | memoryview]:
        """The first `length` bytes of the content; a piece is overwritten by the next.

        Raises:
            IntegrityError: the file is damaged.
        """
        if self._key is not None:
            yield from Sealed(self.fd, self._key, "the content of an instruction").pieces(0, length)
            return
        yield from wire.pieces(self.fd, length)


@dataclass(frozen=True)
class Offer:
    """One instruction for one site, signed. content: None where it has none; length: its bytes."""

    run: str
    site: str
    nonce: str
    header: bytes
    signature: bytes
    content: Spooled | None
    length: int
    largest: int


@dataclass(frozen=True)
class Closed:
    """An offer that was not answered before its round was closed."""

    run: str
    site: str
    kind: str
    round: int
    attempt: int


@dataclass(frozen=True)
class Received:
    """An answer that came, or why a site's cannot be used. content: a file, None where the answer has none."""

    site: str
    header: bytes = b""
    content: Spooled | None = None
    reason: str = ""
