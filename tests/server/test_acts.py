"""What is done with a federation's models is in the audit logs, at the server and at a site, and no edit hides it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from founded import found

from consortium.protocol import audit, cli
from consortium.protocol.audit import FOLDER, name_at_server
from consortium.protocol.chain import entries
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.server import backup, seal
from consortium.server.audit_check import check
from consortium.server.federation import Federation
from consortium.server.serving import gate_file, versions
from consortium.server.serving.registry import STATE, Registry
from consortium.server.serving.versions import State

GATE = {"federation": "lung", "model": "m", "version": 2, "passed": False, "why": ["worse at site-1"]}


def bundle(federation: Federation, where: Path, number: int) -> Path:
    """A signed folder of one file that is as good as a bundle for a registry."""
    where.mkdir()
    (where / "contract.json").write_bytes(b"%d" % number)
    files = {"contract.json": hashlib.sha256(b"%d" % number).hexdigest()}
    manifest = seal.manifest(files, federation.config.name)
    (where / "manifest.json").write_bytes(manifest)
    (where / "signature.json").write_bytes(seal.signature(federation.seal(manifest)))
    return where


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a federation whose registry has two versions; the first was champion, and is again, before the
    second is withdrawn."""
    place = tmp_path_factory.mktemp("acts")
    made = found(place / "fed")
    one = Registry(made.folder / "models", lambda: 7.0, "anna")
    for number in (1, 2):
        one.register(bundle(made, place / f"b{number}", number), "m", lambda copy: "model")
    one.gated("m", 2, GATE, made.seal)
    one.promote("m", 1, "the first", ungated=True)
    one.promote("m", 2, "better", ungated=True)
    one.rollback("m", "worse")
    one.withdraw("m", 2, "wrong units")
    return made.folder


@pytest.fixture
def federation(template: Path, tmp_path: Path) -> Federation:
    """A copy of it that a test may change."""
    return Federation.open(shutil.copytree(template, tmp_path / "fed"))


def told(federation: Federation) -> list[tuple[str, dict[str, Any]]]:
    name = name_at_server(federation.config.name, federation.root_fingerprint)
    found = entries(audit.segments(federation.folder / FOLDER), name)
    return [(one.kind, dict(one.body)) for one in found if "act" in one.body]


def test_every_act_on_a_federations_registry_is_in_its_audit_log(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    """With who, what, which bundle and why, in order; `audit show` tells it and `audit verify` counts it."""
    found = told(federation)
    assert [(kind, body["act"], body["version"], body["why"]) for kind, body in found] == [
        ("registered", 1, 1, ""), ("registered", 2, 2, ""), ("gated", 3, 2, "worse at site-1"),
        ("promoted", 4, 1, "the first"), ("promoted", 5, 2, "better"), ("rolled back", 6, 1, "worse"),
        ("withdrawn", 7, 2, "wrong units"),
    ]  # fmt: skip
    shelf = Registry(federation.folder / "models", lambda: 8.0).state().models["m"]
    assert [body["bundle"] for _, body in found[:2]] == [one.bundle for one in shelf.versions]
    assert {body["by"] for _, body in found} == {"anna"}
    assert [body["what"] for kind, body in found if kind == "promoted"] == ["promote ungated"] * 2
    assert check(federation).acts == 7
    with pytest.raises(SystemExit) as end:
        cli.main(["server", "audit", "show", "--kind", "withdrawn", "--dir", str(federation.folder)])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "act=7" in shown
    assert "why=wrong units" in shown


def test_an_act_that_cannot_be_noted_is_not_done(federation: Federation) -> None:
    """A withdrawal, a promotion and a gate whose entry cannot be written change nothing."""
    folder = federation.folder / "models"

    def full(*_: object) -> None:
        raise ConsortiumError("the audit log cannot be written")

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    one = Registry(folder, lambda: 9.0, "anna", full)
    acts: list[Callable[[], object]] = [
        lambda: one.withdraw("m", 1, "why"),
        lambda: one.promote("m", 1, "again", ungated=True),
        lambda: one.gated("m", 1, GATE, federation.seal),
    ]
    for act in acts:
        with pytest.raises(ConsortiumError, match="cannot be written"):
            act()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_registry_by_another_name_is_the_federations_still(federation: Federation, tmp_path: Path) -> None:
    """A link to it goes past neither the gate nor the audit log."""
    link = tmp_path / "elsewhere"
    link.symlink_to(federation.folder / "models")
    assert gate_file.of_federation(link)
    Registry(link, lambda: 9.0, "anna").withdraw("m", 1, "by the link")
    assert told(federation)[-1][1]["why"] == "by the link"


def test_a_backup_beside_an_act_has_a_log_that_knows_of_it(federation: Federation) -> None:
    """The registry is copied before its bundles, and the log after both."""
    found = [str(path.relative_to(federation.folder)) for path in backup._others(federation.folder)]
    assert found[0] == "models/registry.json"
    assert "models/m/1/manifest.json" in found
    assert found[-1].startswith("audit/")


def edits() -> Iterator[tuple[Callable[[State], State], str]]:
    """Ways to undo the withdrawal, or to have another champion, by hand; and what is said of each."""

    def shelf(state: State, **changes: Any) -> State:
        return replace(state, models={"m": replace(state.models["m"], **changes)})

    def sound(state: State) -> State:
        return shelf(
            state, versions=tuple(replace(one, withdrawn=False) for one in state.models["m"].versions)
        )

    yield (lambda state: replace(sound(state), history=state.history[:-1])), r"lacks act 7 \(withdraw m@2\)"
    yield sound, r"m@2 is not withdrawn there"
    yield (lambda state: shelf(state, champion=2)), r"the champion of m is 2, and by its acts 1"
    yield (lambda state: shelf(state, versions=state.models["m"].versions[::-1])), "act 1 "
    yield (
        lambda state: replace(state, history=(*state.history[:5], *state.history[6:])),
        r"lacks act 7 \(withdraw m@2\)",
    )
    yield (lambda state: replace(state, history=(*state.history, state.history[3]))), "act 8 .* no entry"
    yield (
        lambda state: replace(state, history=(*state.history[:6], replace(state.history[6], why="a typo"))),
        "act 7 .* entry 8",
    )


@pytest.mark.parametrize(("edit", "said"), list(edits()))
def test_a_registry_that_was_edited_or_put_back_is_found(
    federation: Federation, edit: Callable[[State], State], said: str
) -> None:
    """Whatever stands in `registry.json`, the log knows what was done."""
    path = federation.folder / "models" / STATE
    path.write_bytes(versions.document(edit(versions.parsed(path.read_bytes()))))
    if "act 1 " in said:  # the versions were exchanged: each has the other's number
        document = json.loads(path.read_bytes())
        for number, one in enumerate(document["models"]["m"]["versions"], 1):
            one["number"] = number
        path.write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match=said) as caught:
        check(federation)
    assert str(path) in str(caught.value)
