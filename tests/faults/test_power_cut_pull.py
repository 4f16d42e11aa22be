"""The power is cut, or the disk fails, at each file operation of what a site does with the federation's models."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from founded import Doors, open_doors
from power_cut import How, interrupted

from consortium.client import joining, models
from consortium.client.audit import Note, site_audit
from consortium.client.home import Home
from consortium.protocol import audit, chain
from consortium.protocol.errors import ConsortiumError
from consortium.server import seal
from consortium.server.model import verified
from consortium.server.serving.registry import Registry

NEW, NEXT, SIGNED, GONE, SEEN = "new", "next", "signed", "gone", "seen"
"""Models: not here yet; here, with another champion since; approved since; withdrawn since; to be approved."""


class World:
    """A federation's doors, and a site whose folder is as `stage`, each model as its name says."""

    def __init__(self, doors: Doors, place: Path) -> None:
        self.doors, self.registry = doors, Registry(doors.federation.folder / "models", time.time)
        self.stage = joining.join(doors.code("site-1"), place / "site", environment={}).home
        self.key = self.stage.identity(self.stage.lock())
        for name in (NEW, NEXT, SIGNED, GONE, SEEN):
            for number in (1, 2):
                bundle = self._bundle(place / f"{name}-{number}", number)
                self.registry.register(bundle, name, lambda copy: verified(copy)["contract.json"].hex())
            self.registry.promote(name, 1, "a test", ungated=True)
        for name in (NEXT, SIGNED, GONE):
            self.pull(self.stage.folder, name)
        self.registry.promote(NEXT, 2, "a test", ungated=True)
        self.approve(self.stage.folder, SIGNED)
        self.registry.withdraw(GONE, 1, "wrong units")

    def _bundle(self, where: Path, number: int) -> Path:
        where.mkdir()
        files = {"contract.json": b"{}", "model.onnx": b"%d" % number * 3000}
        for name, content in files.items():
            (where / name).write_bytes(content)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = seal.manifest(hashes, self.doors.federation.config.name)
        (where / "manifest.json").write_bytes(manifest)
        (where / "signature.json").write_bytes(seal.signature(self.doors.federation.seal(manifest)))
        return where

    def _with(self, folder: Path, do: Callable[..., object]) -> None:
        connection = self.stage.connection(self.stage.lock())
        home = Home(folder)
        try:
            do(home, connection, site_audit(home, self.key).note)
        finally:
            connection.close()

    def pull(self, folder: Path, name: str) -> None:
        """As the command."""
        self._with(folder, lambda home, connection, note: models.pull(home, connection, name, note))

    def approve(self, folder: Path, name: str) -> None:
        """As the command."""

        def do(home: Home, connection: object, note: Note) -> None:
            _, said = models.fetch(home, connection, name, 1)  # type: ignore[arg-type]
            models.approve(home, connection, self.key, said, note)  # type: ignore[arg-type]

        self._with(folder, do)

    def check(self, folder: Path) -> None:
        """As the agent."""
        self._with(folder, models.check)

    def look(self, folder: Path, name: str) -> str:
        """Which version may be used: whole, and signed by the federation and by whom else; or why none may."""
        try:
            place = models.usable(Home(folder), name, time.time())
            files = verified(place, self.doors.federation.root_fingerprint)
        except ConsortiumError as error:
            return "withdrawn" if "was withdrawn" in str(error) else str(error).replace(str(folder), "")
        return f"{place.name} {files['model.onnx'][:1]!r} {seal.read(place).approved}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    place = tmp_path_factory.mktemp("pull")
    with open_doors(place / "fed") as doors:
        yield World(doors, place)


ACTS: Mapping[str, Callable[[World, Path], None]] = {
    NEW: lambda world, folder: world.pull(folder, NEW),
    NEXT: lambda world, folder: world.pull(folder, NEXT),
    SIGNED: lambda world, folder: world.pull(folder, SIGNED),
    SEEN: lambda world, folder: world.approve(folder, SEEN),
    GONE: lambda world, folder: world.check(folder),
}


def told(world: World, folder: Path, name: str) -> list[str]:
    """What the site's audit log, which is sound, tells of a model."""
    log = site_audit(Home(folder), world.key).name
    audit.verify(folder / "audit", log, [world.key.public_key()])
    found = chain.entries(audit.segments(folder / "audit"), log)
    return [entry.kind for entry in found if entry.body.get("model") == name]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fails", "torn", "cut"])
@pytest.mark.parametrize("name", ACTS)
def test_a_model_at_a_site_is_as_before_or_as_after(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: How
) -> None:
    """Whatever happens at any file operation of a pull, a review and approval, or the agent's look: what may be used is
    what might be before or what may be after, whole and verified; the same again ends well and leaves nothing beside;
    and what is used here now, or no more, is in the audit log."""
    act, stage = ACTS[name], world.stage.folder

    def prepare(folder: Path) -> None:
        shutil.copytree(stage, folder, dirs_exist_ok=True)

    done = shutil.copytree(stage, tmp_path / "done")
    act(world, done)
    before, after = world.look(stage, name), world.look(done, name)
    assert (name == SEEN) == (before == after)
    files = sorted(path.relative_to(done) for path in (done / "models" / name).rglob("*"))
    for one in interrupted(tmp_path, monkeypatch, how, prepare, lambda folder: act(world, folder)):
        left = world.look(one.folder, name)
        assert left in ((after,) if one.over else (before, after)), one
        if left == after:
            assert told(world, one.folder, name)[-1:] == told(world, done, name)[-1:] or name == SEEN
        if not one.over:
            act(world, one.folder)
        assert world.look(one.folder, name) == after
        assert told(world, one.folder, name)[-1:] == told(world, done, name)[-1:]
        assert (
            sorted(path.relative_to(one.folder) for path in (one.folder / "models" / name).rglob("*"))
            == files
        )


def test_what_a_cut_left_of_a_file_is_fetched_again_where_it_is_not_right(
    world: World, tmp_path: Path
) -> None:
    """A disk may have the length of a file and not its bytes: that costs one more fetch, not another command."""
    folder = shutil.copytree(world.stage.folder, tmp_path / "site")
    part = folder / "models" / NEW / ".1.part"
    for content in (bytes(3000), b"1" * 2000 + bytes(500), b"1" * 4000):
        shutil.rmtree(folder / "models" / NEW, ignore_errors=True)
        part.mkdir(parents=True)
        (part / "model.onnx").write_bytes(content)
        world.pull(folder, NEW)
        assert world.look(folder, NEW) == "1 b'1' ()"
