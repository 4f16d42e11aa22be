"""Backups: whole, of one moment, opened by whoever has the key alone, and laid out again whole or not at all."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from breast_cancer import study_text
from founded import found

from consortium.protocol.errors import IntegrityError
from consortium.protocol.layout import digest_of
from consortium.protocol.study import Study
from consortium.server.archive import Archive
from consortium.server.backup import ABOUT, back_up, restore
from consortium.server.check import check
from consortium.server.checkpoint import Writer
from consortium.server.federation import CHECKPOINTS, DATABASE, Federation
from consortium.server.link import nameless
from consortium.server.records import RunState
from consortium.server.store import Store

RUN = "breast-cancer.1"


class Folder:
    """A server's folder with a run, in which a test commits rounds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.federation = found(path)
        self.store = Store(path / DATABASE)
        self.archive = Archive(self.store, path / CHECKPOINTS, key=self.federation.data_key())
        self.archive.submit(Study.parse(study_text(2)))
        self.archive.propose("breast-cancer")
        (path / "runs" / RUN).mkdir()
        (path / "runs" / RUN / "log.txt").write_text("a line\n")
        (path / "spool" / "of now").write_text("not kept")

    def commit(self, round: int) -> None:
        model = np.full(300_000, round, np.float32)
        state = RunState(round, 0, model, digest_of([model]), None, {}, {})
        file = nameless(self.path / CHECKPOINTS)
        sha256 = Writer(RUN, self.archive.key_of(RUN)).write(state, file).sha256
        self.archive.commit(RUN, round, 0, file, sha256, [{"kind": "round", "round": round}])
        os.close(file)


@pytest.fixture
def fed(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "fed")
    made.commit(1)
    return made


