"""An append-only log that shows what was done to it: JSON lines, hash-chained, signed by their owner, format 1.

    {"at":…,"body":{…},"format":1,"kind":"…","previous":"…","sequence":1,"signature":"…"}

Each line is canonical JSON. `previous` is the SHA-256 of the whole line before, signature included; of the first
line it is that of the chain's name, so that one chain cannot be shown as another. The signature (Ed25519) is over the
line without its signature. So the last line's signature covers everything before it, and a change of any byte is found
at the line where it was made.

The holder of the key can still cut the end off, or write another history and sign it. Against that the other side
keeps heads: it signs each head that it is shown (`countersign`), and `verify` finds a chain that does not contain a
head which was countersigned. What is found is named as precisely as the heads allow.

Here is what a chain is, and how anybody checks one; its owner adds to it by `protocol/chain_writer.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.messages import canonical
from consortium.protocol.signing import CHAIN, HEAD, sign
from consortium.protocol.signing import verify as verify_signature

FORMAT = 1
MAX_LINE = 1 << 18
"""Bytes of a line."""
_FIELDS = {"at", "body", "format", "kind", "previous", "sequence", "signature"}


@dataclass(frozen=True, order=True)
class Head:
    """The end of a chain: the number of its last entry (0: none) and the SHA-256 (hex) of that line."""

    sequence: int
    hash: str

    @property
    def text(self) -> str:
        """As it travels: "17:9f86d081…"."""
        return f"{self.sequence}:{self.hash}"

    @staticmethod
    def parse(text: str) -> Head:
        """A head from its text.

        Raises:
            IntegrityError: it is none.
        """
        number, _, digest = text.partition(":")
        sound = number.isascii() and number.isdigit() and len(number) < 16 and str(int(number)) == number
        if not sound or not _is_hex(digest, 64):
            raise IntegrityError("chain: the head of a chain was expected")
        return Head(int(number), digest)


@dataclass(frozen=True)
class Entry:
    """One line. at: seconds since the epoch, by its owner's clock. body: plain values. hash: of the line, in hex."""

    sequence: int
    at: float
    kind: str
    body: Mapping[str, Any]
    previous: str
    signature: str
    hash: str

    @property
    def head(self) -> Head:
        """The chain's head when this was its last entry."""
        return Head(self.sequence, self.hash)


@dataclass(frozen=True)
class Witness:
    """A head, signed by one who was shown it. signature: hex, over the chain's name and the head."""

    head: Head
    signature: str


def start_of(name: str) -> Head:
    """The head of the empty chain of that name."""
    return Head(0, hashlib.sha256(b"consortium/1 chain " + name.encode()).hexdigest())


def countersign(key: Ed25519PrivateKey, name: str, head: Head) -> Witness:
    """Sign a head of somebody's chain: who does so has seen it, and keeps it to compare."""
    return Witness(head, sign(key, HEAD, _shown(name, head)).hex())


def check_witness(key: Ed25519PublicKey, name: str, witness: Witness) -> None:
    """Returns where `key` countersigned that head of the chain of that name.

    Raises:
        IntegrityError: it did not.
    """
    signature = bytes.fromhex(witness.signature) if _is_hex(witness.signature, 128) else b""
    verify_signature(key, HEAD, _shown(name, witness.head), signature)


def _shown(name: str, head: Head) -> bytes:
    return canonical({"format": FORMAT, "chain": name, "sequence": head.sequence, "hash": head.hash})


