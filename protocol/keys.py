"""Private keys on disk: PKCS#8 PEM, encrypted (PBES2, AES-256) under a secret that lies elsewhere.

The secret is a key file that the configuration names, or a passphrase that a person types or the environment variable
CONSORTIUM_PASSPHRASE gives. A copied folder without its key file or passphrase gives nobody a key. It does not help
against whoever can read both, or the memory of the running program.
"""

from __future__ import annotations

import getpass
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from consortium.protocol.errors import InputError
from consortium.protocol.files import write_private

PASSPHRASE = "CONSORTIUM_PASSPHRASE"  # noqa: S105 - the name of a variable
PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Lock:
    """What private keys are encrypted under. Its `repr` does not show it."""

    secret: bytes

    def __repr__(self) -> str:
        return "Lock(...)"


def new_key_file(path: Path) -> Lock:
    """Make a key file, mode 0600; one that is there already is used."""
    if not path.exists():
        write_private(path, secrets.token_hex(32).encode() + b"\n")
    return key_file(path)


def key_file(path: Path) -> Lock:
    """The lock of a key file.

    Raises:
        InputError: it is missing, or holds too little.
    """
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise InputError(
            f"{path}: the key file cannot be read ({error.strerror}); put it back, or correct `key_file` in the "
            "configuration"
        ) from error
    if not 32 <= len(secret) <= 1000:
        raise InputError(f"{path}: is no key file; it should hold 32 to 1000 characters")
    return Lock(secret)


def passphrase(environment: Mapping[str, str] = os.environ, *, new: bool = False) -> Lock:
    """The lock of a passphrase: from the environment, else typed (twice where it is new).

    Raises:
        InputError: there is none and nobody to ask, it is shorter than 12 characters, or the two differ.
    """
    given = environment.get(PASSPHRASE, "")
    if not given:
        if not sys.stdin.isatty():
            raise InputError(f"a passphrase is needed; set {PASSPHRASE}, or type it at a terminal")
        given = getpass.getpass("Passphrase of the private keys: ")
        if new and getpass.getpass("Once more: ") != given:
            raise InputError("the two passphrases differ; try again")
    if new and len(given) < 12:
        raise InputError("the passphrase is too short; at least 12 characters would be right")
    return Lock(_stretched(given))


def _stretched(text: str) -> bytes:
    """Scrypt (RFC 7914) of a passphrase, so that guessing costs 64 MiB and a tenth of a second a try: the encryption of
    PKCS#8 files itself stretches hardly. Each file adds a random salt of its own."""
    return Scrypt(b"consortium passphrase 1", 32, n=1 << 16, r=8, p=1).derive(text.encode()).hex().encode()


def lock_from(key_file_path: str, environment: Mapping[str, str] = os.environ) -> Lock:
    """The lock that a configuration names: a key file's path, or "" for a passphrase."""
    return key_file(Path(key_file_path)) if key_file_path else passphrase(environment)


def save_key(path: Path, key: PrivateKey, lock: Lock) -> None:
    """Write a private key, encrypted, in place of what was there."""
    write_private(
        path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(lock.secret))
    )


def load_key(path: Path, lock: Lock) -> PrivateKey:
    """The private key in a file.

    Raises:
        InputError: the file is missing or damaged, or the lock is not its.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), lock.secret)
    except OSError as error:
        raise InputError(f"{path}: the private key cannot be read ({error.strerror})") from error
    except (ValueError, TypeError) as error:  # TypeError: it is not encrypted at all
        raise InputError(
            f"{path}: cannot be decrypted; the key file or passphrase is not the one that it was written with"
        ) from error
    if not isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise InputError(f"{path}: holds a key of another kind than expected")
    return key


def load_ed25519(path: Path, lock: Lock) -> Ed25519PrivateKey:
    """As `load_key`, for a key that signs."""
    key = load_key(path, lock)
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: holds a key of another kind than Ed25519")
    return key


def load_ec(path: Path, lock: Lock) -> ec.EllipticCurvePrivateKey:
    """As `load_key`, for a key of a certificate."""
    key = load_key(path, lock)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path}: holds a key of another kind than an elliptic curve's")
    return key
