"""A run's records over link and database: appended by its commits, read again by who goes on, and bounded."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from breast_cancer import study_text

from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.layout import digest_of
from consortium.protocol.sealed import DataKey, Sealed, Sealer, new_data_key
from consortium.protocol.study import Study
from consortium.server import checkpoint, run_records
from consortium.server.archive import Archive
from consortium.server.conversation import Conversation
from consortium.server.link import BATCH, Link, LinkCommits, nameless
from consortium.server.records import Evaluation, Round, RunState, followed
from consortium.server.store import Store

KEY = new_data_key()
STUDY = Study.parse(study_text(100))
RUN = "breast-cancer.1"


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    store = Store(tmp_path / "db")
    found = Archive(store, tmp_path / "checkpoints", key=KEY)
    found.submit(STUDY)
    found.propose(STUDY.name)
    yield found
    store.close()


@contextmanager
def linked(archive: Archive) -> Iterator[Link]:
    """The link of a run's process to its conversation with the server."""
    ours, its = socket.socketpair()
    nothing = SimpleNamespace(close=lambda run: None, forget=lambda run: None, committed=lambda void: None)
    child: Any = SimpleNamespace(connection=its)
    one = Conversation(RUN, "fed", STUDY, child, archive, nothing, nothing)

    def hold() -> None:
        try:
            one.hold()
        except ConsortiumError:
            its.close()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield Link(ours)
    finally:
        ours.close()
        thread.join(30)
        its.close()


def begun() -> RunState:
    model = np.arange(3, dtype=np.float32)
    return RunState(0, 0, model, digest_of([model]), None, {}, {})


def one_more(state: RunState) -> RunState:
    """A round, and an evaluation of the one before."""
    number = state.round + 1
    record = Round(number, 0, ("a",), {"a": 1.0}, {"b": f"declined {number}"}, state.digest, 0.5)
    judged = Evaluation(number - 1, state.digest, {"n": float(number)}, {})
    return replace(
        state,
        round=number,
        rounds=followed(state.rounds, record),
        evaluations=followed(state.evaluations, judged) if number > 1 else state.evaluations,
    )


def reasons(state: RunState) -> list[str]:
    return [one.left_out["b"] for one in state.rounds]


def commits(link: Link, archive: Archive) -> LinkCommits:
    return LinkCommits(link, RUN, archive.folder, archive.key_of(RUN))


def test_who_goes_on_finds_every_record(archive: Archive) -> None:
    """Each process commits three rounds; the next reads all records of those before, page by page, and each row holds
    one line that shows nothing."""
    right: list[str] = []
    for _ in range(3):
        with linked(archive) as link:
            made = commits(link, archive)
            state = made.load() or begun()
            assert reasons(state) == right
            for _ in range(3):
                state = made.commit(one_more(state))
                right.append(f"declined {state.round}")
            assert reasons(state) == right
            assert [one.pooled["n"] for one in state.evaluations] == list(range(2, state.round + 1))
    rows = archive.store.rows("SELECT kind, place, content FROM records ORDER BY kind, place")
    assert [(row["kind"], row["place"]) for row in rows] == [
        *(("evaluations", place) for place in range(8)),
        *(("rounds", place) for place in range(9)),
    ]
    assert not [row for row in rows if b"declined" in row["content"]]


