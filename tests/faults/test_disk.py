"""A disk that is full or read-only, a clock that is set, memory that ends: an error says so, and nothing is lost."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from breast_cancer import study_text
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from founded import found

from consortium.client.seen import Place, Seen
from consortium.client.serving_worker import _failure
from consortium.client.site import Memory
from consortium.client.store import Kept
from consortium.client.store import Store as SiteStore
from consortium.protocol import local
from consortium.protocol.errors import ConsortiumError
from consortium.protocol.files import private_folder
from consortium.protocol.layout import digest_of
from consortium.protocol.messages import Answer, Instruction, Payload, encode
from consortium.protocol.sealed import new_data_key
from consortium.protocol.signing import ANSWER, raw, sign
from consortium.protocol.study import Study
from consortium.server.archive import Archive
from consortium.server.check import check
from consortium.server.checkpoint import Writer
from consortium.server.kept_answers import KeptAnswers
from consortium.server.link import Link, LinkClients, LinkCommits, nameless
from consortium.server.offers import Offer, Received, Spooled
from consortium.server.records import RunState
from consortium.server.states import RUNNING, WAITING
from consortium.server.store import Store

KEY = new_data_key()
RUN = "breast-cancer.1"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of our own."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=False).returncode
    ):
        pytest.skip("only root may mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0
    return ballast


def commit(archive: Archive, round: int) -> None:
    model = np.full(100_000, round, np.float32)
    file = nameless(archive.folder)
    try:
        state = RunState(round, 0, model, digest_of([model]), None, {}, {})
        sha256 = Writer(RUN, archive.key_of(RUN)).write(state, file).sha256
        archive.commit(RUN, round, 0, file, sha256, [{"kind": "round", "round": round}])
    finally:
        os.close(file)


def round_of(archive: Archive) -> int:
    """The round of the last commit, read from its file."""
    kept = archive.committed(RUN)
    assert kept is not None
    file = archive.open(RUN, kept)
    try:
        return Writer(RUN, archive.key_of(RUN)).read(file, kept.sha256).round
    finally:
        os.close(file)


def opened(disk: Path) -> tuple[Archive, Store]:
    store = Store(disk / "db")
    return Archive(store, disk / "checkpoints", key=KEY), store


def running(disk: Path) -> tuple[Archive, Store]:
    archive, store = opened(disk)
    archive.submit(Study.parse(study_text(2)))
    archive.propose("breast-cancer")
    archive.move(RUN, RUNNING)
    commit(archive, 1)
    return archive, store


def test_a_full_disk_costs_the_server_nothing_but_time(disk: Path) -> None:
    """Commit and state are refused with a word about the disk; the commit before is there; once there is room the same
    program goes on, and so does the next start."""
    archive, store = running(disk)
    ballast = fill(disk)
    for attempt in range(3):
        with pytest.raises((ConsortiumError, OSError), match=r"disk full|No space"):
            commit(archive, 2)
        with pytest.raises(ConsortiumError, match="is the disk full"):
            archive.move(
                RUN, WAITING, f"{attempt} " + "x" * 500_000
            )  # the database's log may have room for some
        assert round_of(archive) == 1
    ballast.unlink()
    commit(archive, 2)
    archive.move(RUN, RUNNING)
    assert round_of(archive) == 2
    store.close()
    again, store = opened(disk)
    assert round_of(again) == 2
    one = again.run(RUN)
    assert one is not None
    assert one.state == RUNNING
    store.close()


def test_a_read_only_disk_is_named(disk: Path) -> None:
    """The server does not start, or does not commit, and says which file; once it is writable nothing is missing."""
    archive, store = running(disk)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(ConsortiumError, match="db: cannot be written or read"):
        opened(disk)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    archive, store = opened(disk)
    assert round_of(archive) == 1
    store.close()


def test_a_server_on_a_read_only_disk_does_not_start(disk: Path) -> None:
    """Exit code 1 and one line; made writable again, its folder is as it was."""
    command = Path(sys.executable).with_name("consortium")
    found(disk / "fed")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    said = subprocess.run(
        [command, "server", "start", "--dir", disk / "fed"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.returncode == 1
    assert "is the disk full or read-only?" in said.stderr
    assert "Traceback" not in said.stderr
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert check(disk / "fed").checkpoints == {}


def kept(value: float) -> Kept:
    answer = Answer(
        run="r", round=int(value), attempt=0, kind="train", site="a", nonce="n", model="m", weight=1.0,
        payload=Payload({"shared": np.full(300_000, value, np.float32)}),
    )  # fmt: skip
    return Kept(Memory({"control": np.full(3, value)}), answer)


def test_a_full_disk_costs_a_site_nothing_that_it_kept(disk: Path) -> None:
    """An answer that cannot be kept is not sent; the one before and the place in the run stay, also over a restart."""
    store, seen = SiteStore(disk / "state", "r", KEY), Seen(disk / "seen.json", lambda: 2e9)
    store.save(kept(1.0))
    assert seen.accept("r", Place(1, 0))
    ballast = fill(disk)
    with pytest.raises(OSError, match=r"No space left on device.*state"):
        store.save(kept(2.0))
    with pytest.raises(OSError, match=r"No space left on device.*seen"):
        seen.accept("x" * 100_000, Place(2, 0))
    last = SiteStore(disk / "state", "r", KEY).load().last
    assert last is not None
    assert last.round == 1
    assert Seen(disk / "seen.json", lambda: 2e9).last("r") == Place(1, 0)
    ballast.unlink()
    store.save(kept(2.0))
    last = SiteStore(disk / "state", "r", KEY).load().last
    assert last is not None
    assert last.round == 2
    assert not list((disk / "state").glob(".*"))


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_is_set_neither_ends_nor_lengthens_a_round(tmp_path: Path, jump: float) -> None:
    """An hour forward or back in mid-round: what the run waits for is still the study's deadline, less what is over."""
    ours, theirs = socket.socketpair()
    now, waits = [5e9], list[float]()

    def server() -> None:
        while True:
            asked, files = local.receive(theirs)
            local.close(files)
            waits.append(float(asked.get("seconds", 0)))
            local.send(theirs, {"refused": {}} if asked["call"] == "ask" else {})
            if asked["call"] == "answers":
                return

    thread = threading.Thread(target=server)
    thread.start()
    link = Link(ours)
    clients = LinkClients(link, LinkCommits(link, RUN, tmp_path, KEY), tmp_path, lambda: now[0])
    clients.ask(["a"], Instruction("f", RUN, 1, 0, "train", "0" * 64, "m", "l", "n", now[0] + 60))
    now[0] += jump
    time.sleep(0.2)
    assert list(clients.answers(5e9 + 60)) == []
    thread.join()
    ours.close()
    theirs.close()
    assert 55 < waits[-1] <= 59.8


