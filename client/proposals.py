"""What a site and the server tell each other before anything runs: proposals one way, decisions the other.

The agent looks when the server's notice says that there is something new. What `policy.toml` allows it approves by
itself, where the study waits for approvals; all else is the operator's (`client/review_cli.py`).
"""

from __future__ import annotations

import logging
import re
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.client import policy
from consortium.client.approvals import Approvals, made
from consortium.client.home import Home
from consortium.protocol import bundle as bundles
from consortium.protocol import chain, wire
from consortium.protocol.bundle import MAX_BUNDLE, Bundle
from consortium.protocol.chain import Head
from consortium.protocol.connection import Connection
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError

BY_POLICY = 400.0
"""Days for which the server is told that the policy allows a study; the policy itself is read at every instruction."""
MAX_PROPOSALS = 1 << 22
"""Bytes of the list of studies."""

_log = logging.getLogger("consortium.agent")
_DIGEST = re.compile("[0-9a-f]{64}")


def fetch(connection: Connection, approvals: Approvals) -> dict[str, Any]:
    """The server's studies: {"studies": [{"name", "digest", "bundle", "waits"}]}; notes what it saw of our decisions.

    Raises:
        ConsortiumError: it cannot be reached, or says what makes no sense.
    """
    document = connection.request("GET", wire.PROPOSALS).document(MAX_PROPOSALS)
    for one in wire.field(document, "studies", list):
        sound = isinstance(one, dict) and all(
            isinstance(one.get(key), str) for key in ("name", "digest", "bundle")
        )
        if not sound or not one["name"].isprintable() or not _DIGEST.fullmatch(one["bundle"]):
            raise IntegrityError("the server's list of studies is malformed")
    seen = wire.field(document, "approvals", list)
    if not all(isinstance(one, str) for one in seen):
        raise IntegrityError("the server's list of decisions is malformed")
    approvals.witnessed = tuple(Head.parse(one) for one in seen)
    return document


def bundle(connection: Connection, proposal: dict[str, Any]) -> Bundle:
    """The bundle of a proposal.

    Raises:
        IntegrityError: the server gives another one.
    """
    content = connection.request("GET", wire.STUDIES + str(proposal["digest"])).read(MAX_BUNDLE + 1)
    return bundles.read(content, str(proposal["bundle"]))


def send(connection: Connection, approvals: Approvals) -> None:
    """Tell the server every decision that it does not know.

    Raises:
        IntegrityError: it says that ours do not follow what it knows.
    """
    after = approvals.witnessed[-1].sequence if approvals.witnessed else 0
    lines = chain.lines(approvals.path, after)
    if lines:
        entries = {"format": wire.FORMAT, "entries": [line.decode() for line in lines]}
        reply = connection.request("POST", wire.APPROVALS, entries).document()
        approvals.witnessed = (*approvals.witnessed, Head.parse(wire.field(reply, "head", str)))


def follow(
    connection: Connection, home: Home, key: Ed25519PrivateKey, approvals: Approvals, now: float
) -> None:
    """Approve what the policy allows of that which waits for it, and tell the server what it does not know.

    Raises:
        ConsortiumError: the server cannot be reached.
    """
    found = fetch(connection, approvals)
    public = key.public_key()
    try:
        approvals.entries(public)  # verified before anything is added
    except IntegrityError as error:
        _log.error("nothing runs that needs an approval: %s", error)
        return
    for one in found["studies"]:
        if not one.get("waits") or approvals.last(public, one["bundle"]) is not None:
            continue
        try:
            proposed = bundle(connection, one)
            rule = policy.load(home.policy_file).rule_for(proposed.study)
            approval = made(
                home, proposed, rule.data, rounds=proposed.study.rounds, days=BY_POLICY, now=now, by="policy"
            )
        except (RefusedError, InputError):
            _log.warning(
                "study %s waits for a decision; see: consortium client review %s --dir %s",
                one["name"], one["name"], home.folder,
            )  # fmt: skip
            continue
        approvals.approve(key, proposed, approval, now)
        _log.info("study %s: approved, as policy.toml allows it", one["name"])
    try:
        send(connection, approvals)
    except ConsortiumError as error:
        _log.error("the server does not take this site's decisions: %s", error)