def verify(
    paths: Path | Sequence[Path],
    name: str,
    keys: Sequence[Ed25519PublicKey],
    witnessed: Sequence[Head] = (),
    earlier: Sequence[Ed25519PublicKey] = (),
) -> Head:
    """The head of a chain of which everything was checked, and which contains every head in `witnessed`.

    paths: its file, or its files in order. keys: any of them may have signed; of a chain that went on under other keys,
    those of its end, and `earlier` those of before. A missing file is an empty chain.

    Raises:
        IntegrityError: naming the first entry that is not as it was written; or the first one that was, or may have
            been, rewritten or cut off, where the chain is sound in itself but lacks a head that was witnessed.
        InputError: the file cannot be read.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    path = files[-1] if files else Path(name)
    head, line = start_of(name), b""
    wanted = {one.sequence: one for one in sorted(witnessed)}
    if len(wanted) < len(set(witnessed)):
        one = _twice(witnessed)
        raise IntegrityError(f"{path}: entry {one} was shown with two contents: its owner's log was forked")
    seen: dict[int, str] = {0: head.hash}
    for file in files:
        found = Scan(file, head, 0, (*keys, *earlier))
        found.line = line
        for entry in found.read():
            if entry.sequence in wanted:
                seen[entry.sequence] = entry.hash
        head, line = found.head, found.line
    if line:
        check_signatures(files, name, keys, (*keys, *earlier), head, line)
    for last, number in pairwise([0, *sorted(wanted)]):
        if number > head.sequence:
            raise IntegrityError(
                f"{path}: entry {head.sequence + 1} is missing; the log has {head.sequence} entries, and "
                f"the other side has seen {max(wanted)}: it was cut, or an old copy was put back"
            )
        if seen[number] != wanted[number].hash:
            which = f"entry {number}" if last + 1 >= number else f"one of the entries {last + 1} to {number}"
            raise IntegrityError(
                f"{path}: {which} is not the one that the other side has seen: the log was rewritten by the holder of "
                "its key"
            )
    return head


def entries(
    paths: Path | Sequence[Path], name: str, after: int = 0, start: Head | None = None
) -> Iterator[Entry]:
    """The entries of a chain with a number above `after`, in order, checked as far as hashes go; `verify` checks all.

    start: the head that they follow, where that is not the chain's beginning.

    Raises:
        IntegrityError, InputError: as `verify`.
    """
    head = start or start_of(name)
    for path in [paths] if isinstance(paths, Path) else paths:
        found = Scan(path, head, 0)
        for entry in found.read():
            if entry.sequence > after:
                yield entry
        head = found.head


def lines(path: Path, after: int = 0) -> list[bytes]:
    """The entries with a number above `after` as they are written, without line ends: what another side checks.

    Raises:
        InputError: the file cannot be read.
    """
    if not path.exists():
        return []
    with opened(path) as file:
        whole = [line[:-1] for line in file if line.endswith(b"\n")]
    return [line for line in whole if int(json.loads(line)["sequence"]) > after]


def continued(given: Sequence[bytes], head: Head, keys: Sequence[Ed25519PublicKey], what: str) -> list[Entry]:
    """The entries of the lines `given`, which follow `head` in somebody's chain, each checked.

    what: names the chain in errors.

    Raises:
        IntegrityError: naming the first that is not signed by a key of `keys`, or does not follow.
    """
    scan, found = Scan(Path(what), head, 0, keys), []
    for line in given:
        entry = scan.entry(line + b"\n")
        if not _signed(keys, line):
            raise IntegrityError(f"{what}: entry {entry.sequence} is not signed by its owner")
        scan.head, scan.line = entry.head, line
        found.append(entry)
    return found


class Scan:
    """A walk over lines: the head so far, the last line, and where it ends. keys: tell which of two lines is wrong."""

    def __init__(self, path: Path, head: Head, end: int, keys: Sequence[Ed25519PublicKey] = ()) -> None:
        self.path, self.head, self.end, self.line, self.keys = path, head, end, b"", keys

    def read(self) -> Iterator[Entry]:
        """All that the file holds; nothing where there is none."""
        if self.path.exists():
            with opened(self.path) as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                size = os.fstat(file.fileno()).st_size
                fcntl.flock(file, fcntl.LOCK_UN)  # whoever reads slowly must not hold up the owner
                yield from self.over(file, size)

    def over(self, file: BinaryIO, size: int | None = None) -> Iterator[Entry]:
        """What follows, up to `size` bytes of the file where that is given."""
        with os.fdopen(os.dup(file.fileno()), "rb") as buffered:
            buffered.seek(self.end)
            while (size is None or self.end < size) and (line := buffered.readline(MAX_LINE + 1)):
                if not line.endswith(b"\n"):
                    if len(line) > MAX_LINE:
                        raise self._bad("is longer than a line can be")
                    return  # torn by a crash, never acknowledged
                entry = self.entry(line)
                self.head, self.end, self.line = entry.head, self.end + len(line), line
                yield entry

    def entry(self, line: bytes) -> Entry:
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict) or set(fields) != _FIELDS or canonical(fields) != line[:-1]:
                raise self._bad("is not as it was written")
            entry = Entry(
                fields["sequence"], fields["at"], fields["kind"], fields["body"], fields["previous"],
                fields["signature"], hashlib.sha256(line[:-1]).hexdigest(),
            )  # fmt: skip
        except (ValueError, RecursionError) as error:
            raise self._bad("is not as it was written") from error
        if type(fields["format"]) is not int or fields["format"] != FORMAT:
            raise self._bad(f"has a format that this version does not know ({str(fields['format'])[:20]})")
        typed = (
            type(fields["sequence"]) is int
            and isinstance(fields["at"], int | float)
            and isinstance(fields["kind"], str)
            and isinstance(fields["body"], dict)
            and _is_hex(entry.signature, 128)
        )
        if not typed or entry.sequence != self.head.sequence + 1:
            raise self._bad("is not as it was written, or not in its place")
        if entry.previous != self.head.hash:
            raise self._broken(line)
        return entry

    def _broken(self, line: bytes) -> IntegrityError:
        """The link between two lines does not hold: the one whose signature fails was changed."""
        number = self.head.sequence
        if not number and (not self.keys or _signed(self.keys, line)):
            return self._bad(
                "does not begin this log: it is another's, or the entries before it were removed"
            )
        if number and (not self.keys or not _signed(self.keys, self.line)):
            return IntegrityError(
                f"{self.path}: entry {number} is not as it was written (entry {number + 1} names another before it)"
            )
        return self._bad("is not as it was written")

    def _bad(self, what: str) -> IntegrityError:
        return IntegrityError(f"{self.path}: entry {self.head.sequence + 1} {what}")


def check_signatures(
    paths: Sequence[Path],
    name: str,
    keys: Sequence[Ed25519PublicKey],
    every: Sequence[Ed25519PublicKey],
    head: Head,
    last: bytes,
) -> None:
    """The last signature covers all lines; only where it fails, the first bad one is looked for.

    keys: may have signed the last line; every: any line.

    Raises:
        IntegrityError: naming the first entry that no key of `every` signed.
    """
    if _signed(keys, last):
        return
    number = head.sequence
    for line in (line for path in paths if path.exists() for line in opened(path)):
        if line.endswith(b"\n") and not _signed(every, line):
            number = int(json.loads(line)["sequence"])
            break
    raise IntegrityError(f"{paths[-1]}: entry {number} is not signed by the owner of '{name}'")


def _signed(keys: Sequence[Ed25519PublicKey], line: bytes) -> bool:
    fields = json.loads(line)
    signature = bytes.fromhex(fields.pop("signature"))
    content = canonical(fields)
    for key in keys:
        with contextlib.suppress(IntegrityError):
            verify_signature(key, CHAIN, content, signature)
            return True
    return False


def opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error


def _is_hex(text: object, length: int) -> bool:
    return isinstance(text, str) and len(text) == length and not set(text) - set("0123456789abcdef")


def _twice(heads: Sequence[Head]) -> int:
    found: dict[int, str] = {}
    for head in heads:
        if found.setdefault(head.sequence, head.hash) != head.hash:
            return head.sequence
    return 0
