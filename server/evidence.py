"""What the server hands an auditor of one run: `protocol/evidence.py` says what is in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from consortium.protocol import chain, evidence
from consortium.protocol.audit import FOLDER, name_at_server, segments
from consortium.protocol.bundle import read
from consortium.protocol.chain import Entry
from consortium.protocol.credentials import chain_in, pem
from consortium.protocol.evidence import About
from consortium.server.archive import waits
from consortium.server.audit import restores
from consortium.server.federation import DATABASE, SERVER, Federation
from consortium.server.heads import witnessed
from consortium.server.store import Store

MODEL = ("lineage.json", "manifest.json", "signature.json")


def hand_over(federation: Federation, name: str, out: Path) -> About:
    """Write the evidence of a run into the new folder `out`; of a study, of its latest run. Also while a server runs.

    Raises:
        InputError: there is no such run, or the folder is not empty.
        IntegrityError: the log or a statement is not as it was written.
        ConsortiumError: the log has nothing of the run.
    """
    evidence.free(out)
    store = Store(federation.folder / DATABASE)
    try:
        return _gathered(federation, store, name, out)
    finally:
        store.close()


def _gathered(federation: Federation, store: Store, name: str, out: Path) -> About:
    runs = {str(row["name"]): row for row in store.rows("SELECT * FROM runs ORDER BY created, rowid")}
    run = runs[evidence.run_of(name, list(runs))]
    kept = store.row("SELECT digest, content FROM bundles WHERE study = ?", run["digest"])
    bundle, content = (str(kept["digest"]), bytes(kept["content"])) if kept is not None else ("", b"")
    decisions = [
        str(row["line"]).encode()
        for row in store.rows("SELECT line FROM approvals WHERE bundle = ? ORDER BY site, sequence", bundle)
    ]
    statements = _statements(federation, store)  # before the log is read, which has what they have seen
    place, log = (
        federation.folder / FOLDER,
        name_at_server(federation.config.name, federation.root_fingerprint),
    )
    entries = list(chain.entries(segments(place), log))
    files = evidence.log_files(place, evidence.first_of(entries, run["name"]))
    entries = evidence.in_files(files, chain.entries(segments(place), log))
    files |= {
        "root.pem": federation.root_pem,
        "certificates.pem": pem(chain_in(federation.folder / SERVER)),
        "trust.json": evidence.plain(_trusts(federation, entries)),
        "statements.json": evidence.plain(statements),
        "approvals.jsonl": evidence.lines(decisions),
        "ledger.jsonl": b"",
        **({"study.fab": content} if bundle else {}),
    }
    model = federation.folder / "runs" / run["name"] / "model"
    if all((model / one).is_file() for one in MODEL):
        files |= {f"model/{one}": (model / one).read_bytes() for one in MODEL}
    about = About(
        side="server", federation=federation.config.name, identity="", log=log, run=str(run["name"]),
        study=str(run["digest"]), bundle=bundle, waits=bool(content) and waits(read(content, bundle).study),
        sites=_identities(store),
    )  # fmt: skip
    evidence.write(out, about, files, federation.instruction_key, entries)
    return about


def _statements(federation: Federation, store: Store) -> dict[str, Any]:
    """By site, its newest statement, where what it has seen must be in the log of now."""
    known = witnessed(store, federation, restores(federation))
    rows = store.rows("SELECT site, statement FROM shown ORDER BY site, at")
    return {str(row["site"]): json.loads(row["statement"]) for row in rows if row["site"] in known}


def _trusts(federation: Federation, entries: list[Entry]) -> list[dict[str, Any]]:
    """Every statement of keys by the root, the first one first."""
    found = [dict(one.body["trust"]) for one in entries if "trust" in one.body]
    every = {one["statement"]: one for one in [*found, federation.trust()]}
    return list(every.values())


def _identities(store: Store) -> dict[str, list[str]]:
    """By site, the keys under which it has signed here."""
    found: dict[str, list[str]] = {}
    for table, column in (("sites", "name"), ("approvals", "site"), ("shown", "site")):
        for row in store.rows(f"SELECT DISTINCT {column} AS site, identity FROM {table}"):  # noqa: S608 - ours
            if row["identity"] and row["identity"] not in found.setdefault(str(row["site"]), []):
                found[str(row["site"])].append(str(row["identity"]))
    return found
