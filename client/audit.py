"""The site's audit log: what its operator did, what the server asked of it, and what left it.

An instruction is in the log before anything is done for it, and what is sent is on the disk there before it leaves. An
answer stands there by its signed header: kinds and sizes of what it holds, and the SHA-256 of the content.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.client.home import Home
from consortium.privacy.ledger import ledger_name
from consortium.protocol import audit, chain
from consortium.protocol.audit import Audit
from consortium.protocol.chain import Head
from consortium.protocol.heads import APPROVALS, AUDIT, LEDGER
from consortium.protocol.messages import Instruction
from consortium.protocol.signing import fingerprint

Note = Callable[[str, Mapping[str, Any]], object]
"""Writes an entry into the site's audit log: its kind and its body; it is durable when it returns."""
LONGEST = 500
"""Characters of an error's text that are kept."""


def log_name(home: Home, key: Ed25519PublicKey) -> str:
    """The name of a site's log, which is part of every hash in it."""
    return audit.name_at_site(home.config.federation, home.config.site, fingerprint(key))


def site_audit(home: Home, key: Ed25519PrivateKey, clock: Callable[[], float] = time.time) -> Audit:
    """The log of a site's folder, for whoever holds the site's identity key.

    Raises:
        IntegrityError: its last file is damaged; the entry is named.
    """
    found = Audit(home.audit, log_name(home, key.public_key()), lambda: key, clock=clock)
    if not found.head.sequence:
        about = {"federation": home.config.federation, "site": home.config.site}
        found.note("begun", {**about, "version": version("consortium")})
    return found


def noted(home: Home, kind: str, body: Mapping[str, Any]) -> None:
    """Write what the operator did at this folder, by its keys. Before the site has joined there is nobody to sign."""
    if home.identity_file.exists():
        site_audit(home, home.identity(home.lock())).note(kind, body)


def asked(about: Instruction) -> dict[str, Any]:
    """Which instruction an entry is about."""
    return {"run": about.run, "round": about.round, "attempt": about.attempt, "asked": about.kind}


def verify(home: Home, key: Ed25519PublicKey, witnessed: Sequence[Head] = ()) -> Head:
    """The head of a site's log, once every entry was checked, and that it has every head in `witnessed`.

    Raises:
        IntegrityError: naming the entry that is not as it was written, or is missing.
    """
    return audit.verify(home.audit, log_name(home, key), [key], witnessed)


def verify_all(
    home: Home, key: Ed25519PublicKey, seen: Mapping[str, Head], earlier: Sequence[Head] = ()
) -> dict[str, Head]:
    """The heads of audit log, decisions and ledger, once each was checked. seen, earlier: what the server has seen of
    each, and of the audit log before. Raises as `verify`."""
    config = home.config
    files = {
        APPROVALS: (home.folder / "approvals.log", f"approvals {config.federation} {config.site}"),
        LEDGER: (home.ledger_file, ledger_name(config.federation, config.site, key)),
    }
    found = {AUDIT: verify(home, key, [*earlier, *([seen[AUDIT]] if AUDIT in seen else [])])}
    for log, (path, name) in files.items():
        found[log] = chain.verify(path, name, [key], [seen[log]] if log in seen else [])
    return found
