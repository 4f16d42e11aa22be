"""A whole federation whose server's disk fills up in mid-run, and has room again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from live import COMMAND, Live, hospitals, simulated, study

from consortium.protocol.errors import ConsortiumError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SITES = 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB of our own, for the server's folder."""
    place = tmp_path / "server"
    place.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "none", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(ballast: Path) -> None:
    """Write until nothing more fits."""
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def said(federation: Live, name: str, ballast: Path) -> bool:
    """Whether the server has said that its disk is full; until then what it frees is taken."""
    fill(ballast)
    with suppress(ConsortiumError):  # a door that cannot write may refuse
        if "disk full" in federation.show(name)["why"]:
            return True
    logs = federation.logs()
    return any(word in logs for word in ("No space left", "disk is full", "disk full"))


def test_a_server_whose_disk_is_full_says_so_and_goes_on(disk: Path) -> None:
    """Its disk fills up after round 2: an error names it and no round is lost or made twice. With room again, and the
    run resumed if it failed meanwhile, the model has the bytes of `simulate`."""
    ballast = disk / "ballast"
    with hospitals(disk.parent, SITES, COMMAND) as federation:
        one = study("full", SITES, rounds=6)
        right = simulated(one, list(federation.places.values()))
        federation.start(one)
        federation.committed(one.name, 2)
        federation.until(
            lambda: said(federation, one.name, ballast), 120, "nobody says that the disk is full"
        )
        ballast.unlink()
        federation.end("server")
        federation.start_server()
        federation.gather()
        if federation.show(one.name)["state"] == "failed":
            assert "disk" in federation.show(one.name)["why"]
            federation.admin.post(f"/v1/studies/{one.name}/resume")
        shown = federation.over(one.name, 300)
        assert (shown["state"], shown["why"]) == ("finished", ""), federation.logs()
        assert federation.model(one.name) == right
        rounds = [event["round"] for event in federation.events(one.name) if not event["void"]]
        assert rounds == list(range(7))
