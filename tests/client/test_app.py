"""The site's end over Flower: its real ClientApp, over Flower's in-memory Grid, and what it keeps on disk."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower_world import Node, World, task
from flwr.app import ConfigRecord, Context, Message, RecordDict

from consortium.client.app import answer_to, app
from consortium.client.folder import source_in
from consortium.client.site import Memory, start
from consortium.client.store import Kept, Store, fingerprint
from consortium.client.task import task_of
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.protocol.layout import digest_of
from consortium.protocol.messages import Answer, Instruction, Payload, decode
from consortium.protocol.sealed import DataKey, Sealed, new_data_key
from consortium.protocol.study import Study
from consortium.server.coordinator import run
from consortium.server.grid import FlowerSites
from consortium.server.records import InMemory, Outcome, Plan
from consortium.simulations.hospitals import study_of, write_hospitals
from consortium.simulations.simulation import simulate
from consortium.simulations.sites import gather
from consortium.strategies.chosen import strategy_of

SCAFFOLD = 'name = "scaffold"'
KEY = new_data_key()
_one_at_a_time = threading.Lock()


@pytest.fixture
def hospitals(tmp_path: Path) -> dict[str, Path]:
    return write_hospitals(tmp_path / "sites", 3)


def client(site: str, folder: Path) -> Node:
    """A node that runs the real ClientApp, each message as in a process of its own: nothing is kept but on disk."""

    def reply(message: Message) -> Message:
        config: Any = {"site": site, "folder": str(folder)}
        context = Context(message.metadata.run_id, 1, config, RecordDict(), {})
        with _one_at_a_time:  # in life each site has a process of its own
            return app(message, context)

    return reply


def plan_of(study: Study) -> Plan:
    strategy = strategy_of(study)
    net = start(study, task_of(study), strategy.local)
    return Plan(study, strategy, net.layout, net.vector("shared"), prepares=True)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as Flower's, first on the path, for the study."""
    folder = tmp_path / "app"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    with task():
        yield folder


def over_flower(study: Study, hospitals: dict[str, Path], installed: Path, spool: Path) -> Outcome:
    (installed / "study.toml").write_text(study.text)
    grid = World({site: client(site, folder) for site, folder in hospitals.items()})
    plan = plan_of(study)
    sites = FlowerSites(grid, plan.layout, spool)
    return run(plan, sites, InMemory(), clock=time.time, rng=random.Random(0))


@pytest.mark.parametrize("strategy", ['name = "fedavg"', SCAFFOLD])
def test_over_flower_and_in_simulation_the_model_has_the_same_bits(
    strategy: str, hospitals: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    """Sites that keep everything on disk, asked through Flower's messages, make the model that `simulate` makes."""
    study = study_of(3, strategy)
    outcome = over_flower(study, hospitals, installed, tmp_path)
    assert outcome.status == "finished"
    expected = simulate(study, sites=gather(study, list(hospitals.values())).sources, processes=0).outcome
    assert outcome.digest == expected.digest
    assert outcome.evaluation is not None
    assert expected.evaluation is not None
    assert outcome.evaluation.pooled == expected.evaluation.pooled


def test_what_a_site_declines_reaches_the_server_as_a_reason(
    hospitals: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    """A site whose table is broken is left out with what is wrong; no cell of it and no traceback is in the reason."""
    table = hospitals["hospital-3"] / "patients.csv"
    table.write_text(table.read_text().replace("oui", "very secret"))
    outcome = over_flower(study_of(1), hospitals, installed, tmp_path)
    assert outcome.status == "finished"
    reason = outcome.state.rounds[0].left_out["hospital-3"]
    assert "hospital-3" in reason
    assert "1 mistake" in reason
    assert "secret" not in reason
    assert "Traceback" not in reason
    assert str(hospitals["hospital-3"].parent) not in reason


def instruction(of: Study, **values: Any) -> Instruction:
    plan = plan_of(of)
    usual: dict[str, Any] = {
        "federation": "f", "run": "r", "round": 1, "attempt": 0, "kind": "train", "study": of.digest,
        "model": digest_of([plan.initial]), "layout": plan.layout.digest, "nonce": "n1",
        "expires": time.time() + 60, "payload": Payload({"shared": plan.initial}), "site": "hospital-1",
    }  # fmt: skip
    return Instruction(**{**usual, **values})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"site": "hospital-2"}, "for another site"),
        ({"study": "0" * 64}, "for another study"),
        ({"expires": 1.0}, "has expired"),
        ({"layout": "0" * 64}, "not what it says"),
        ({"model": "0" * 64}, "not what it says"),
        ({"payload": Payload({"shared": np.zeros(4, np.float32)})}, "not what it says"),
        ({"payload": Payload()}, "not what it says"),
    ],
)
def test_an_instruction_that_is_not_for_this_site_study_or_model_is_refused(
    values: dict[str, Any], reason: str, hospitals: dict[str, Path]
) -> None:
    """A site acts only on what names it, its study, a time to come, and the model that came along."""
    study = study_of(1)
    with pytest.raises(ConsortiumError, match=reason):
        answer_to(instruction(study, **values), study, "hospital-1", hospitals["hospital-1"])


def test_asked_again_a_site_gives_the_same_answer_from_disk(hospitals: dict[str, Path]) -> None:
    """The second answer is the first with the new nonce, and nothing is computed: the table is gone by then."""
    study, folder = study_of(1, SCAFFOLD), hospitals["hospital-1"]
    plan = plan_of(study)
    vectors = {"shared": plan.initial, "control": np.zeros(plan.layout["control"].size, np.float32)}
    asked = instruction(study, payload=Payload(vectors), layout=plan.layout.digest)
    first = answer_to(asked, study, "hospital-1", folder)
    shutil.move(folder / "patients.csv", folder / "gone.bak")
    again = answer_to(replace(asked, nonce="n2"), study, "hospital-1", folder)
    assert (first.nonce, again.nonce) == ("n1", "n2")
    assert first.status == again.status == "done"
    assert digest_of(first.payload.vectors.values()) == digest_of(again.payload.vectors.values())
    assert first.metrics.keys() == again.metrics.keys()
    other = answer_to(replace(asked, attempt=1), study, "hospital-1", folder)
    assert other.status == "declined"