def test_pages_hold_every_line_once(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a single line fills one."""
    monkeypatch.setattr(run_records, "PAGE", 400)
    with linked(archive) as link:
        made, state = commits(link, archive), begun()
        for _ in range(9):
            state = made.commit(one_more(state))
        assert reasons(state) == [f"declined {number}" for number in range(1, 10)]


def test_a_record_that_is_lost_or_another_is_found(archive: Archive) -> None:
    """A process that goes on says so in place of going on with less."""
    with linked(archive) as link:
        made, state = commits(link, archive), begun()
        for _ in range(3):
            state = made.commit(one_more(state))
    with archive.store.transaction() as db:
        db.execute("UPDATE records SET place = 9 WHERE kind = 'rounds' AND place = 2")
    with linked(archive) as link, pytest.raises(IntegrityError, match="rounds 2 of 3 are there"):
        commits(link, archive).load()
    with archive.store.transaction() as db:
        db.execute(
            "UPDATE records SET content = (SELECT content FROM records WHERE place = 0) WHERE place = 1"
        )
        db.execute("UPDATE records SET place = 2 WHERE place = 9")
    with linked(archive) as link, pytest.raises(IntegrityError, match="not those that were committed"):
        commits(link, archive).load()


def test_records_of_a_commit_that_never_was_count_for_nothing(archive: Archive) -> None:
    """They are replaced by those of the one that was."""
    with linked(archive) as link:
        made = commits(link, archive)
        made.commit(one_more(begun()))
    odd = {"rounds": checkpoint.Added(1, [b"a torn world", b"another"])}
    run_records.keep(archive.store, RUN, odd)
    with linked(archive) as link:
        made = commits(link, archive)
        state = made.load()
        assert state is not None
        state = made.commit(one_more(made.commit(one_more(state))))
        assert reasons(state) == ["declined 1", "declined 2", "declined 3"]


@pytest.mark.parametrize(
    "call",
    [
        lambda link: link.call("keep", records={"rounds": [0, ["AAAA"]]}),  # told of nothing yet
        lambda link: link.call("records", kind="rounds", start=1 << 70),
        lambda link: link.call("records", kind="rounds", start=-1),
        lambda link: link.call("keep", records={"rounds": [0, "no list"]}),
        lambda link: link.call("keep", records={"others": [0, []]}),
    ],
    ids=["more than told", "far", "before", "no lines", "another kind"],
)
def test_a_process_keeps_no_more_than_its_own(archive: Archive, call: Callable[[Link], Any]) -> None:
    """The server ends a process that would fill its disk."""
    with linked(archive) as link, pytest.raises(IntegrityError, match="it was stopped"):
        call(link)
    assert archive.store.rows("SELECT * FROM records") == []


def test_a_run_of_the_version_before_goes_on(tmp_path: Path, archive: Archive) -> None:
    """Its database is upgraded, and the records that its checkpoint holds are beside it from the next commit on; where
    that is interrupted, the next process begins again."""
    state, key = begun(), archive.key_of(RUN)
    for _ in range(BATCH + 3):
        state = one_more(state)
    file = nameless(archive.folder)
    sha256 = as_before(state, file, key)
    told = [{"kind": "round", "round": one.round} for one in state.rounds]
    told += [{"kind": "evaluation"} for _ in state.evaluations]
    archive.commit(RUN, state.round, 0, file, sha256, told)
    archive.store.close()
    with closing(sqlite3.connect(tmp_path / "db")) as db:
        db.executescript("DROP TABLE records; PRAGMA user_version = 1;")
    store = Store(tmp_path / "db")
    assert (tmp_path / "db.format-1").exists()
    again = Archive(store, tmp_path / "checkpoints", key=KEY)
    right = [f"declined {number}" for number in range(1, BATCH + 4)]
    run_records.keep(store, RUN, {"rounds": checkpoint.Added(0, [b"of a process that was killed"] * 3)})
    for more in (1, 2):
        with linked(again) as link:
            made = commits(link, again)
            found = made.load()
            assert found is not None
            assert reasons(found) == right
            found = made.commit(one_more(found))
            right.append(f"declined {BATCH + 3 + more}")
            assert reasons(found) == right
            assert len(found.evaluations) == len(right) - 1
    store.close()


def as_before(state: RunState, file: int, key: DataKey) -> str:
    """Write a state as format 1 has it, with its records in the file; the SHA-256 of the document."""
    writer = checkpoint.Writer(RUN, key)
    held = os.memfd_create("as it is now")
    written = writer.write(state, held)
    whole = bytes(Sealed(held, key).read())
    os.close(held)
    document, end = checkpoint._document(memoryview(whole), written.sha256)
    arrays, place = [whole[:end]], end
    for kind, one in written.added.items():
        lines = b"".join(one.lines)
        sha = hashlib.sha256(lines).hexdigest()
        about = {"place": kind, "name": "", "dtype": "|u1", "shape": [len(lines)], "sha256": sha}
        document["parts"].append({**about, "start": place})
        arrays.append(lines)
        place += len(lines)
    del document["history"]
    content = json.dumps({**document, "format": 1}, separators=(",", ":")).encode()
    begun = checkpoint.Begun(state.model, file, Sealer(key))
    for piece in (*arrays, content, len(content).to_bytes(8, "big") + b"CSCP"):
        begun.put(piece)
    begun.end()
    return str(hashlib.sha256(content).hexdigest())
