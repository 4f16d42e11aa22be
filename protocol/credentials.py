"""Certificates as files, and a private key with its certificate chain in one file.

One file, so that a renewal replaces both or neither: key (PKCS#8, encrypted as in `protocol/keys.py`), then the chain,
leaf first, all PEM. OpenSSL reads it as it is.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.files import write_private
from consortium.protocol.keys import Lock, load_ec, new_key_file

MAX_CHAIN = 32 * 1024
"""Bytes of a chain (PEM) that are read."""


def certificates(content: bytes, source: str) -> list[x509.Certificate]:
    """The certificates in a PEM text, at least one; `source` names it in errors.

    Raises:
        IntegrityError: there is none, or one of them is damaged.
    """
    if len(content) > MAX_CHAIN:
        raise IntegrityError(f"{source}: {len(content)} bytes are more than a certificate chain has")
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise IntegrityError(f"{source}: holds no certificate, or a damaged one") from error


def pem(chain: Sequence[x509.Certificate]) -> bytes:
    """Certificates as PEM text, in that order."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 (hex) of a certificate's DER."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def same_key(one: ec.EllipticCurvePublicKey, other: object) -> bool:
    """Whether both are the same public key."""
    if not isinstance(other, ec.EllipticCurvePublicKey):
        return False
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return one.public_bytes(*form) == other.public_bytes(*form)


def due(certificate: x509.Certificate, now: float) -> bool:
    """Whether two thirds of a certificate's life are over at `now` (seconds since the epoch): time to renew it."""
    begins = certificate.not_valid_before_utc.timestamp()
    return now >= begins + (certificate.not_valid_after_utc.timestamp() - begins) * 2 / 3


def valid_at(certificate: x509.Certificate, now: float) -> bool:
    """Whether `now` (seconds since the epoch) lies in a certificate's life."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begins.timestamp() <= now < ends.timestamp()


def common_name(certificate: x509.Certificate) -> str:
    """The common name of the subject, or ""."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def check_issued(chain: Sequence[x509.Certificate], root: x509.Certificate, source: str) -> None:
    """Returns where each certificate was issued by the next and the last one by `root`.

    When each is valid and what it may be used for is OpenSSL's to check, in every handshake.

    Raises:
        IntegrityError: that is not so.
    """
    for certificate, issuer in zip(chain, [*chain[1:], root], strict=True):
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise IntegrityError(f"{source}: was not issued by the federation's root certificate") from error


def lock_at(key_file: Path) -> Lock:
    """The lock of a key file, which is made where it is missing.

    Raises:
        InputError: it cannot be made or read.
    """
    try:
        return new_key_file(key_file)
    except OSError as error:
        raise InputError(
            f"{key_file}: the key file cannot be made ({error.strerror}); is its folder there, and may this user write "
            "to it?"
        ) from error


def save(path: Path, key: ec.EllipticCurvePrivateKey, chain: Sequence[x509.Certificate], lock: Lock) -> None:
    """Write a key, encrypted, and its chain (leaf first) in place of what was there."""
    protection = BestAvailableEncryption(lock.secret)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
    write_private(path, private + pem(chain))


def chain_in(path: Path) -> list[x509.Certificate]:
    """The certificates in a file, leaf first.

    Raises:
        InputError: it cannot be read.
        IntegrityError: it is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the certificate cannot be read ({error.strerror})") from error
    return certificates(content, str(path))


def load(path: Path, lock: Lock) -> tuple[ec.EllipticCurvePrivateKey, list[x509.Certificate]]:
    """Key and chain in a file.

    Raises:
        InputError: it cannot be read, or the lock is not its.
        IntegrityError: it is damaged, or the certificate is another key's.
    """
    key, chain = load_ec(path, lock), chain_in(path)
    if not same_key(key.public_key(), chain[0].public_key()):
        raise IntegrityError(f"{path}: the certificate is that of another key; restore it from a backup")
    return key, chain


def present(context: ssl.SSLContext, path: Path, lock: Lock) -> None:
    """Let `context` show the certificate in a file. Raises as `load`."""
    load(path, lock)  # its errors are for people, OpenSSL's are not
    context.load_cert_chain(path, password=lock.secret)
