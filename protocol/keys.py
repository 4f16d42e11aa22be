"""Private keys on disk: PKCS#8 PEM, encrypted (PBES2, AES-256) under a secret that lies elsewhere.

The secret is a key file that the configuration names, or a passphrase that a person types or the environment variable
CONSORTIUM_PASSPHRASE gives, stretched with a random salt that lies beside the keys. A copied folder without its key
file or passphrase gives nobody a key. It does not help against whoever can read both, or the memory of the running
program.
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
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
from consortium.protocol.files import sync_folder, write_private

FORMAT = 2
"""Of the salt's file; version 1 had the same salt everywhere, and no file."""
SALT = "passphrase.salt"
_FORMER_SALT = b"consortium passphrase 1"
_END = b"-----END ENCRYPTED PRIVATE KEY-----\n"
"""The last line of a key; certificates may follow."""
PASSPHRASE = "CONSORTIUM_PASSPHRASE"  # noqa: S105 - the name of a variable
PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Lock:
    """What private keys are encrypted under. Its `repr` does not show it.

    former: what an earlier version would have made of the same passphrase, b"" for none: a file that opens with it
    alone is encrypted anew when it is opened.
    """

    secret: bytes
    former: bytes = b""

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


def passphrase(folder: Path, environment: Mapping[str, str] = os.environ, *, new: bool = False) -> Lock:
    """The lock of a passphrase: from the environment, else typed (twice where it is new). folder: where the keys lie,
    and their salt, which is made where it is missing.

    Raises:
        InputError: there is none and nobody to ask, it is shorter than 12 characters, or the two differ; or the salt
            cannot be read.
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
    salt = _salt(folder / SALT)
    return Lock(_stretched(given, salt), b"" if new else _stretched(given, _FORMER_SALT))


def _stretched(text: str, salt: bytes) -> bytes:
    """Scrypt (RFC 7914) of a passphrase, so that guessing costs 64 MiB and a tenth of a second a try: the encryption of
    PKCS#8 files itself stretches hardly. The salt has each folder guessed at by itself."""
    return Scrypt(salt, 32, n=1 << 16, r=8, p=1).derive(text.encode()).hex().encode()


def _salt(path: Path) -> bytes:
    """The salt in a file, which is made, durably and once, where it is missing.

    Raises:
        InputError: it is damaged, or of a later format.
    """
    if not path.exists():
        made = path.with_name(f".{SALT}.{secrets.token_hex(4)}")
        write_private(made, json.dumps({"format": FORMAT, "salt": secrets.token_bytes(16).hex()}).encode())
        with suppress(FileExistsError):  # another program was faster, and may have used its own
            os.link(made, path)
        made.unlink()
        sync_folder(path.parent)
    try:
        found = json.loads(path.read_text(encoding="ascii"))
        if found["format"] != FORMAT or len(salt := bytes.fromhex(found["salt"])) != 16:
            raise ValueError
        return salt
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is damaged, cannot be read, or is of a later version; without it no key here can be opened: "
            "restore it from a backup"
        ) from error


def counts(path: Path) -> bool:
    """Whether a file is more than what an interrupted start leaves in a folder that is otherwise empty."""
    return not path.name.startswith(".") and path.name != SALT


def lock_from(key_file_path: str, folder: Path, environment: Mapping[str, str] = os.environ) -> Lock:
    """The lock that a configuration names: a key file's path, or "" for a passphrase of the keys in `folder`."""
    return key_file(Path(key_file_path)) if key_file_path else passphrase(folder, environment)


def save_key(path: Path, key: PrivateKey, lock: Lock) -> None:
    """Write a private key, encrypted, in place of what was there."""
    write_private(
        path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(lock.secret))
    )


def load_key(path: Path, lock: Lock) -> PrivateKey:
    """The private key in a file. One of an earlier version, under the lock's former secret, is written anew.

    Raises:
        InputError: the file is missing or damaged, or the lock is not its.
    """
    try:
        content = path.read_bytes()
        try:
            key = load_pem_private_key(content, lock.secret)
        except ValueError:
            if not lock.former:
                raise
            key = load_pem_private_key(content, lock.former)
            form = (Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(lock.secret))
            write_private(path, key.private_bytes(*form) + content.partition(_END)[2])
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
