"""A whole federation that runs short in mid-run: of the server's disk, of a worker's memory."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from live import COMMAND, Live, hospitals, simulated, study

from consortium.protocol.errors import ConsortiumError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SITES = 2


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One whose server's folder is a file system of its own, of 24 MiB."""
    folder = tmp_path_factory.mktemp("scarce")
    place = folder / "server"
    place.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "none", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with hospitals(folder, SITES, COMMAND) as one:
            yield one
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


def test_a_server_whose_disk_is_full_says_so_and_goes_on(federation: Live) -> None:
    """Its disk fills up after round 2: an error names it and no round is lost or made twice. With room again, and the
    run resumed if it failed meanwhile, the model has the bytes of `simulate`."""
    ballast = federation.folder / "server" / "ballast"
    one = study("full", SITES, rounds=6)
    right = simulated(one, list(federation.places.values()))
    federation.start(one)
    federation.committed(one.name, 2)
    federation.until(lambda: said(federation, one.name, ballast), 120, "nobody says that the disk is full")
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


def test_a_worker_whose_memory_is_used_up_costs_its_site_a_round(federation: Live) -> None:
    """It may map nothing more in mid-run: the admin reads so, rounds go on without the site; with memory again, the
    same worker counts in the next."""
    one, short = study("short", SITES, rounds=300, epochs=1, least=1), "hospital-1"
    federation.start(one)
    federation.committed(one.name, 1)
    worker = federation.worker(short)
    before = resource.prlimit(worker, resource.RLIMIT_AS)
    resource.prlimit(worker, resource.RLIMIT_AS, (4096, before[1]))

    def left_out() -> str:
        return str(federation.show(one.name)["sites"][short]["last_error"] or "")

    federation.until(lambda: "ran out of memory" in left_out(), 60, "nobody says that memory is used up")
    resource.prlimit(worker, resource.RLIMIT_AS, before)
    federation.until(lambda: not left_out(), 60, "the site does not count again")
    assert federation.worker(short) == worker
    federation.admin.post(f"/v1/studies/{one.name}/stop")
    federation.over(one.name)
