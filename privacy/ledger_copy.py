"""The copy of a site's ledger that the server keeps, line by line, and cannot read.

With each head that a site shows go the lines that led to it, encrypted under a key which only the holder of the site's
identity key can make. So a ledger that was lost with its disk, or put back from an older copy, is made whole again
(`client/restoring.py`): what was spent is known, however old the backup of the site's folder is.

    AES-256-GCM: nonce, 12 random bytes | length, 4 bytes big-endian | line | zeros up to a multiple of `PADDING`

The name of the ledger and the line's number are authenticated with it, so that no line passes for another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from consortium.protocol.errors import IntegrityError

PADDING = 512
"""Bytes: a line's length would tell a charge from a budget, and how long a data set's name is."""
BATCH = 32
"""Lines that are sent at once, and `BATCH_BYTES` of them."""
BATCH_BYTES = 32 << 10
_NONCE, _LENGTH = 12, 4


def copy_key(identity: Ed25519PrivateKey) -> bytes:
    """The key of a site's copy, 32 bytes."""
    about = b"consortium/1 copy of a privacy ledger"
    return HKDF(SHA256(), 32, salt=None, info=about).derive(identity.private_bytes_raw())


def seal(key: bytes, name: str, number: int, line: bytes) -> bytes:
    """A line of the ledger of that name, without its line end, for the server to keep."""
    plain = len(line).to_bytes(_LENGTH, "big") + line
    plain += bytes(-len(plain) % PADDING)
    nonce = os.urandom(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plain, _about(name, number))


def opened(key: bytes, name: str, number: int, sealed: bytes) -> bytes:
    """The line.

    Raises:
        IntegrityError: it is not what this site sealed as the line of that number.
    """
    try:
        plain = AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], _about(name, number))
    except (InvalidTag, ValueError) as error:
        raise IntegrityError(
            f"ledger: the server's copy of entry {number} is not what this site gave it"
        ) from error
    return plain[_LENGTH : _LENGTH + int.from_bytes(plain[:_LENGTH], "big")]


def sealed_after(path: Path, key: bytes, name: str, number: int) -> Mapping[int, bytes]:
    """The lines of a ledger after that number, sealed; as many as are sent at once."""
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found: dict[int, bytes] = {}
    for at, line in enumerate(whole[number : number + BATCH], number + 1):
        one = seal(key, name, at, line)
        if found and sum(map(len, found.values())) + len(one) > BATCH_BYTES:
            break
        found[at] = one
    return found


def all_opened(key: bytes, name: str, first: int, sealed: Sequence[bytes]) -> list[bytes]:
    """As `opened`, of lines in order."""
    return [opened(key, name, number, one) for number, one in enumerate(sealed, first)]


def _about(name: str, number: int) -> bytes:
    return f"{name}\n{number}".encode()