def test_nothing_is_computed_twice(hospitals: dict[str, Path]) -> None:
    """What a site answered before its last answer is refused, durably, and not computed anew."""
    study, folder = study_of(1), hospitals["hospital-1"]
    for kind in ("train", "evaluate"):
        assert answer_to(instruction(study, kind=kind), study, "hospital-1", folder).status == "done"
    with pytest.raises(RefusedError, match="computed twice"):
        answer_to(instruction(study), study, "hospital-1", folder)


def test_a_message_that_is_none_of_ours_gets_an_error(installed: Path) -> None:
    """A message that cannot be read is answered by an error in words."""
    message = Message(RecordDict({"header": ConfigRecord({"bytes": b"{"})}), 5, "train")
    reply = client("a", installed)(message)
    assert reply is not None
    assert reply.has_error()
    assert "malformed" in str(reply.error.reason)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_what_is_kept_survives(tmp_path: Path, key: DataKey | None) -> None:
    """Memory and answer come back as they were saved, for the run that they belong to, from a private file."""
    answer = Answer(
        run="r", round=2, attempt=0, kind="train", site="a", nonce="n", model="m", weight=3.0,
        payload=Payload({"shared": np.arange(4, dtype=np.float32)}), metrics={"loss": np.array([1.0, 2.0])},
    )  # fmt: skip
    memory = Memory({"control": np.ones(3)}, {"control": np.full(3, 2.0)}, 2)
    store = Store(tmp_path / "state", "../../r", key)
    assert store.load() == Kept()
    store.save(Kept(memory, answer))
    found = store.load()
    assert found.last is not None
    assert found.memory.pending_round == 2
    assert found.memory.committed["control"].tolist() == [1.0, 1.0, 1.0]
    assert found.memory.pending["control"].tolist() == [2.0, 2.0, 2.0]
    assert found.last.payload.vectors["shared"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert Store(tmp_path / "state", "another", key).load() == Kept()
    (file,) = (tmp_path / "state").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert (b"control" in file.read_bytes()) == (key is None)
    if key is not None:
        with pytest.raises(IntegrityError, match="belongs to another key"):
            Store(tmp_path / "state", "../../r", key.of("another run")).load()


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize("cut", [0, 7, 100])
def test_a_damaged_state_is_refused(cut: int, key: DataKey | None, tmp_path: Path) -> None:
    """A file that was cut off is named, and never taken for a fresh start."""
    answer = Answer(run="r", round=1, attempt=0, kind="evaluate", site="a", nonce="n", model="m")
    store = Store(tmp_path, "r", key)
    store.save(Kept(Memory(), answer))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(IntegrityError, match=file.name):
        store.load()


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_changed_content_is_refused(tmp_path: Path, key: DataKey | None) -> None:
    """An answer of which one bit has changed on the disk is not given again."""
    payload = Payload({"shared": np.arange(40, dtype=np.float32)})
    asked = Instruction("f", "r", 1, 0, "train", "s", "m", "l", "first", 0.0, site="a")
    store = Store(tmp_path, "r", key)
    store.save(Kept(Memory(), Answer.to_instruction(asked, payload=payload)))
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=file.name):
        store.load()


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_the_same_question_gets_the_stored_answer_with_the_nonce_of_now(
    tmp_path: Path, key: DataKey | None
) -> None:
    """Also after a new start: the header with another nonce names the very content that the file begins with."""
    payload = Payload({"shared": np.arange(4, dtype=np.float32)})
    asked = Instruction("f", "r", 1, 0, "train", "s", "m", "l", "first", 0.0, site="a")
    store = Store(tmp_path, "r", key)
    saved = store.save(Kept(Memory(), Answer.to_instruction(asked, payload=payload)))
    for kept in (saved, store.load()):
        header = kept.header_to(replace(asked, nonce="second"))
        assert header is not None
        file = store.open()
        content = Sealed(file, key).read()[:16] if key is not None else os.pread(file, 16, 0)
        os.close(file)
        found = decode(header, bytes(content))
        assert isinstance(found, Answer)
        assert (found.nonce, found.round, found.model) == ("second", 1, "m")
        assert found.payload.vectors["shared"].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert kept.header_to(replace(asked, round=2)) is None
        assert [question for question, _ in kept.given] == [(1, 0, "train", "m")]
        assert kept.given[-1][1] == fingerprint(found)


def test_a_folder_without_a_key_gets_one_once(tmp_path: Path) -> None:
    """A fresh site's holdout key is random, private, and stays."""
    (tmp_path / "rows.csv").write_text("a\n1\n")
    one, two = source_in(tmp_path, "x"), source_in(tmp_path, "x")
    assert one.key == two.key == (tmp_path / "holdout.key").read_bytes()
    assert len(one.key) == 32
    assert (tmp_path / "holdout.key").stat().st_mode & 0o777 == 0o600
    assert one.path == tmp_path / "rows.csv"


def test_a_folder_with_two_tables_is_refused(tmp_path: Path) -> None:
    """Which of two files is meant nobody can tell."""
    for name in ("a.csv", "b.parquet"):
        (tmp_path / name).write_text("a\n1\n")
    with pytest.raises(InputError, match="2 data files"):
        source_in(tmp_path, "x")
