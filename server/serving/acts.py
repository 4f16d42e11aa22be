"""The acts on a federation's registry in its audit log: what an entry says, and whether registry and log agree.

A federation's registry is the folder `models` of its server's. An act is in the log before it counts, with its number:
the place that it takes in the registry's history. So an act that was cut off in between is followed by another of the
same number, and whoever puts an older registry back, or edits it, is found by `consortium server audit verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consortium.protocol.chain import Entry
from consortium.protocol.errors import IntegrityError
from consortium.server.serving import versions
from consortium.server.serving.versions import Act, Shelf, State

if TYPE_CHECKING:
    from consortium.server.serving.registry import Registry

Note = Callable[[str, Mapping[str, Any]], object]
"""Writes an entry into an audit log: its kind and its body; it is durable when it returns."""
KINDS = {
    "register": "registered",
    "gate": "gated",
    "approve": "model approved",
    versions.PROMOTE: "promoted",
    versions.UNGATED: "promoted",
    versions.ROLLBACK: "rolled back",
    versions.WITHDRAW: "withdrawn",
}
LONGEST = 500
"""Characters of a reason that the log keeps."""


def log_of(federation: Path) -> Note:
    """What writes to the audit log of a server's folder, also while the server runs.

    Raises:
        ConsortiumError: the folder cannot be opened; no act may be done then.
    """
    from consortium.server.audit import open_audit
    from consortium.server.federation import Federation

    return open_audit(Federation.open(federation)).note


def check_registry(registry: Registry) -> int:
    """How many acts on a federation's registry stand in its audit log as they do there. Raises as `check`, and
    ConsortiumError where the federation cannot be opened."""
    from consortium.protocol import audit, chain
    from consortium.server.federation import Federation

    federation = Federation.open(registry.folder.resolve().parent)
    name = audit.name_at_server(federation.config.name, federation.root_fingerprint)
    files, where = audit.segments(federation.folder / audit.FOLDER), registry.folder / "registry.json"
    if not registry.folder.is_dir():
        return check(where, State(), chain.entries(files, name))
    with registry.held(new=True) as state:  # so that no act is in the log alone because it is under way
        return check(where, state, chain.entries(files, name))


def entry(number: int, act: Act, bundle: str) -> tuple[str, dict[str, Any]]:
    """Kind and body of an act's entry. number: its place in the history, from 1. bundle: of the version."""
    about = {"act": number, "model": act.model, "version": act.version, "bundle": bundle, "by": act.by}
    return KINDS.get(act.act, ""), {**about, "what": act.act, "why": act.why[:LONGEST]}


def check(where: Path, state: State, entries: Iterable[Entry]) -> int:
    """How many acts of a registry stand in the log as they do in its history. where: the registry's file, for errors.
    entries: of the whole log. Acts of an earlier version, which noted none, come before all others and are passed over.

    Raises:
        IntegrityError: an act is in one of them alone, or otherwise; or the registry stands otherwise than its acts
            left it.
    """
    noted: dict[int, Entry] = {}
    for one in entries:
        if one.kind == "restored":  # what the registry had not yet when the backup was made is gone with it
            noted = {number: told for number, told in noted.items() if number <= len(state.history)}
        elif one.kind in KINDS.values() and isinstance(one.body.get("act"), int):
            noted[one.body["act"]] = one
    for number, told in sorted(noted.items()):
        if number > len(state.history):
            raise IntegrityError(
                f"{where}: lacks act {number} ({_said(told)}), of which entry {told.sequence} of the audit log tells: "
                "an older copy was put back; restore the latest. If that command was cut off, type it again"
            )
    first = min(noted, default=len(state.history) + 1)
    for number, act in list(enumerate(state.history, 1))[first - 1 :]:
        shelf = state.models.get(act.model, Shelf())
        version = shelf.version(act.version)
        kind, body = entry(number, act, version.bundle if version else "")
        if number not in noted or (noted[number].kind, dict(noted[number].body)) != (kind, body):
            at = f"entry {noted[number].sequence}" if number in noted else "no entry"
            raise IntegrityError(
                f"{where}: says of act {number} that it was {act.act} {act.model}@{act.version}, and {at} of the audit "
                "log says the same: the registry was edited; restore it from a backup"
            )
    for name, shelf in state.models.items():
        _check_stand(where, name, shelf, [act for act in state.history if act.model == name])
    return len(state.history) - first + 1


def _said(told: Entry) -> str:
    return f"{told.body.get('what')} {told.body.get('model')}@{told.body.get('version')}"


def _check_stand(where: Path, name: str, shelf: Shelf, history: list[Act]) -> None:
    """Versions, withdrawals and champion must be what the acts made of them."""
    gone = {act.version for act in history if act.act == versions.WITHDRAW}
    wrong = [one.number for one in shelf.versions if one.withdrawn != (one.number in gone)]
    if wrong:
        raise IntegrityError(
            f"{where}: {name}@{wrong[0]} is {'not ' if wrong[0] in gone else ''}withdrawn there, and its acts say "
            "otherwise: the registry was edited; restore it from a backup"
        )
    champion = None
    for act in history:
        if act.act in (versions.PROMOTE, versions.UNGATED, versions.ROLLBACK):
            champion = act.version
        elif act.act == versions.WITHDRAW and act.version == champion:
            champion = None
    if champion != shelf.champion:
        raise IntegrityError(
            f"{where}: the champion of {name} is {shelf.champion or 'none'}, and by its acts {champion or 'none'}: the "
            "registry was edited; restore it from a backup"
        )
