"""A site's charges over real TLS: the server countersigns heads, and an older ledger spends nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from site_world import World

from consortium.client.charges import Charges, checked, ledger_in
from consortium.protocol.errors import IntegrityError


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path)
    yield one
    one.end()


def charges(world: World) -> Charges:
    home = world.home
    return Charges(home, home.lock(), lambda: home.connection(home.lock()))


def spend(world: World, run: str) -> None:
    charges(world).charge(world.instruction(run=run), world.study, "patients")


def test_an_older_ledger_is_found_by_the_server_and_spends_nothing(world: World) -> None:
    """With the countersignature of then beside it too; with the newest copy back the site goes on."""
    home = world.home
    files = [home.ledger_file, home.witness_file]
    spend(world, "r.1")
    old = [path.read_bytes() for path in files]
    spend(world, "r.2")
    new = [path.read_bytes() for path in files]
    for path, content in zip(files, old, strict=True):
        path.write_bytes(content)
    checked(home, ledger_in(home, home.lock()))  # by itself it is sound
    with pytest.raises(IntegrityError, match="older copy") as found:
        spend(world, "r.3")
    assert found.value.exit_code == 4
    assert home.ledger_file.read_bytes() == old[0]
    for path, content in zip(files, new, strict=True):
        path.write_bytes(content)
    spend(world, "r.3")
    assert ledger_in(home, home.lock()).head.sequence == 3


def test_a_ledger_cut_behind_its_countersignature_is_found_without_the_server(world: World) -> None:
    """The head that was countersigned last lies beside it."""
    spend(world, "r.1")
    short = world.home.ledger_file.read_bytes()
    spend(world, "r.2")
    world.home.ledger_file.write_bytes(short)
    with pytest.raises(IntegrityError, match="entry 2 is missing"):
        checked(world.home, ledger_in(world.home, world.home.lock()))
