"""A site's word that its folder was restored: where its audit log goes on, in place of the entries that were lost.

A new epoch of its log. The site signs it with its identity key, and names the last entry that the server had seen, so
that it counts once; the server, which has to agree, notes it in its own log and signs the same text. From then on it
expects what follows `kept`. Ledger and decisions have no such epochs: they go on only whole.

On the wire it is {"statement": text, "signature": hex}, by either side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.protocol import statement
from consortium.protocol.chain import Head
from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import canonical
from consortium.protocol.signing import SITE_EPOCH

FORMAT = 1
MAX_STATEMENT = 2048
"""Characters of a statement's text."""
_WHAT = "the statement of a site's restore"


@dataclass(frozen=True)
class Restored:
    """at: seconds since the epoch, by the site's clock. Heads of the site's audit log:

    lost: the last one that the server has seen. kept: the last one that both have, of entry 0 where they share none.
    now: where it ends, from which it goes on.
    """

    federation: str
    site: str
    at: float
    lost: Head
    kept: Head
    now: Head


def state(key: Ed25519PrivateKey, one: Restored) -> dict[str, str]:
    """The statement, signed by the site, or countersigned by the server."""
    text = canonical(
        {
            "format": FORMAT, "federation": one.federation, "site": one.site, "at": one.at, "lost": one.lost.text,
            "kept": one.kept.text, "now": one.now.text,
        }
    )  # fmt: skip
    return statement.signed(key, SITE_EPOCH, text)


def verified(
    document: Mapping[str, Any], keys: Sequence[Ed25519PublicKey], federation: str, site: str
) -> Restored:
    """What a statement says, after its signature was found to be that of one of the keys.

    Raises:
        IntegrityError: it is not, it is another site's, or malformed.
    """
    content = statement.content(document, keys, SITE_EPOCH, MAX_STATEMENT, _WHAT)
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise IntegrityError(f"{_WHAT}: its format is not known here")
        if (fields["federation"], fields["site"]) != (federation, site):
            raise IntegrityError(f"{_WHAT}: it is of another site")
        at = float(fields["at"])
        if not math.isfinite(at):
            raise ValueError
        heads = [Head.parse(fields[name]) for name in ("lost", "kept", "now")]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise IntegrityError(f"{_WHAT}: it is malformed") from error
    return Restored(federation, site, at, *heads)
