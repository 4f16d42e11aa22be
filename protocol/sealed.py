"""Files that are encrypted at rest: AES-256-GCM in chunks, so that any part can be read without the whole.

    "CSE1" | salt, 32 random bytes | chunk 0 | chunk 1 | ... | last chunk

Each file has a key of its own, HKDF-SHA256 of the folder's data key, the salt, and the purpose that the file serves; so
no nonce is ever used twice with a key, and a file put in another's place does not open. This is the STREAM construction
(Hoang, Reyhanitabar, Rogaway, Vizar: Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance, CRYPTO
2015, section 7): a chunk's nonce is a prefix, 7 bytes that HKDF gives with the key, its number, 4 bytes, and whether it
is the last, 1 byte. A chunk that was changed, moved, left out or cut off is refused.

The data key lies in the folder, wrapped under what the private keys are encrypted under (`protocol/keys.py`): a key
file elsewhere, or a passphrase.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.files import write_private
from consortium.protocol.keys import Lock

CHUNK = 1 << 20
"""Bytes of content in each chunk but the last."""
DATA_KEY = "data.key"

Piece = bytes | bytearray | memoryview

_MAGIC, _SALT, _TAG, _KEY = b"CSE1", 32, 16, 32
_START = len(_MAGIC) + _SALT
_WRAPPING = b"consortium data key 1 "


@dataclass(frozen=True)
class DataKey:
    """32 bytes that files are encrypted under. Its `repr` does not show it."""

    secret: bytes

    def __repr__(self) -> str:
        return "DataKey(...)"

    def of(self, purpose: str) -> DataKey:
        """A key for one purpose alone: who holds it opens nothing else."""
        return DataKey(_derived(self.secret, b"", b"consortium key of " + purpose.encode(), _KEY))


def new_data_key() -> DataKey:
    """A fresh key, from the operating system's randomness."""
    return DataKey(secrets.token_bytes(_KEY))


def data_key(path: Path, lock: Lock, *, make: bool = True) -> DataKey:
    """The data key that a file holds, wrapped under `lock`; made where it is missing and `make` says so.

    Raises:
        InputError: the file is missing or cannot be read.
        IntegrityError: it is damaged, or the lock is not its.
    """
    if make and not path.exists():
        key = new_data_key()
        _wrap(path, key, lock)
        return key
    try:
        try:
            return DataKey(bytes(read(path, _wrapping(lock.secret))))
        except IntegrityError:
            if not lock.former:
                raise
            key = DataKey(bytes(read(path, _wrapping(lock.former))))
            _wrap(path, key, lock)  # it is of an earlier version
            return key
    except IntegrityError as error:
        raise IntegrityError(
            f"{path}: cannot be opened; the key file or passphrase is not the one that it was written with, or it is "
            "damaged: restore it from a backup"
        ) from error


def _wrapping(secret: bytes) -> DataKey:
    return DataKey(hashlib.sha256(_WRAPPING + secret).digest())


def _wrap(path: Path, key: DataKey, lock: Lock) -> None:
    write_private(path, b"".join(map(bytes, sealing([key.secret], _wrapping(lock.secret)))))


def sealed_file(path: Path) -> bool:
    """Whether a file begins as a sealed one does."""
    with path.open("rb") as file:
        return is_sealed(file.fileno())


def is_sealed(fd: int) -> bool:
    """Whether an open file begins as a sealed one does."""
    return os.pread(fd, len(_MAGIC), 0) == _MAGIC


