"""Signatures: Ed25519 (RFC 8032) for sites, instructions and answers; ECDSA P-256 with SHA-256 for the root.

What is signed always starts with its purpose, so that a signature made for one thing is none for another.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from consortium.protocol.errors import IntegrityError

INSTRUCTION, ANSWER, TRUST, JOIN = "instruction", "answer", "trust", "join"
CHAIN, HEAD, MODEL, ENDINGS, EPOCH, GATE, DELIVERY, APPROVAL, MEMBER, HEADS, EVIDENCE, SITE_EPOCH = (
    "chain", "head", "model", "endings", "epoch", "gate", "delivery", "approval", "member", "heads", "evidence",
    "epoch of a site",
)  # fmt: skip
"""The purposes."""
SIGNATURE_BYTES = 64
"""The length of an Ed25519 signature."""


def _content(purpose: str, content: bytes) -> bytes:
    return b"consortium/1 " + purpose.encode() + b"\0" + content


def sign(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, purpose: str, content: bytes) -> bytes:
    """The signature over `content` for `purpose`; 64 bytes by an Ed25519 key, DER by an elliptic-curve key."""
    if isinstance(key, Ed25519PrivateKey):
        return key.sign(_content(purpose, content))
    return key.sign(_content(purpose, content), ec.ECDSA(hashes.SHA256()))


def verify(
    key: Ed25519PublicKey | ec.EllipticCurvePublicKey, purpose: str, content: bytes, signature: bytes
) -> None:
    """Returns where `signature` was made by `key` over `content` for `purpose`.

    Raises:
        IntegrityError: it was not.
    """
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, _content(purpose, content))
        else:
            key.verify(signature, _content(purpose, content), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise IntegrityError(f"the signature of the {purpose} is not that of the expected key") from error


def raw(key: Ed25519PublicKey) -> bytes:
    """The 32 bytes of a public key."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 (hex) of the 32 bytes of a public key: what people compare."""
    return hashlib.sha256(raw(key)).hexdigest()


def public_key(text: str) -> Ed25519PublicKey:
    """A public key from the hex of its 32 bytes.

    Raises:
        IntegrityError: the text is none.
    """
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    except ValueError as error:
        raise IntegrityError("an Ed25519 public key was expected") from error
