"""No door lets a model through that is altered, withdrawn, of an unknown signer, or not approved: exit code 4."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from founded import found, open_doors
from typer.testing import CliRunner

from consortium.client import joining, models
from consortium.client.home import Home
from consortium.protocol.connection import Connection
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.server import gating, model_cli, seal
from consortium.server.archive import Archive
from consortium.server.exchange import Exchange
from consortium.server.federation import Federation
from consortium.server.model import load_model
from consortium.server.serving.host import Settings, Watcher
from consortium.server.serving.registry import Registry
from consortium.server.serving.serve_cli import export


@dataclass
class World:
    """A federation's registry, in which version 1 of 'toy' is the champion, a site, and rows to predict for."""

    federation: Federation
    registry: Registry
    gates: gating.Gates
    home: Home
    connection: Connection
    folder: Path
    exported: Path

    @property
    def root(self) -> str:
        """What callers trust."""
        return self.federation.root_fingerprint

    def place(self, number: int) -> Path:
        """A version's folder."""
        return self.registry.folder / "toy" / str(number)

    def register(self, federation: Federation, name: str, approvals: int = 0) -> int:
        """Another version: a bundle with a card of its own that a federation signed; its number."""
        copy = shutil.copytree(self.exported, self.folder / name)
        (copy / "MODEL_CARD.md").write_text(name)
        files = json.loads((copy / "manifest.json").read_bytes())["files"]
        files["MODEL_CARD.md"] = hashlib.sha256((copy / "MODEL_CARD.md").read_bytes()).hexdigest()
        manifest = seal.manifest(files, federation.config.name, approvals)
        (copy / "manifest.json").write_bytes(manifest)
        (copy / "signature.json").write_bytes(seal.signature(federation.seal(manifest)))
        return self.registry.register(
            copy, "toy", lambda place: str(load_model(place).contract["model"])
        ).number


@pytest.fixture(scope="module")
def world(exported: Path, rows: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("doors")
    with open_doors(folder / "fed") as doors:
        federation = doors.federation
        registry = Registry(federation.folder / "models", lambda: 7.0, "anna", lambda *_: None)
        archive = Archive(doors.store, federation.folder / "checkpoints")
        exchange = Exchange(lambda header: b"", federation.folder / "spool", doors.roster.is_member)
        home = joining.join(doors.code("site-1"), folder / "site", environment={}).home
        connection = home.connection(home.lock())
        gates = gating.Gates(federation, archive, exchange)
        one = World(federation, registry, gates, home, connection, folder, exported)
        one.register(federation, "first")
        registry.promote("toy", 1, "a test", ungated=True)
        rows(5).to_csv(folder / "rows.csv", index=False)
        yield one
        connection.close()


def command(*words: object) -> None:
    done = CliRunner().invoke(model_cli.model, [str(one) for one in words])
    if done.exception is not None:
        raise done.exception


def predict(one: World, number: int, root: str) -> None:
    rows, out = one.folder / "rows.csv", one.folder / "out.csv"
    command("predict", f"{one.registry.folder}/toy@{number}", "--in", rows, "--out", out, "--root", root)
    out.unlink()


def written(one: World, number: int, root: str) -> None:
    out = one.folder / "triton"
    export(one.place(number), "triton", out, root=root)
    shutil.rmtree(out)


def gate(one: World, number: int, root: str) -> None:
    """As far as a gate reads a version; what its sites are then asked stands in other tests."""
    try:
        one.gates._version("toy", number)
    except ConsortiumError as error:
        if "is not known to this server" not in str(error):  # its study, as there are no runs here
            raise


def fetch(one: World, number: int, root: str) -> None:
    shutil.rmtree(one.home.folder / "models", ignore_errors=True)
    models.fetch(one.home, one.connection, "toy", number)


Door = Callable[[World, int, str], object]
DOORS: Mapping[str, Door] = {
    "verify": lambda one, number, root: command(
        "verify", f"{one.registry.folder}/toy@{number}", "--root", root
    ),
    "verify a folder": lambda one, number, root: command("verify", one.place(number), "--root", root),
    "predict": predict,
    "serve a folder": lambda one, number, root: Watcher(
        Settings(one.place(number), one.folder, roots=(root,))
    ).first(),
    "export": written,
    "promote": lambda one, number, _: one.registry.promote("toy", number, "a test", ungated=True),
    "gate": gate,
    "fetch": fetch,
}
SERVE: Door = lambda one, _, root: Watcher(Settings(one.registry.folder, one.folder, roots=(root,))).first()  # noqa: E731


def refused(door: Door, one: World, number: int, root: str = "") -> str:
    """What the door says. It must be a refusal, of exit code 4."""
    with pytest.raises(ConsortiumError) as caught:
        door(one, number, root or one.root)
    assert caught.value.exit_code == 4, caught.value
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DOORS, "serve"])
def test_one_changed_byte_of_any_file_opens_no_door(world: World, name: str) -> None:
    """The first, a middle, and the last byte of each file: refused, the file named, and let in once it is right."""
    door = DOORS.get(name, SERVE)
    door(world, 1, world.root)
    for path in sorted(world.place(1).iterdir()):
        right = path.read_bytes()
        for at in (0, len(right) // 2, len(right) - 1):
            wrong = bytearray(right)
            wrong[at] ^= 1
            path.write_bytes(wrong)
            try:
                said = refused(door, world, 1)
            finally:
                path.write_bytes(right)
            # Where the server itself finds it, the site is told that, and not of the server's files.
            assert path.name in said or (name == "fetch" and "is damaged at the server" in said)
        path.unlink()
        try:
            said = refused(door, world, 1)
            assert path.name in said or (name == "fetch" and "is damaged at the server" in said)
        except BaseException:
            if path.name != "manifest.json":  # without which a folder is none, which is wrong input
                raise
        finally:
            path.write_bytes(right)
    door(world, 1, world.root)


def test_what_a_site_has_is_looked_at_byte_for_byte_before_it_is_used(world: World) -> None:
    """The commands of a site hand the folder and their root to those that are tried above."""
    models.pull(world.home, world.connection, "toy", lambda *_: None)
    place = models.usable(world.home, "toy", 0.0)
    command("verify", place, "--root", world.root)
    for path in sorted(place.iterdir()):
        right = path.read_bytes()
        path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=path.name):
            command("verify", place, "--root", world.root)
        path.write_bytes(right)