def read(path: Path, key: DataKey) -> bytearray:
    """The content of a sealed file.

    Raises:
        InputError: it is missing or cannot be read.
        IntegrityError: it is not as it was written, or of another key.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore it from a backup") from error
    try:
        return Sealed(fd, key, str(path)).read()
    finally:
        os.close(fd)


def sealing(pieces: Iterable[Piece], key: DataKey) -> Iterator[Piece]:
    """The bytes of a sealed file with this content, in order. What is yielded is overwritten by the next."""
    sealer = Sealer(key)
    for piece in pieces:
        yield from sealer.take(piece)
    yield sealer.end()


def seal(content: Piece, key: DataKey) -> bytes:
    """A small content as a sealed file has it."""
    return b"".join(map(bytes, sealing([content], key)))


def unseal(sealed: bytes, key: DataKey, what: str) -> bytes:
    """The content that `seal` took. what: how errors name it.

    Raises:
        IntegrityError: it is not as it was made, or of another key.
    """
    if len(sealed) < _START + _TAG or not sealed.startswith(_MAGIC):
        raise IntegrityError(f"{what}: is not encrypted as format 1 has it, or ends too early")
    cipher, prefix = _cipher(key, sealed[len(_MAGIC) : _START])
    starts = range(_START, len(sealed), CHUNK + _TAG)
    try:
        return b"".join(
            cipher.decrypt(
                _nonce(prefix, number, last=start == starts[-1]), sealed[start : start + starts.step], None
            )
            for number, start in enumerate(starts)
        )
    except (InvalidTag, ValueError) as error:
        raise IntegrityError(
            f"{what}: cannot be decrypted; it was changed, is not whole, or belongs to another key"
        ) from error


class Sealer:
    """Makes the bytes of one sealed file, of content that comes by and by: of each `take` and then `end`, in order."""

    def __init__(self, key: DataKey) -> None:
        salt = secrets.token_bytes(_SALT)
        self._cipher, self._prefix = _cipher(key, salt)
        self._out = memoryview(b"")
        self._start, self._number = _MAGIC + salt, 0
        self._kept = bytearray()  # the last chunk is kept back, full or not

    def take(self, piece: Piece) -> Iterator[Piece]:
        """What can be written now that this content came. What is yielded is overwritten by the next."""
        if self._start:
            yield self._start
            self._start = b""
        view, kept = memoryview(piece).cast("B"), self._kept
        while view:
            if not kept and len(view) > CHUNK:
                yield self._chunk(view[:CHUNK], last=False)
                view = view[CHUNK:]
                continue
            if len(kept) == CHUNK:
                yield self._chunk(kept, last=False)
                kept.clear()
                continue
            taken = CHUNK - len(kept)
            kept += view[:taken]
            view = view[taken:]

    def end(self) -> Piece:
        """The rest of the file."""
        start, self._start = self._start, b""
        rest = self._chunk(self._kept, last=True)
        return start + bytes(rest) if start else rest

    def _chunk(self, content: Piece, *, last: bool) -> Piece:
        length = len(content) + _TAG
        if len(self._out) < length:  # the only chunk of a small file, or the first of several
            self._out = memoryview(bytearray(length))
        out = self._out[:length]
        self._cipher.encrypt_into(_nonce(self._prefix, self._number, last=last), content, None, out)
        self._number += 1
        return out


class Sealed:
    """A sealed file that is open, to read. size: bytes of its content. It does not close `fd`.

    what: how errors name it.

    Raises:
        IntegrityError: it is none.
    """

    def __init__(self, fd: int, key: DataKey, what: str = "a sealed file") -> None:
        self._fd, self._what = fd, what
        length = os.fstat(fd).st_size - _START
        start = os.pread(fd, _START, 0)
        if len(start) < _START or not start.startswith(_MAGIC) or length < _TAG:
            raise IntegrityError(f"{what}: is no encrypted file of format 1, or ends too early")
        self._chunks = max(1, -(-length // (CHUNK + _TAG)))
        self.size = length - self._chunks * _TAG
        self._cipher, self._prefix = _cipher(key, start[len(_MAGIC) :])

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """Content from `start` to `stop`, in order. A piece is overwritten by the next.

        Raises:
            IntegrityError: the file is not as it was written.
        """
        stop = self.size if stop is None else min(stop, self.size)
        most = min(CHUNK, self.size)
        buffer, sealed = memoryview(bytearray(most)), memoryview(bytearray(most + _TAG))
        for number in range(start // CHUNK, self._chunks):
            first = number * CHUNK
            if first >= stop and number:
                return
            view = self._chunk(number, sealed, buffer)
            yield view[max(0, start - first) : stop - first]

    def read(self) -> bytearray:
        """All of the content. Raises as `pieces`."""
        content, place = bytearray(self.size), 0
        for piece in self.pieces():
            content[place : place + len(piece)] = piece
            place += len(piece)
        return content

    def _chunk(self, number: int, sealed: memoryview, buffer: memoryview) -> memoryview:
        """The content of a chunk, in `buffer`. Both are used again for each: fresh memory costs more than AES."""
        count = os.preadv(self._fd, [sealed], _START + number * (CHUNK + _TAG))
        nonce = _nonce(self._prefix, number, last=number == self._chunks - 1)
        out = buffer[: max(0, count - _TAG)]
        try:
            self._cipher.decrypt_into(nonce, sealed[:count], None, out)
        except (InvalidTag, ValueError) as error:
            raise IntegrityError(
                f"{self._what}: cannot be decrypted; it was changed, is not whole, or belongs to another key"
            ) from error
        return out


def _cipher(key: DataKey, salt: bytes) -> tuple[AESGCM, bytes]:
    derived = _derived(key.secret, salt, b"consortium sealed file 1", _KEY + 7)
    return AESGCM(derived[:_KEY]), derived[_KEY:]


def _derived(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(SHA256(), length, salt or None, info).derive(secret)


def _nonce(prefix: bytes, number: int, *, last: bool) -> bytes:
    return prefix + number.to_bytes(4, "big") + bytes([last])
