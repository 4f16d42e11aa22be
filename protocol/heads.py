"""What server and site tell each other of their logs, so that either finds it where the other's was rolled back.

A statement says where its author's logs end now (`heads`), up to where it has seen the other's (`seen`, which is a
countersignature), and which of its own logs do not contain what the other has seen of them (`lacks`). A site's goes
with every poll and answer, the server's with every reply to a poll, so with every instruction. On the wire it is
{"statement": text, "signature": hex}: canonical JSON, signed by the site's identity key or the server's instruction
key.

The server's carries the nonce of the request that it replies to: it was made later than whatever the site knew when it
asked, so a lower head in it is a roll-back. A site's carries the time, which goes on with its log: answers and polls go
over two connections, and one that was overtaken is told by that from a roll-back.
"""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.protocol import statement
from consortium.protocol.chain import Head
from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import canonical
from consortium.protocol.signing import HEADS

FORMAT = 1
MAX_STATEMENT = 4096
"""Characters of a statement's text."""
AUDIT, LEDGER, APPROVALS = "audit", "ledger", "approvals"
"""The logs: a site has all three, the server an audit log."""
LOGS = {"site": {AUDIT, LEDGER, APPROVALS}, "server": {AUDIT}}

By = Literal["site", "server"]


@dataclass(frozen=True)
class Shown:
    """What one side says. epoch: of the server's memory (`protocol/epoch.py`), as its author knows it.

    at: seconds since the epoch, by its author's clock. heads, seen: by log.
    """

    by: By
    federation: str
    site: str
    nonce: str
    at: float
    epoch: int
    heads: Mapping[str, Head] = field(default_factory=dict)
    seen: Mapping[str, Head] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()


def state(key: Ed25519PrivateKey, shown: Shown) -> dict[str, str]:
    """The statement, signed."""
    text = canonical(
        {
            "format": FORMAT, "by": shown.by, "federation": shown.federation, "site": shown.site,
            "nonce": shown.nonce, "at": shown.at, "epoch": shown.epoch,
            "heads": {log: head.text for log, head in shown.heads.items()},
            "seen": {log: head.text for log, head in shown.seen.items()},
            "lacks": sorted(shown.lacks),
        }
    )  # fmt: skip
    return statement.signed(key, HEADS, text)


def verified(
    document: Mapping[str, Any], keys: Sequence[Ed25519PublicKey], by: By, federation: str, site: str
) -> Shown:
    """A statement, after its signature was found to be that of one of the keys.

    Raises:
        IntegrityError: it is not, it is another's, or malformed.
    """
    content = statement.content(document, keys, HEADS, MAX_STATEMENT, f"the {by}'s statement of its logs")
    other: By = "server" if by == "site" else "site"
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise IntegrityError(f"the {by}'s statement of its logs: its format is not known here")
        if [fields[name] for name in ("by", "federation", "site")] != [by, federation, site]:
            raise IntegrityError(
                f"the {by}'s statement of its logs: it is for another site, or of another side"
            )
        heads = {log: Head.parse(text) for log, text in fields["heads"].items() if log in LOGS[by]}
        seen = {log: Head.parse(text) for log, text in fields["seen"].items() if log in LOGS[other]}
        lacks = tuple(log for log in fields["lacks"] if log in LOGS[by])
        nonce, at, epoch = fields["nonce"], float(fields["at"]), fields["epoch"]
        if type(nonce) is not str or type(epoch) is not int:
            raise TypeError
        if not math.isfinite(at):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise IntegrityError(f"the {by}'s statement of its logs: it is malformed") from error
    return Shown(by, federation, site, nonce, at, epoch, heads, seen, lacks)


def packed(document: Mapping[str, str]) -> str:
    """A statement as a header of HTTP carries it."""
    return b64encode(json.dumps(document).encode()).decode()


def unpacked(text: str) -> dict[str, Any]:
    """A statement from a header.

    Raises:
        IntegrityError: it is none.
    """
    try:
        found = json.loads(b64decode(text, validate=True))
    except (ValueError, RecursionError) as error:
        raise IntegrityError("the statement of logs: it is malformed") from error
    if not isinstance(found, dict):
        raise IntegrityError("the statement of logs: it is malformed")
    return found


def behind(known: Head | None, shown: Head) -> str:
    """What is wrong where a log is said to end with `shown` and `known` was seen of it before; "" for nothing."""
    if known is None or shown.sequence > known.sequence or shown == known:
        return ""
    if shown.sequence == known.sequence:
        return f"entry {known.sequence} is not the one that was seen before: the log was forked"
    return (
        f"entry {shown.sequence + 1} is missing: the log ends with entry {shown.sequence}, and entry {known.sequence} "
        "was seen: it was rolled back to an older copy"
    )
