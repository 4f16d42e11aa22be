"""The power is cut, or the disk fails, at each file operation of an act on a registry of models."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from founded import found
from power_cut import How, interrupted

from consortium.protocol import audit, chain
from consortium.protocol.audit import Audit
from consortium.protocol.delivery import approval
from consortium.protocol.errors import IntegrityError
from consortium.protocol.files import private_folder
from consortium.protocol.signing import APPROVAL, MEMBER, raw, sign
from consortium.server import seal, vouching
from consortium.server.federation import Federation
from consortium.server.model import verified
from consortium.server.serving import acts, gate_file
from consortium.server.serving.registry import STATE, Registry
from consortium.server.serving.versions import State

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
LOG = "audit lung server 00"
GATE = {"federation": "lung", "model": "m", "version": 2, "passed": True, "why": []}


class World:
    """A federation's keys, and two bundles that it signed. stages: a folder of its server's before each act."""

    def __init__(self, place: Path) -> None:
        self.federation: Federation = found(place / "fed")
        self.bundles = [self._bundle(place / f"b{number}", number) for number in (1, 2)]
        self.stages = [private_folder(place / "0")]
        (place / "0" / "server.toml").touch()
        self.log(place / "0").note("begun", {})
        for number, act in enumerate(ACTS.values(), 1):
            self.stages.append(shutil.copytree(self.stages[-1], place / f"{number}"))
            act(self, self.stages[-1])

    def _bundle(self, where: Path, number: int) -> Path:
        where.mkdir()
        files = {"contract.json": b"{}", "model.onnx": b"%d" % number * 3000}
        for name, content in files.items():
            (where / name).write_bytes(content)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = seal.manifest(hashes, self.federation.config.name)
        (where / "manifest.json").write_bytes(manifest)
        (where / "signature.json").write_bytes(seal.signature(self.federation.seal(manifest)))
        return where

    def log(self, folder: Path) -> Audit:
        """The audit log, as another program opens it."""
        return Audit(folder / "audit", LOG, lambda: KEY, lambda: [KEY.public_key()], lambda: 7.0)

    def registry(self, folder: Path) -> Registry:
        """The registry, likewise."""
        return Registry(folder / gate_file.MODELS, lambda: 7.0, "anna", self.log(folder).note)

    def register(self, folder: Path, number: int) -> None:
        """Register a bundle."""
        bundle = self.bundles[number - 1]
        self.registry(folder).register(bundle, "m", lambda copy: verified(copy)["model.onnx"][:1].hex())

    def approve(self, folder: Path) -> None:
        """Put a site's approval of version 2 in."""
        name, identity = self.federation.config.name, raw(KEY.public_key()).hex()
        digest = seal.read(folder / "models/m/2").digest
        signature = sign(KEY, APPROVAL, approval(name, "site-1", digest)).hex()
        member = self.federation.seal(vouching.member_text(name, "site-1", identity), MEMBER)
        self.registry(folder).approve(
            "m",
            2,
            "site-1",
            lambda content: seal.with_approval(content, "site-1", identity, signature, member),
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


Do = Callable[[World, Path], object]
ACTS: Mapping[str, Do] = {
    "the first is registered": lambda world, folder: world.register(folder, 1),
    "the second is registered": lambda world, folder: world.register(folder, 2),
    "one is promoted": lambda world, folder: world.registry(folder).promote("m", 1, "a test", ungated=True),
    "one is gated": lambda world, folder: world.registry(folder).gated("m", 2, GATE, world.federation.seal),
    "a site approves": lambda world, folder: world.approve(folder),
    "the other is promoted": lambda world, folder: world.registry(folder).promote("m", 2, "it", ungated=True),
    "it is rolled back": lambda world, folder: world.registry(folder).rollback("m", "worse"),
    "the champion is withdrawn": lambda world, folder: world.registry(folder).withdraw("m", 1, "wrong units"),
}
"""One after the other, each over what those before it left."""


def look(folder: Path) -> dict[str, Any]:
    """Everything that counts: the registry's state, and what each bundle in it is, approved by whom, gated or not."""
    if not (folder / "models" / STATE).exists():
        return {}
    state = Registry(folder / "models", lambda: 7.0).state()
    seen: dict[str, Any] = {"state": state}
    for version in state.models["m"].versions:
        place = folder / "models/m" / str(version.number)
        try:
            seen[f"bundle {version.number}"] = sorted(verified(place)), seal.read(place).approved
        except IntegrityError as error:
            seen[f"bundle {version.number}"] = "withdrawn" if "was withdrawn" in str(error) else str(error)
        gate = gate_file.place(folder / "models", "m", version.number)
        seen[f"gate {version.number}"] = gate.exists() and gate_file.read(gate)[0]
    return seen


def names_in(folder: Path) -> list[str]:
    """Every file and folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def agrees(folder: Path) -> bool:
    """Whether audit log and registry tell the same; the log alone may know of the act that was cut off."""
    state = (
        Registry(folder / "models", lambda: 7.0).state() if (folder / "models" / STATE).exists() else State()
    )
    audit.verify(folder / "audit", LOG, [KEY.public_key()])
    try:
        acts.check(folder / STATE, state, list(chain.entries(audit.segments(folder / "audit"), LOG)))
    except IntegrityError as error:
        if f"lacks act {len(state.history) + 1} " not in str(error):
            raise
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fails", "torn", "cut"])
@pytest.mark.parametrize("name", ACTS)
def test_an_act_on_a_registry_is_done_or_not(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: How
) -> None:
    """Whatever happens at any file operation: the registry is as before or as after, each bundle that it names is
    whole, the same command typed again ends well, nothing is left beside, and the audit log knows of all that counts.
    An act that returned is there."""
    do, number = ACTS[name], list(ACTS).index(name)
    before, after = look(world.stages[number]), look(world.stages[number + 1])
    files = names_in(world.stages[number + 1])

    def prepare(folder: Path) -> None:
        shutil.copytree(world.stages[number], folder, dirs_exist_ok=True)

    for one in interrupted(tmp_path, monkeypatch, how, prepare, lambda folder: do(world, folder)):
        left = look(one.folder)
        if one.over:
            assert left == after
            assert agrees(one.folder)
            continue
        agrees(one.folder)
        assert left.get("state") in (before.get("state"), after["state"])
        for key in left:  # what the act changes beside the state may be there before it, and nothing else
            assert left[key] in (before.get(key), after[key]), key
        if left.get("state") == after["state"]:  # all that was missing is that the command says so
            assert left == after
            continue
        do(world, one.folder)
        assert look(one.folder) == after
        assert agrees(one.folder)
        assert names_in(one.folder) == files
