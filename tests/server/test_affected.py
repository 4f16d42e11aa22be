"""Which versions hold a site's updates: what a sceptical officer would try so that one is not found."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from founded import found

from consortium.protocol import cli
from consortium.protocol.errors import IntegrityError
from consortium.server import seal
from consortium.server.federation import Federation
from consortium.server.serving.affected import affected_by
from consortium.server.serving.registry import Registry


def lineage(rounds: Sequence[Sequence[str]], sites: Sequence[str]) -> dict[str, Any]:
    """What a run's rounds, from that of the statistics on, leave in a bundle."""
    return {
        "sites": list(sites),
        "rounds": [
            {"round": n, "sites": dict.fromkeys(names, 1.0), "void": False} for n, names in enumerate(rounds)
        ],
    }


def put(place: Path, came: dict[str, Any], federation: Federation | None) -> str:
    """Make a folder a bundle with this lineage, signed by the federation; the SHA-256 of its manifest."""
    content = seal.plain_json(came)
    files = {"contract.json": b"{}", "lineage.json": content}
    for name, held in files.items():
        (place / name).write_bytes(held)
    hashes = {name: hashlib.sha256(held).hexdigest() for name, held in files.items()}
    manifest = seal.manifest(hashes, None if federation is None else federation.config.name)
    (place / "manifest.json").write_bytes(manifest)
    if federation is not None:
        (place / "signature.json").write_bytes(seal.signature(federation.seal(manifest)))
    return hashlib.sha256(manifest).hexdigest()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation's folder whose registry has four versions: of a and b; of a with b's statistics alone; of drawn
    cohorts out of a and c; and of b and c, withdrawn."""
    place = tmp_path_factory.mktemp("affected")
    federation = found(place / "fed")
    registry = Registry(federation.folder / "models", lambda: 7.0, "anna")
    made = [
        lineage([["a", "b"], ["a", "b"], ["a"]], ["a", "b"]),
        lineage([["a", "b"], ["a"], ["a"]], ["a", "b"]),
        lineage([[], [], []], ["a", "c"]),
        lineage([["b", "c"], ["b", "c"]], ["b", "c"]),
    ]
    for number, came in enumerate(made, 1):
        (place / f"{number}").mkdir()
        put(place / f"{number}", came, federation)
        registry.register(place / f"{number}", "m", lambda _: "model-1")
    registry.promote("m", 1, "a test", ungated=True)
    registry.withdraw("m", 4, "consent withdrawn")
    return federation.folder


@pytest.fixture
def registry(template: Path, tmp_path: Path) -> Registry:
    """Of a copy that a test may change."""
    return Registry(shutil.copytree(template, tmp_path / "fed") / "models", lambda: 8.0)


def consortium(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(one) for one in words])
    return int(end.value.code or 0)


def test_every_version_of_a_site_is_found_and_its_rounds_told(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its statistics alone too, of drawn cohorts, and withdrawn; of a name that nobody has that is told."""
    assert consortium("model", "affected-by", "b", "--registry", registry.folder) == 0
    assert capsys.readouterr().out.splitlines() == [
        "m@1  champion; rounds 1",
        "m@2  not live; rounds none, its statistics alone",
        "m@4  withdrawn; rounds 1",
    ]
    assert consortium("model", "affected-by", "c", "--registry", registry.folder) == 0
    assert capsys.readouterr().out.splitlines() == [
        "m@3  not live; rounds not told, as cohorts were drawn",
        "m@4  withdrawn; rounds 1",
    ]
    assert consortium("model", "affected-by", "B", "--registry", registry.folder) == 0
    assert "that versions here hold something of: a, b, c" in capsys.readouterr().out


def test_a_damaged_version_hides_no_other_and_is_told(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 4 beside what was found: it may hold updates of the site, too."""
    path = registry.folder / "m" / "2" / "lineage.json"
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"x"'))
    shutil.rmtree(registry.folder / "m" / "4")
    assert consortium("model", "affected-by", "b", "--registry", registry.folder, "--json") == 4
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert [one["version"] for one in said["versions"]] == [1]
    assert len(said["damaged"]) == 2
    assert "m/2/lineage.json" in err
    assert "m/4" in err


def without_b(registry: Registry, federation: Federation | None) -> None:
    """Rewrite the lineage of version 1, its manifest, and the registry, as whoever can write all of them would."""
    digest = put(registry.folder / "m" / "1", lineage([["a"], ["a"], ["a"]], ["a"]), federation)
    path = registry.folder / "registry.json"
    document = json.loads(path.read_bytes())
    document["models"]["m"]["versions"][0]["bundle"] = digest
    path.write_text(json.dumps(document))


def test_a_lineage_that_was_edited_with_all_that_holds_it_is_found(
    registry: Registry, tmp_path: Path
) -> None:
    """Where the signature stays, by that; where it was removed or is another's, by the federation's audit log."""
    signature = registry.folder / "m" / "1" / "signature.json"
    right = signature.read_bytes()
    for federation in (None, found(tmp_path / "other")):
        signature.unlink()
        without_b(registry, federation)
        with pytest.raises(IntegrityError, match=r"registry\.json: says of act 1 .* was edited"):
            affected_by(registry, "b")
        signature.write_bytes(right)
    elsewhere = Registry(
        shutil.copytree(registry.folder, tmp_path / "copy"), lambda: 8.0
    )  # which no log knows of
    without_b(elsewhere, None)
    manifest = seal.manifest(
        json.loads((elsewhere.folder / "m/1/manifest.json").read_bytes())["files"], "lung"
    )
    (elsewhere.folder / "m/1/manifest.json").write_bytes(manifest)
    path = elsewhere.folder / "registry.json"
    document = json.loads(path.read_bytes())
    document["models"]["m"]["versions"][0]["bundle"] = hashlib.sha256(manifest).hexdigest()
    path.write_text(json.dumps(document))
    found_there = affected_by(elsewhere, "b")
    assert [one["version"] for one in found_there.versions] == [2, 4]
    (damaged,) = found_there.damaged
    assert "m/1/signature.json" in damaged


def test_an_alias_that_was_edited_to_a_withdrawn_version_is_told(registry: Registry, tmp_path: Path) -> None:
    """By the audit log; and where there is none, as what it is: withdrawn, and the champion."""
    path = registry.folder / "registry.json"
    document = json.loads(path.read_bytes())
    document["models"]["m"]["champion"] = 4
    path.write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="the champion of m is 4, and by its acts 1"):
        affected_by(registry, "b")
    elsewhere = Registry(shutil.copytree(registry.folder, tmp_path / "copy"), lambda: 8.0)
    last = affected_by(elsewhere, "b").versions[-1]
    assert (last["version"], last["withdrawn"], last["aliases"]) == (4, True, ["champion"])


def test_a_withdrawal_names_what_else_comes_of_the_same_model(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    """A version in 8 bits, or the same model under another name, would stay in use."""
    words = ("--registry", registry.folder, "--why", "consent withdrawn")
    assert consortium("model", "withdraw", "m@1", *words) == 0
    assert "m@2: comes from the same model and is in use still" in capsys.readouterr().err
    for number in (2, 3):
        assert consortium("model", "withdraw", f"m@{number}", *words) == 0
    assert "m@3" in capsys.readouterr().err
    assert consortium("model", "withdraw", "m@4", *words) == 0
    assert capsys.readouterr().err == ""
