"""Studies, runs, commits and events: what is durable, in which order, and what is left after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from breast_cancer import study_text

from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.study import Study
from consortium.server.archive import Archive
from consortium.server.link import nameless
from consortium.server.states import FINISHED, RUNNING, WAITING
from consortium.server.store import Store

STUDY = Study.parse(study_text(2))


def opened(folder: Path) -> Archive:
    return Archive(Store(folder / "db"), folder / "checkpoints")


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    found = opened(tmp_path)
    found.submit(STUDY)
    return found


def commit(archive: Archive, run: str, round: int, content: bytes = b"state", **more: object) -> None:
    file = nameless(archive.folder)
    os.write(file, content)
    archive.commit(run, round, 0, file, "0" * 64, **more)  # type: ignore[arg-type]
    os.close(file)


def test_runs_of_a_study_are_numbered_and_keep_its_text(archive: Archive) -> None:
    """A study that is submitted again in another form leaves the runs that began with the first form as they are."""
    first = archive.propose(STUDY.name)
    other = STUDY.with_(study={"rounds": 9})
    archive.submit(other)
    second = archive.propose(STUDY.name)
    assert (first.name, second.name) == ("breast-cancer.1", "breast-cancer.2")
    assert archive.run(first.name) == first
    assert archive.latest(STUDY.name) == second
    assert [run.digest for run in archive.runs()] == [other.digest, STUDY.digest]
    assert archive.text_of(STUDY.digest) == STUDY.text
    assert archive.text_of(other.digest) == other.text
    assert archive.text_of("0" * 64) is None
    assert [(one["name"], one["run"], one["state"]) for one in archive.studies()] == [
        ("breast-cancer", "breast-cancer.2", "proposed")
    ]


def test_a_run_of_no_study_is_refused(archive: Archive) -> None:
    """And says how to submit one."""
    with pytest.raises(InputError, match="consortium study submit"):
        archive.propose("other")


def test_every_change_of_state_is_an_event(archive: Archive) -> None:
    """A repeated state is none; another reason is one, and does not change since when."""
    run = archive.propose(STUDY.name).name
    for state, why in ((WAITING, "a"), (WAITING, "a"), (WAITING, "b"), (RUNNING, "")):
        archive.move(run, state, why)
    found = archive.events(run)
    assert [(e["kind"], e["state"], e["why"]) for e in found] == [
        ("state", WAITING, "a"),
        ("state", WAITING, "b"),
        ("state", RUNNING, ""),
    ]
    assert archive.events(run, found[0]["id"], 1) == found[1:2]
    now = archive.run(run)
    assert now is not None
    assert now.since == found[2]["at"]


def test_a_commit_replaces_the_one_before_and_brings_its_events(archive: Archive) -> None:
    """One file a run is left, of the last commit; each event once."""
    run = archive.propose(STUDY.name).name
    for number in (1, 2):
        commit(archive, run, number, b"%d" % number, events=[{"kind": "round", "round": number}])
    kept = archive.committed(run)
    assert kept is not None
    assert [path.name for path in archive.folder.iterdir()] == [kept.file]
    file = archive.open(run, kept)
    assert os.read(file, 9) == b"2"
    os.close(file)
    assert [event["round"] for event in archive.events(run)] == [1, 2]


def test_bytes_and_name_reach_the_disk_before_the_row(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut in between leaves the commit before; one after it finds the file whole."""
    run, kept = archive.propose(STUDY.name).name, os.fsync
    synced: list[tuple[str, bool]] = []

    def fsync(file: int) -> None:
        kept(file)
        named = [path.stat().st_ino for path in archive.folder.iterdir()]
        what = "folder" if os.path.samestat(os.fstat(file), archive.folder.stat()) else "file"
        synced.append((what, os.fstat(file).st_ino in named or what == "folder"))
        assert archive.committed(run) is None

    monkeypatch.setattr(os, "fsync", fsync)
    commit(archive, run, 1)
    assert synced == [("file", True), ("folder", True)]
    assert archive.committed(run) is not None


def test_what_no_commit_names_is_swept_at_the_start(archive: Archive, tmp_path: Path) -> None:
    """Files that a crash left go, files of commits stay."""
    run = archive.propose(STUDY.name).name
    commit(archive, run, 1)
    (archive.folder / f"{run}.2.0.deadbeef").write_bytes(b"of a crash before its row")
    again = opened(tmp_path)
    kept = again.committed(run)
    assert kept is not None
    assert [path.name for path in again.folder.iterdir()] == [kept.file]


def test_only_new_files_without_a_name_become_checkpoints(archive: Archive, tmp_path: Path) -> None:
    """So whoever hands over a descriptor cannot have any other file linked, and later removed."""
    run = archive.propose(STUDY.name).name
    (tmp_path / "key").write_text("secret")
    file, (pipe, other) = os.open(tmp_path / "key", os.O_RDONLY), os.pipe()
    for one in (file, pipe):
        with pytest.raises(IntegrityError, match="a new file without a name"):
            archive.commit(run, 1, 0, one, "0" * 64)
    assert archive.committed(run) is None
    assert list(archive.folder.iterdir()) == []
    for one in (file, pipe, other):
        os.close(one)


