"""The trust statement: which keys may sign instructions in a federation, signed by its root.

On disk and on the wire it is {"statement": text, "signature": hex}; the text is canonical JSON. A later statement has
a higher serial, and whoever holds one accepts no lower one, so that a key that was replaced stays replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from consortium.protocol import signing
from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import canonical

FORMAT = 1
MAX_KEYS = 8
MAX_STATEMENT = 4096
"""Characters of a statement's text."""


@dataclass(frozen=True)
class Trust:
    """A statement that the root has signed.

    serial: 1 for a federation's first, one more with each rotation. issued: seconds since the epoch.
    keys: any of them may have signed an instruction; the newest first.
    """

    federation: str
    serial: int
    keys: tuple[Ed25519PublicKey, ...]
    issued: int


def state(
    root_key: ec.EllipticCurvePrivateKey,
    federation: str,
    serial: int,
    keys: Sequence[Ed25519PublicKey],
    issued: int,
) -> dict[str, str]:
    """A new statement, signed."""
    text = canonical(
        {
            "format": FORMAT,
            "federation": federation,
            "serial": serial,
            "instruction_keys": [signing.raw(key).hex() for key in keys],
            "issued": issued,
        }
    )
    return {"statement": text.decode(), "signature": signing.sign(root_key, signing.TRUST, text).hex()}


def verified(document: Mapping[str, Any], root: x509.Certificate, federation: str) -> Trust:
    """A statement, after its signature was found to be the root's, and its federation the expected one.

    Raises:
        IntegrityError: it is another's, malformed, or of a format that this version does not know.
    """
    text, signature = document.get("statement"), document.get("signature")
    key = root.public_key()
    if not isinstance(text, str) or not isinstance(signature, str) or len(text) > MAX_STATEMENT:
        raise IntegrityError("trust statement: it is malformed")
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IntegrityError("trust statement: the root certificate has a key of another kind than expected")
    try:
        given = bytes.fromhex(signature)
        content = text.encode()
    except ValueError as error:
        raise IntegrityError("trust statement: it is malformed") from error
    signing.verify(key, signing.TRUST, content, given)
    trust = _parsed(content)
    if trust.federation != federation:
        raise IntegrityError(
            f"trust statement: it is that of federation '{trust.federation[:80]}', not '{federation}'"
        )
    return trust


def _parsed(content: bytes) -> Trust:
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise IntegrityError("trust statement: its format is not known; is this version too old?")
        federation, serial = fields["federation"], fields["serial"]
        keys, issued = fields["instruction_keys"], fields["issued"]
        sound = (
            set(fields) == {"format", "federation", "serial", "instruction_keys", "issued"}
            and [type(one) for one in (federation, serial, keys, issued)] == [str, int, list, int]
            and serial >= 1
            and 1 <= len(keys) <= MAX_KEYS
            and all(isinstance(one, str) for one in keys)
        )
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError("trust statement: it is malformed") from error
    if not sound:
        raise IntegrityError("trust statement: it is malformed")
    return Trust(federation, serial, tuple(signing.public_key(one) for one in keys), issued)
