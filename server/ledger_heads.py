"""The heads of the sites' privacy ledgers: the highest that each has shown, countersigned on demand.

So a site whose ledger was rolled back, or replaced by another history, is told of the entry that it lacks. The server
learns numbers and hashes alone, nothing of what an entry says.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.protocol.chain import Head, Witness, countersign
from consortium.server.store import Store


def seen(store: Store, ledger: str, shown: Head) -> Head:
    """Keep a head that a site shows of its ledger, and give the highest that was ever shown; of two with one number the
    first."""
    with store.transaction() as db:
        row = db.execute("SELECT sequence, hash FROM ledger_heads WHERE ledger = ?", (ledger,)).fetchone()
        if row is not None and row["sequence"] >= shown.sequence:
            return Head(row["sequence"], row["hash"])
        if shown.sequence:
            db.execute(
                "INSERT OR REPLACE INTO ledger_heads VALUES (?, ?, ?)", (ledger, shown.sequence, shown.hash)
            )
        return shown


def countersigned(store: Store, key: Ed25519PrivateKey, ledger: str, shown: Head) -> Witness:
    """As `seen`, with the server's signature."""
    return countersign(key, ledger, seen(store, ledger, shown))
