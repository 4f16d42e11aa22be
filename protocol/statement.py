"""A signed statement in JSON: {"statement": text, "signature": hex}, signed by a key of the trust statement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.protocol.errors import IntegrityError
from consortium.protocol.signing import sign, verify


def signed(key: Ed25519PrivateKey, purpose: str, text: bytes) -> dict[str, str]:
    """The statement of a canonical text, for that purpose."""
    return {"statement": text.decode(), "signature": sign(key, purpose, text).hex()}


def content(
    document: Mapping[str, Any], keys: Sequence[Ed25519PublicKey], purpose: str, most: int, what: str
) -> bytes:
    """The text of a statement, not parsed yet, after its signature was found to be that of one of the keys.

    most: characters that the text may have. what: its name in errors, such as "statement of the epoch".

    Raises:
        IntegrityError: it is not, or it is malformed.
    """
    text, signature = document.get("statement"), document.get("signature")
    if not isinstance(text, str) or not isinstance(signature, str) or len(text) > most:
        raise IntegrityError(f"{what}: it is malformed")
    try:
        found, given = text.encode(), bytes.fromhex(signature)
    except ValueError as error:
        raise IntegrityError(f"{what}: it is malformed") from error
    for key in keys:
        with suppress(IntegrityError):
            verify(key, purpose, found, given)
            return found
    raise IntegrityError(f"{what}: it is not signed by a key of the trust statement")
