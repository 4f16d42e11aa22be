"""What a site hands an auditor of one run: `protocol/evidence.py` says what is in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from consortium.client.approvals import Approvals
from consortium.client.audit import log_name
from consortium.client.charges import ledger_in
from consortium.client.heads import statement_in
from consortium.client.home import Home
from consortium.protocol import bundle, chain, evidence
from consortium.protocol.audit import segments
from consortium.protocol.chain import Entry
from consortium.protocol.credentials import chain_in, pem
from consortium.protocol.errors import InputError
from consortium.protocol.evidence import About
from consortium.protocol.signing import raw


def hand_over(home: Home, name: str, out: Path) -> About:
    """Write the evidence of a run into the new folder `out`; of a study, of the latest run that asked this site. Also
    while the agent runs.

    Raises:
        InputError: there is no such run, or the folder is not empty.
        IntegrityError: a log or a statement is not as it was written.
    """
    evidence.free(out)
    lock, config = home.lock(), home.config
    key = home.identity(lock)
    identity = raw(key.public_key()).hex()
    home.trust()  # what is held is the root's
    said = statement_in(home)  # before the log is read, which has what it has seen
    log = log_name(home, key.public_key())
    entries = list(chain.entries(segments(home.audit), log))
    asked = [one for one in entries if one.kind == "instruction"]
    run = evidence.run_of(name, list(dict.fromkeys(str(one.body["run"]) for one in asked)))
    files = evidence.log_files(home.audit, evidence.first_of(entries, run))
    entries = evidence.in_files(files, chain.entries(segments(home.audit), log))
    said = _newest([said, *(dict(one.body["server"]) for one in asked if "server" in one.body)])
    study = _study(asked, run)
    approvals = Approvals(home)
    decided = approvals.entries(key.public_key())
    named = [str(one.body["bundle"]) for one in decided if one.body.get("settings") == study]
    digest = named[-1] if named else ""
    wanted = {one.sequence for one in decided if digest and one.body.get("bundle") == digest}
    ledger = ledger_in(home, lock)
    spent = {one.sequence for one in ledger.entries() if one.body.get("run") == run}
    files |= {
        "root.pem": pem([home.root]),
        "certificates.pem": pem(chain_in(home.tls_file)),
        "trust.json": evidence.plain([json.loads(home.trust_file.read_bytes())]),
        "statements.json": evidence.plain({"server": said} if said else {}),
        "approvals.jsonl": evidence.lines(_lines(approvals.path, wanted)),
        "ledger.jsonl": evidence.lines(_lines(home.ledger_file, spent)),
    }
    path = home.folder / "bundles" / f"{digest}{bundle.SUFFIX}"
    if digest:
        files["study.fab"] = _kept(path)
    about = About(
        side="site", federation=config.federation, identity=identity, log=log, run=run, study=study, bundle=digest,
        waits=bool(digest), sites={config.site: [identity]},
    )  # fmt: skip
    evidence.write(out, about, files, key, entries)
    return about


def _newest(statements: list[dict[str, Any]]) -> dict[str, Any]:
    """The server's last statement, by its clock; empty where it made none."""
    made = [one for one in statements if one]
    return max(made, key=lambda one: float(json.loads(one["statement"])["at"]), default={})


def _kept(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: the approved bundle cannot be read ({error.strerror}); restore it from a backup"
        ) from error


def _study(asked: list[Entry], run: str) -> str:
    """The digest of the settings under which a run asked this site last; of what was done, where anything was."""
    mine = [one for one in asked if one.body["run"] == run]
    done = [one for one in mine if "refused" not in one.body] or mine
    return str(json.loads(done[-1].body["header"])["fields"]["study"])


def _lines(path: Path, wanted: set[int]) -> list[bytes]:
    return [line for line in chain.lines(path) if int(json.loads(line)["sequence"]) in wanted]
