"""The power is cut, or the disk fails, at each file operation by which a site decides, charges or leaves out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from founded import Doors, open_doors
from power_cut import How, interrupted

from consortium.client import exclusions, joining
from consortium.client.approvals import Approval, Approvals
from consortium.client.audit import site_audit
from consortium.client.charges import ledger_in
from consortium.client.home import Home
from consortium.privacy.ledger import Budget, Charge, Question
from consortium.protocol import audit, bundle, chain
from consortium.protocol.study import Study

NOW = 2e9
CODE = {"task.py": b"class Own:\n    pass\n"}
OWN = bundle.of(
    Study.parse('format = 1\n[study]\nname = "own"\ntask = "task:Own"\nrounds = 5\n', code=CODE), CODE
)
BUDGET = Budget(3.0, 1e-5, "record")


class World:
    """A federation's doors, and a site that has joined."""

    def __init__(self, doors: Doors, place: Path) -> None:
        self.doors = doors
        self.home = joining.join(doors.code("site-1"), place / "site", environment={}).home
        self.key = self.home.identity(self.home.lock())

    def approve(self, folder: Path) -> None:
        study = OWN.study
        approval = Approval("lung", "site-1", study.name, study.digest, OWN.digest, "patients", 5, NOW + 9)
        Approvals(Home(folder)).approve(self.key, OWN, approval, NOW)

    def charge(self, folder: Path) -> None:
        charge = Charge("patients", Question("own.1", 1, 0, "m" * 64), "own", "record", "none", None)
        ledger_in(Home(folder), self.home.lock()).charge(charge, 5, NOW)

    def decided(self, folder: Path) -> object:
        """The last decision, whose bundle is whole where it approves."""
        last = Approvals(Home(folder)).last(self.key.public_key(), OWN.digest)
        if last is not None and last.kind == "approved":
            assert bundle.read((folder / "bundles" / f"{OWN.digest}{bundle.SUFFIX}").read_bytes()) == OWN
        return last and last.kind

    def account(self, folder: Path) -> object:
        found = ledger_in(Home(folder), self.home.lock()).accounts().get("patients")
        return found and (found.budget, len(found.charges))

    def told(self, folder: Path) -> list[str]:
        """The audit log, which is sound; a torn line that is cut away tells of itself."""
        log = site_audit(Home(folder), self.key)
        audit.verify(folder / "audit", log.name, [self.key.public_key()])
        kinds = [one.kind for one in chain.entries(audit.segments(folder / "audit"), log.name)]
        return [kind for kind in kinds if kind != audit.REPAIRED]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    place = tmp_path_factory.mktemp("site")
    with open_doors(place / "fed") as doors:
        yield World(doors, place)


@dataclass(frozen=True)
class Act:
    """What is done over what was done before it, and what there is to see of it."""

    do: Callable[[World, Path], object]
    look: Callable[[World, Path], object]
    before: Callable[[World, Path], object] = lambda world, folder: None


def exclude(*ids: str) -> Callable[[World, Path], object]:
    return lambda _, folder: exclusions.change(folder, "id", ids)


def covered(_: World, folder: Path) -> object:
    found = exclusions.read(folder)
    return [one for one in ("1", "2", "3") if found.digests and found.covers(one)]


ACTS = {
    "approve": Act(World.approve, World.decided),
    "reject": Act(
        lambda world, folder: Approvals(Home(folder)).reject(world.key, OWN, "no", NOW),
        World.decided,
        World.approve,
    ),
    "budget": Act(
        lambda world, folder: ledger_in(Home(folder), world.home.lock()).allow("patients", BUDGET, NOW),
        World.account,
    ),
    "charge": Act(World.charge, World.account, lambda world, folder: None),
    "note": Act(
        lambda world, folder: site_audit(Home(folder), world.key).note("budget", {"data": "patients"}),
        World.told,
    ),
    "first exclusion": Act(exclude("1"), covered),
    "another exclusion": Act(exclude("2", "3"), covered, exclude("1")),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fails", "torn", "cut"])
@pytest.mark.parametrize("name", ACTS)
def test_what_a_site_keeps_is_as_before_or_as_after(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: How
) -> None:
    """A decision, a budget, a charge, an entry of the audit log, a person who is left out: there or not, and there once
    it was said to be; the same again ends well, and every log is sound."""
    act = ACTS[name]

    def prepare(folder: Path) -> None:
        shutil.copytree(world.home.folder, folder, dirs_exist_ok=True)
        act.before(world, folder)

    stage = tmp_path / "stage"
    prepare(stage)
    before = act.look(world, stage)
    act.do(world, stage)
    after = act.look(world, stage)
    assert before != after
    for one in interrupted(tmp_path, monkeypatch, how, prepare, lambda folder: act.do(world, folder)):
        left = act.look(world, one.folder)
        assert left in ((after,) if one.over else (before, after)), one
        world.told(one.folder)
        if left == before:
            act.do(world, one.folder)
            assert act.look(world, one.folder) == after
            world.told(one.folder)
