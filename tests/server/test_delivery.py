"""What a site is told of a version of a model, how that is read, and what the site then has: over real doors."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from founded import found, open_doors

from consortium.client import joining, models
from consortium.client.audit import noted, site_audit
from consortium.client.home import Home
from consortium.protocol import statement
from consortium.protocol.audit import segments
from consortium.protocol.chain import entries
from consortium.protocol.connection import Connection
from consortium.protocol.delivery import Delivery, File, state, verified
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.messages import canonical
from consortium.protocol.signing import DELIVERY
from consortium.server import seal
from consortium.server.delivery import Deliveries
from consortium.server.federation import Federation
from consortium.server.model import load_model
from consortium.server.serving.registry import Registry

NOW = 1_800_000_000.0
GOOD = Delivery("toy", 1, "b", NOW, NOW + 10, {"manifest.json": File(1, "0" * 64)})


@dataclass(frozen=True)
class Pulling:
    """A federation with two versions of a model, and a site of it. paths: what the site asks the server for."""

    registry: Registry
    federation: Federation
    home: Home
    connection: Connection
    paths: list[str]

    def note(self, kind: str, body: Mapping[str, Any]) -> None:
        """Write to the site's audit log."""
        noted(self.home, kind, body)

    @property
    def folder(self) -> Path:
        """Where the site has the model's versions."""
        return self.home.folder / "models" / "toy"

    def again(self) -> Connection:
        """Another connection to the server."""
        return self.home.connection(self.home.lock())


@pytest.fixture
def one(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pulling]:
    with open_doors(tmp_path / "fed") as doors:
        federation = doors.federation
        registry = Registry(federation.folder / "models", time.time)
        for number in (1, 2):
            copy = shutil.copytree(exported, tmp_path / f"version-{number}")
            (copy / "MODEL_CARD.md").write_text(f"Version {number}.")
            files = json.loads((copy / "manifest.json").read_bytes())["files"]
            files["MODEL_CARD.md"] = hashlib.sha256((copy / "MODEL_CARD.md").read_bytes()).hexdigest()
            manifest = seal.manifest(files, federation.config.name)
            (copy / "manifest.json").write_bytes(manifest)
            (copy / "signature.json").write_bytes(seal.signature(federation.seal(manifest)))
            registry.register(copy, "toy", lambda place: str(load_model(place).contract["model"]))
        registry.promote("toy", 1, "for a test", ungated=True)
        home = joining.join(doors.code("site-1"), tmp_path / "site", environment={}).home
        paths, real = list[str](), Connection.request

        def request(self: Connection, method: str, path: str, *more: Any, **others: Any) -> Any:
            paths.append(path.partition("?")[0])
            return real(self, method, path, *more, **others)

        monkeypatch.setattr(Connection, "request", request)
        connection = home.connection(home.lock())
        yield Pulling(registry, federation, home, connection, paths)
        connection.close()


def test_an_approval_changes_one_file_of_what_a_site_has(one: Pulling) -> None:
    """The next pull fetches that alone, and the folder is there all the while for whoever serves from it."""
    models.pull(one.home, one.connection, "toy", one.note)
    place = one.folder / "1"
    before = place.stat().st_ino, (place / "model.onnx").stat().st_ino
    said = models.fetch(one.home, one.connection, "toy", 1)[1]
    identity = one.home.identity(one.home.lock())
    assert models.approve(one.home, one.connection, identity, said, one.note) == ["site-1"]
    (place / "notes.txt").write_text("not of the model")
    one.paths.clear()
    models.pull(one.home, one.connection, "toy", one.note)
    assert [path for path in one.paths if path.count("/") > 3] == ["/v1/models/toy/1/signature.json"]
    assert (place.stat().st_ino, (place / "model.onnx").stat().st_ino) == before
    assert seal.read(place, one.federation.root_fingerprint).approved == ("site-1",)
    assert noted_at(one) == [("pulled", 1), ("model approved", 1), ("pulled", 1)]
    assert sorted(path.name for path in one.folder.iterdir()) == ["1", "standing.json"]


def noted_at(one: Pulling) -> list[tuple[str, int]]:
    """What the site's audit log tells of models: kind and version."""
    found = entries(segments(one.home.audit), site_audit(one.home, one.home.identity(one.home.lock())).name)
    return [(entry.kind, entry.body["version"]) for entry in found if "bundle" in entry.body]


def test_a_site_notes_once_that_a_model_was_withdrawn(one: Pulling) -> None:
    """When its agent hears of it, before it is marked, and not at the next look."""
    models.pull(one.home, one.connection, "toy", one.note)
    one.registry.withdraw("toy", 1, "wrong units")
    for _ in range(2):
        models.check(one.home, one.connection, one.note)
    assert noted_at(one) == [("pulled", 1), ("withdrawn", 1)]
    with pytest.raises(IntegrityError, match=r"was withdrawn \(wrong units\)"):
        models.usable(one.home, "toy", time.time())


