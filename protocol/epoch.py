"""The epoch of a server's memory: a restore from a backup begins a new one, and every site is told, signed.

What a restored server remembers ends with the backup, while its sites remember what came after. In a new epoch a site
lets the server ask again for rounds that it has seen already; a server of an earlier epoch than the site has seen is an
old copy that somebody started, and the site refuses it. Epoch 0 is that of a server which was never restored; a later
one has the second of its restore as its number, so that two restores of one backup are told apart.

On the wire it is {"statement": text, "signature": hex}; the text is canonical JSON, signed by the instruction key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.protocol import statement
from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import canonical
from consortium.protocol.signing import EPOCH

FORMAT = 1
MAX_STATEMENT = 1024
"""Characters of a statement's text."""


def state(key: Ed25519PrivateKey, federation: str, site: str, epoch: int) -> dict[str, str]:
    """A statement for one site, signed."""
    text = canonical({"format": FORMAT, "federation": federation, "site": site, "epoch": epoch})
    return statement.signed(key, EPOCH, text)


def verified(
    document: Mapping[str, Any], keys: Sequence[Ed25519PublicKey], federation: str, site: str
) -> int:
    """The epoch of a statement, after its signature was found to be that of one of the keys.

    Raises:
        IntegrityError: it is not, it is for somebody else, or it is malformed.
    """
    content = statement.content(document, keys, EPOCH, MAX_STATEMENT, "statement of the epoch")
    fields = json.loads(content)
    epoch = fields.get("epoch")
    if fields != {"format": FORMAT, "federation": federation, "site": site, "epoch": epoch}:
        raise IntegrityError(
            "statement of the epoch: it is for another site or federation, or of another format"
        )
    if type(epoch) is not int or epoch < 0:
        raise IntegrityError("statement of the epoch: it is malformed")
    return epoch