def consortium(*words: object) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("consortium")
    return subprocess.run(
        [command, *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_backup_is_restored_elsewhere_in_a_new_epoch(fed: Folder, tmp_path: Path) -> None:
    """By the commands as the documentation shows them: the same root, roster, keys and checkpoint, in another folder,
    under a key file that was brought there; nothing of the spool; the epoch is later than the one before."""
    said = consortium("server", "backup", "--dir", fed.path, "--out", tmp_path)
    assert said.returncode == 0, said.stderr
    (file,) = tmp_path.glob("*.backup")
    assert file.stat().st_mode & 0o777 == 0o600
    shutil.move(tmp_path / "fed.key", tmp_path / "brought.key")
    new = tmp_path / "machine" / "fed"
    said = consortium("server", "restore", file, "--dir", new)
    assert said.returncode == 2
    assert "fed.key" in said.stderr
    assert "--key-file" in said.stderr
    assert not new.exists()
    said = consortium("server", "restore", file, "--dir", new, "--key-file", tmp_path / "brought.key")
    assert said.returncode == 0, said.stderr
    again = Federation.open(new)
    assert again.root_fingerprint == fed.federation.root_fingerprint
    assert again.epoch > fed.federation.epoch == 0
    assert list((new / "spool").iterdir()) == []
    assert (new / "runs" / RUN / "log.txt").read_text() == "a line\n"
    said = consortium("server", "check", "--dir", new)
    assert (said.returncode, "round 1, whole" in said.stdout) == (0, True), said.stderr
    second = back_up(new, tmp_path / "second.backup")
    assert (
        restore(second.path, tmp_path / "third", tmp_path / "brought.key", now=0.0).epoch == again.epoch + 1
    )


def test_a_backup_is_of_one_moment_while_rounds_are_committed(fed: Folder, tmp_path: Path) -> None:
    """Backups during a storm of commits, each of which removes the checkpoint of the one before, restore and check."""
    ended = threading.Event()

    def storm() -> None:
        number = 1
        while not ended.is_set():
            number += 1
            fed.commit(number)
            ended.wait(0.01)  # the fastest rounds that were seen take 15 ms

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        for number in range(4):
            file = back_up(fed.path, tmp_path / f"{number}.backup").path
            made = restore(file, tmp_path / f"fed-{number}", tmp_path / "fed.key")
            assert check(made.path).checkpoints[RUN] >= 1
            assert check(fed.path).checkpoints[RUN] >= 1
    finally:
        ended.set()
        thread.join()


def members(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as tar:
        return {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]


def written(path: Path, content: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, one in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(one)
            tar.addfile(entry, io.BytesIO(one))
    return path


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def last_epoch(content: dict[str, bytes]) -> dict[str, bytes]:
    return {**content, ABOUT: content[ABOUT].replace(b'"epoch": 0', b'"epoch": 9')}


ALTERED: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
    "a certificate": lambda c: {**c, "root.pem": flip(c["root.pem"])},
    "the database": lambda c: {**c, DATABASE: flip(c[DATABASE])},
    "what it says of itself": last_epoch,
    "left out": lambda c: {name: one for name, one in c.items() if name != "trust.json"},
    "added": lambda c: {"more.txt": b"", **c},
    "outside": lambda c: {"../evil": b"", **c},
    "absolute": lambda c: {"/tmp/evil": b"", **c},
    "not ended": lambda c: {name: one for name, one in c.items() if name != ABOUT},
    "another data key": lambda c: {**c, "data.key": flip(c["data.key"])},
}


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_backup_is_refused(fed: Folder, tmp_path: Path, how: str) -> None:
    """Exit code 4, and nothing is laid out, inside or outside of the folder."""
    whole = back_up(fed.path, tmp_path / "whole.backup").path
    file = written(tmp_path / "altered.backup", ALTERED[how](members(whole)))
    before = sorted(tmp_path.iterdir())
    said = consortium(
        "server", "restore", file, "--dir", tmp_path / "new", "--key-file", tmp_path / "fed.key"
    )
    assert said.returncode == 4, said.stderr
    assert "Traceback" not in said.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("length", [0, 1000, -100_000])
def test_half_a_backup_is_refused(fed: Folder, tmp_path: Path, length: int) -> None:
    """A file that was cut off, or is none."""
    whole = back_up(fed.path, tmp_path / "whole.backup").path.read_bytes()
    (tmp_path / "half.backup").write_bytes(whole[:length])
    with pytest.raises(IntegrityError, match="half"):
        restore(tmp_path / "half.backup", tmp_path / "new", tmp_path / "fed.key")
    assert not (tmp_path / "new").exists()


def test_nothing_is_ever_replaced(fed: Folder, tmp_path: Path) -> None:
    """Neither a live folder by a restore nor a file by a backup: exit code 2."""
    file = back_up(fed.path, tmp_path / "one.backup").path
    before = file.read_bytes()
    assert consortium("server", "backup", "--dir", fed.path, "--out", file).returncode == 2
    said = consortium("server", "restore", file, "--dir", fed.path)
    assert (said.returncode, "not empty" in said.stderr) == (2, True)
    assert file.read_bytes() == before
    assert check(fed.path).checkpoints == {RUN: 1}


@pytest.mark.parametrize("what", ["checkpoint", "database", "gone", "key"])
def test_damage_is_found_by_check(fed: Folder, what: str) -> None:
    """Exit code 4, naming the file, and what to type."""
    (checkpoint,) = (fed.path / CHECKPOINTS).iterdir()
    fed.store.close()
    damaged = {"database": fed.path / DATABASE, "key": fed.path / "data.key"}.get(what, checkpoint)
    if what == "gone":
        checkpoint.unlink()
    else:
        with damaged.open("r+b") as file:
            file.seek(damaged.stat().st_size // 2)
            file.write(b"damage" * 700)
    said = consortium("server", "check", "--dir", fed.path)
    assert said.returncode == 4, said.stderr
    assert damaged.name in said.stderr
    assert "backup" in said.stderr