def test_what_cannot_be_noted_is_neither_used_nor_approved(one: Pulling) -> None:
    """A full disk at the site's audit log: nothing was pulled, and the server has no approval."""

    def full(*_: object) -> None:
        raise ConsortiumError("the audit log cannot be written")

    with pytest.raises(ConsortiumError, match="cannot be written"):
        models.pull(one.home, one.connection, "toy", full)
    with pytest.raises(InputError, match="is not here"):
        models.usable(one.home, "toy", time.time())
    said = models.fetch(one.home, one.connection, "toy", 1)[1]
    with pytest.raises(ConsortiumError, match="cannot be written"):
        models.approve(one.home, one.connection, one.home.identity(one.home.lock()), said, full)
    assert seal.read(one.registry.folder / "toy" / "1").approved == ()


@pytest.mark.parametrize("last", [False, True])
def test_a_model_that_is_withdrawn_while_it_is_fetched_is_not_used(one: Pulling, last: bool) -> None:
    """At the first byte or after the last one: it is told why, and nothing says afterwards that it may be used."""

    def withdraw(done: int, whole: int) -> None:
        gone = one.registry.state().models["toy"].versions[0].withdrawn
        if not gone and (done == whole or not last):
            one.registry.withdraw("toy", 1, "wrong units")

    with pytest.raises(ConsortiumError, match=r"^toy@1: was withdrawn \(wrong units\)"):
        models.pull(one.home, one.connection, "toy", one.note, withdraw)
    with pytest.raises(InputError, match="is not here"):
        models.usable(one.home, "toy", time.time())


def test_a_site_hears_of_damage_at_the_server_and_not_where(one: Pulling) -> None:
    """Names of the server's folders are not the sites' to know."""
    (one.registry.folder / "toy" / "1" / "notes.txt").write_text("not of the model")
    with pytest.raises(ConsortiumError, match="is damaged at the server") as caught:
        models.pull(one.home, one.connection, "toy", one.note)
    assert str(one.registry.folder) not in str(caught.value)


def test_a_pull_beside_the_agents_look_is_not_undone(one: Pulling, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent keeps what the server says of the version that was used when it looked; a pull meanwhile waits."""
    models.pull(one.home, one.connection, "toy", one.note)
    one.registry.promote("toy", 2, "for a test", ungated=True)
    asked, threads = models._asked, list[threading.Thread]()

    def pull() -> None:
        connection = one.again()
        models.pull(one.home, connection, "toy", one.note)
        connection.close()

    def asking(*about: Any) -> Any:
        found = asked(*about)
        if not threads:
            threads.append(threading.Thread(target=pull))
            threads[0].start()
            threads[0].join(1.0)
        return found

    monkeypatch.setattr(models, "_asked", asking)
    models.check(one.home, one.connection, one.note)
    threads[0].join(60)
    assert models.usable(one.home, "toy", time.time()) == one.folder / "2"


def test_a_site_is_told_the_files_that_were_registered(exported: Path, tmp_path: Path) -> None:
    """By the manifest's digests, so a file that was damaged on the server's disk since is accepted by no site."""
    federation = found(tmp_path / "fed")
    registry = Registry(federation.folder / "models", lambda: NOW)
    registry.register(exported, "toy", lambda copy: str(load_model(copy).contract["model"]))
    place = registry.folder / "toy" / "1"
    right = seal.read(place)
    with (place / "model.onnx").open("r+b") as file:
        file.write(b"damaged")
    said = Deliveries(federation, lambda: NOW).said("toy", -1)
    assert {name: one.sha256 for name, one in said.files.items()} == {
        **right.files,
        seal.MANIFEST: right.digest,
    }
    assert said.bundle == right.digest
    assert {name: one.size for name, one in said.files.items()} == {
        path.name: path.stat().st_size for path in place.iterdir()
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"version": float("inf")}, {"version": 0}, {"at": float("nan")}, {"until": float("inf")}, {"until": "later"},
        {"files": {}}, {"files": {"../x": {"size": 1, "sha256": "0" * 64}}}, {"files": {"x": {"size": -1}}},
        {"files": {"x": {"size": float("inf"), "sha256": "0" * 64}}}, {"withdrawn": "why"}, {"files": 3},
        {"until": NOW + 8 * 86400},
    ],
)  # fmt: skip
def test_a_statement_that_says_nonsense_is_refused(changed: dict[str, Any]) -> None:
    """Signed or not: no size, time or name that no bundle has, and none that is good for ever."""
    key = Ed25519PrivateKey.generate()
    keys = [key.public_key()]
    assert verified(state(key, "lung", "a", "n", GOOD), keys, "lung", "a", "toy", "n") == GOOD
    about = {"format": 1, "federation": "lung", "site": "a", "nonce": "n", **asdict(GOOD), **changed}
    text = (
        canonical(about)
        if "inf" not in str(about) and "nan" not in str(about)
        else json.dumps(about).encode()
    )
    with pytest.raises(IntegrityError, match="statement of a model"):
        verified(statement.signed(key, DELIVERY, text), keys, "lung", "a", "toy", "n")


def test_an_answer_to_another_question_is_refused() -> None:
    """Another site's, model's or federation's, or one that was given before; a kept one has no question."""
    key = Ed25519PrivateKey.generate()
    document, keys = state(key, "lung", "a", "n", GOOD), [key.public_key()]
    for asked in (
        ("other", "a", "toy", "n"),
        ("lung", "b", "toy", "n"),
        ("lung", "a", "x", "n"),
        ("lung", "a", "toy", "m"),
    ):
        with pytest.raises(IntegrityError, match="not the answer"):
            verified(document, keys, *asked)
    assert verified(document, keys, "lung", "a", "toy") == GOOD