def test_a_withdrawn_version_opens_no_door_whatever_became_of_its_marker(world: World) -> None:
    """Withdrawn by the bundle's own word, by the registry's alone, or by an alias that was edited to name it."""
    number = world.register(world.federation, "gone")
    world.registry.withdraw("toy", number, "wrong units")
    marker = world.place(number) / "withdrawn.json"
    for _ in range(2):
        for name, door in DOORS.items():
            try:
                assert "withdrawn" in refused(door, world, number)
            except AssertionError:
                if (
                    name != "promote"
                ):  # a withdrawn version is not one to promote: refused by its state, code 3
                    raise
        marker.unlink(missing_ok=True)
    path = world.registry.folder / "registry.json"
    right = path.read_bytes()
    document = json.loads(right)
    document["models"]["toy"]["champion"] = number
    path.write_text(json.dumps(document))
    try:
        assert "was withdrawn (wrong units)" in refused(SERVE, world, number)
        with pytest.raises(IntegrityError, match="was withdrawn"):
            models.pull(world.home, world.connection, "toy", lambda *_: None)
    finally:
        path.write_bytes(right)


def test_a_version_that_is_served_and_then_edited_back_into_use_is_not(world: World) -> None:
    """A program that has it in memory serves it no more, whatever alias names it."""
    watcher = Watcher(Settings(world.registry.folder, world.folder, roots=(world.root,)))
    (before,) = watcher.first().values()
    assert before.default is not None
    path = world.registry.folder / "registry.json"
    right = path.read_bytes()
    document = json.loads(right)
    document["models"]["toy"]["versions"][0] |= {"withdrawn": True, "why": "wrong units"}
    path.write_text(json.dumps(document) + "\n")
    try:
        after = watcher.again()
        assert after is not None
        assert after["toy"].default is None
    finally:
        path.write_bytes(right)


def test_an_unknown_signer_opens_no_door(world: World, tmp_path: Path) -> None:
    """Another federation's bundle, though sound; and ours, where another root is trusted."""
    other = found(tmp_path / "other")
    number = world.register(other, "foreign")
    for name in ("verify", "verify a folder", "predict", "serve a folder", "export", "gate"):
        said = refused(DOORS[name], world, number)
        assert "signature.json" in said
        assert other.root_fingerprint in said
        if name != "gate":
            assert "signature.json" in refused(DOORS[name], world, 1, other.root_fingerprint)
    assert "signature.json" in refused(SERVE, world, 1, other.root_fingerprint)


def test_a_version_that_too_few_sites_approved_opens_no_door(world: World) -> None:
    """It may be gated and looked at, which is how sites come to approve it; nothing else."""
    number = world.register(world.federation, "waits", approvals=1)
    for name in ("verify", "verify a folder", "predict", "serve a folder", "export", "promote"):
        assert "0 of 1 sites have approved" in refused(DOORS[name], world, number)
    for name in ("gate", "fetch"):
        DOORS[name](world, number, world.root)
