"""What a real server tells sites of runs that ended, and when."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from breast_cancer import study_text
from realm import Actor, Realm, realm

from consortium.protocol import endings, wire
from consortium.protocol.study import Study
from consortium.server.archive import Archive
from consortium.server.endings import news, word
from consortium.server.states import EARLY, FAILED, FINISHED, PAUSED, RUNNING, STOPPED, WAITING
from consortium.server.store import Store


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    store = Store(tmp_path / "consortium.db")
    yield Archive(store, tmp_path / "checkpoints")
    store.close()


def run_in(archive: Archive, state: str, committed: bool = True) -> str:
    """A study's new run, in that state."""
    study = Study.parse(study_text(4, study={"name": "s"}))
    archive.submit(study)
    run = archive.propose("s")
    if committed:
        file = os.open(archive.folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        archive.commit(run.name, 1, 0, file, "")
        os.close(file)
    archive.move(run.name, state)
    return run.name


@pytest.mark.parametrize("state", [FINISHED, EARLY, STOPPED])
def test_what_has_ended_is_over(archive: Archive, state: str) -> None:
    """Finished, finished early, stopped."""
    assert word(archive, run_in(archive, state)) == endings.OVER


@pytest.mark.parametrize("state", [WAITING, RUNNING, PAUSED])
def test_nothing_is_said_of_a_run_under_way(archive: Archive, state: str) -> None:
    """Nor of one that is unknown here, as after a backup was restored: a site keeps what it has of both."""
    run = run_in(archive, state)
    assert news(archive, {run: "", "unknown.1": ""}) == {}


def test_a_failed_run_is_over_when_it_cannot_be_resumed(archive: Archive) -> None:
    """Where nothing was committed, or a newer run of its study has begun; and each word is said once."""
    assert word(archive, run_in(archive, FAILED, committed=False)) == endings.OVER
    run = run_in(archive, FAILED)
    assert news(archive, {run: ""}) == {run: endings.FAILED}
    assert news(archive, {run: endings.FAILED}) == {}
    run_in(archive, RUNNING)
    assert news(archive, {run: endings.FAILED}) == {run: endings.OVER}


@pytest.fixture(scope="module")
def lung(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Realm]:
    with realm(tmp_path_factory.mktemp("lung")) as one:
        yield one


@pytest.fixture(scope="module")
def alba(lung: Realm) -> Actor:
    return lung.join("alba")


def poll(alba: Actor, runs: Any, nonce: Any = "ab" * 32) -> tuple[int, dict[str, str]]:
    """A poll's status, and what it is told; the statement is found to be the server's, for this site and nonce."""
    document = {"format": wire.FORMAT, "have": [], "paused": False, "runs": runs, "nonce": nonce}
    said = alba.ask("POST", wire.POLL, document)
    if said.status != 200:
        return said.status, {}
    content = endings.signed(json.loads(said.body), alba.home.trust().keys)
    return 200, endings.said(content, "lung", "alba", nonce, runs)


def test_an_open_poll_hears_at_once_that_its_run_was_stopped(lung: Realm, alba: Actor) -> None:
    """Well within a second or two, and a poll that comes later hears it at its begin; no other run is mentioned."""
    run = lung.begin("first", min_sites=1)
    assert alba.asked().about.run == run
    heard: list[tuple[float, Any]] = []

    def listen() -> None:
        while not heard:
            document = {
                "format": 1,
                "have": [],
                "paused": True,
                "runs": {run: "", "x.1": ""},
                "nonce": "cd" * 32,
            }
            said = alba.ask("POST", wire.POLL, document)
            if said.status == 200:
                heard.append((time.monotonic(), json.loads(said.body)))

    thread = threading.Thread(target=listen)
    thread.start()
    time.sleep(0.5)
    assert not heard
    begun = time.monotonic()
    assert lung.admin("POST", f"/v1/studies/{run}/stop").status == 200
    thread.join(20)
    assert heard[0][0] - begun < 3
    content = endings.signed(heard[0][1], alba.home.trust().keys)
    assert endings.said(content, "lung", "alba", "cd" * 32, [run]) == {run: endings.OVER}
    begun = time.monotonic()
    assert poll(alba, {run: ""}) == (200, {run: endings.OVER})
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("runs", "nonce"),
    [
        ([], "ab" * 32), ({"r": "over"}, "ab" * 32), ({"r": 1}, "ab" * 32), ({"r": ""}, "ab"), ({"r": ""}, 5),
        ({f"r{n}": "" for n in range(endings.MOST_RUNS + 1)}, "ab" * 32), ({"r" * 201: ""}, "ab" * 32),
    ],
)  # fmt: skip
def test_a_poll_that_asks_otherwise_is_refused(alba: Actor, runs: Any, nonce: Any) -> None:
    """Other types, words or lengths, or too many: 400."""
    assert poll(alba, runs, nonce)[0] == 400