OUT_OF_MEMORY = """
import resource, sys
import torch
import numpy as np
from consortium.client.serving_worker import _failure
resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 * 40,) * 2)
for make in (lambda: torch.zeros(1 << 42), lambda: np.zeros(1 << 42), lambda: bytearray(1 << 44)):
    try:
        make()
    except Exception as error:
        print(_failure(error))
"""


def test_a_worker_whose_memory_ends_says_so() -> None:
    """Whoever of torch, numpy and Python finds it: the admin reads what the site lacks; other faults are told apart."""
    said = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == ["the site's worker ran out of memory"] * 3, said.stderr
    assert "KeyError" in _failure(KeyError("x"))
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_full_disk_takes_no_answer_and_loses_none(disk: Path) -> None:
    """An answer that cannot be kept is refused with a word about the disk, and its site sends it again; what was kept
    before counts still, nothing partial is left, and once there is room it is taken."""
    key = Ed25519PrivateKey.generate()
    spool = private_folder(disk / "spool")
    kept = KeptAnswers(spool, KEY.of, lambda _: raw(key.public_key()).hex())

    def keep(site: str) -> bytes:
        update = Payload({"shared": np.full(20_000, 1.0, np.float32)})
        asked = Instruction("f", RUN, 1, 0, "train", "0" * 64, "m", "l", "n", 5e9).to(site)
        header, views = encode(Answer.to_instruction(asked, weight=1.0, payload=update))
        content = Spooled.new(spool)
        os.write(content.fd, b"".join(views))
        question = encode(asked)[0]
        kept.keep(
            Offer(RUN, site, asked.nonce, question, b"", None, 0, 1 << 20),
            sign(key, ANSWER, header),
            Received(site, header, content),
        )
        return question

    kept.begin(RUN, {"round": 1})
    asked = {"a": keep("a")}
    ballast = fill(disk)
    with pytest.raises(ConsortiumError, match="is the disk full"):
        keep("b")
    with pytest.raises(ConsortiumError, match="is the disk full"):
        kept.begin(RUN, {"round": 2, "more": "x" * 100_000})
    assert sorted(path.name for path in spool.iterdir()) == [f"{RUN}~", f"{RUN}~a"]
    assert kept.asked(RUN) == {"round": 1}
    assert [*kept.answers(RUN, asked, 1 << 20)] == ["a"]
    ballast.unlink()
    asked["b"] = keep("b")
    assert [*kept.answers(RUN, asked, 1 << 20)] == ["a", "b"]