def test_a_failed_commit_leaves_the_one_before(archive: Archive) -> None:
    """Where the events cannot be written, neither is the row, and the old file is still there."""
    run = archive.propose(STUDY.name).name
    commit(archive, run, 1, b"good")
    with pytest.raises(ValueError, match="Out of range float"):
        commit(archive, run, 2, b"bad", events=[{"kind": "round", "seconds": float("nan")}])
    kept = archive.committed(run)
    assert kept is not None
    assert kept.round == 1
    os.close(archive.open(run, kept))


def test_a_missing_checkpoint_is_said(archive: Archive) -> None:
    """With its path and what to do."""
    run = archive.propose(STUDY.name).name
    commit(archive, run, 1)
    kept = archive.committed(run)
    assert kept is not None
    (archive.folder / kept.file).unlink()
    with pytest.raises(IntegrityError, match="restore it from a backup"):
        archive.open(run, kept)


def test_a_commit_without_its_folder_is_an_error_for_people(archive: Archive) -> None:
    """The path and the cause, and no traceback of the system's."""
    run = archive.propose(STUDY.name).name
    file = nameless(archive.folder)
    archive.folder.rename(archive.folder.with_name("gone"))
    with pytest.raises(ConsortiumError, match="cannot be written"):
        archive.commit(run, 1, 0, file, "0" * 64)
    assert archive.committed(run) is None
    os.close(file)


def test_whoever_waits_for_events_is_woken(archive: Archive) -> None:
    """At once, and not by another run's."""
    run, other = archive.propose(STUDY.name).name, archive.propose(STUDY.name).name
    woken: list[float] = []

    def wait() -> None:
        assert archive.wait(run, 0, 30)
        woken.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    archive.move(other, RUNNING)
    assert not archive.wait(run, 0, 0.05)
    archive.move(run, FINISHED)
    moved = time.monotonic()
    thread.join(10)
    assert woken[0] - moved < 1


_COMMITTING = """
import os, sys
from pathlib import Path
from consortium.server.archive import Archive
from consortium.server.link import nameless
from consortium.server.store import Store
folder = Path(sys.argv[1])
archive = Archive(Store(folder / "db"), folder / "checkpoints")
number = 0
while True:
    number += 1
    file = nameless(archive.folder)
    os.write(file, str(number).encode() * 1000)
    archive.commit("breast-cancer.1", number, 0, file, str(number), [{"kind": "round", "round": number}])
    os.close(file)
    print(number, flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_whole_commit(archive: Archive, tmp_path: Path) -> None:
    """What was said to be committed is there, with its file, its content and its events; nothing else is."""
    archive.propose(STUDY.name)
    for pause in (0.0, 0.003, 0.011, 0.017, 0.05):
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMITTING, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        said = [1, *(int(line) for line in process.stdout.read().split())][-1]
        process.wait()
        process.stdout.close()
        again = opened(tmp_path)
        kept = again.committed("breast-cancer.1")
        assert kept is not None
        assert said <= kept.round <= said + 1
        assert [path.name for path in again.folder.iterdir()] == [kept.file]
        assert (again.folder / kept.file).read_bytes() == kept.sha256.encode() * 1000
        assert again.events("breast-cancer.1", 0, 100_000)[-1]["round"] == kept.round


def test_old_checkpoints_of_finished_runs_go_and_their_records_stay(tmp_path: Path) -> None:
    """Thirty days after it finished a run's vectors go; its rounds stay, and all of runs that did not finish."""
    now = [1e9]
    store = Store(tmp_path / "db")
    archive = Archive(store, tmp_path / "checkpoints", lambda: now[0])
    archive.submit(STUDY)
    names = [archive.propose(STUDY.name).name for _ in range(3)]
    for name, state in zip(names, ("finished", "failed", "running"), strict=True):
        commit(
            archive,
            name,
            2,
            events=[{"kind": "round", "round": 2, "admitted": {"a": 1.0}, "model": "0" * 64}],
        )
        archive.move(name, state)
    now[0] += 29.9 * 86400
    assert archive.retire() == []
    now[0] += 0.2 * 86400
    assert archive.retire() == [names[0]]
    assert archive.retire() == []
    files = {path.name for path in archive.folder.iterdir()}
    kept = [archive.committed(name) for name in names]
    assert [one is not None and one.file in files for one in kept] == [False, True, True]
    assert kept[0] is not None
    assert kept[0].round == 2
    assert [event["model"] for event in archive.events(names[0]) if event["kind"] == "round"] == ["0" * 64]
    Archive(store, tmp_path / "checkpoints")  # the next start
    assert {path.name for path in archive.folder.iterdir()} == files
    store.close()
