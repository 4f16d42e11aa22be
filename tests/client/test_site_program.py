"""`consortium client start` as a process with its real worker: bits, kills, secrets, ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heaps import heaps
from site_world import SITE, World, program, retold, wait_for

from consortium.client import mapping
from consortium.client.charges import ledger_in
from consortium.client.datasets import Datasets
from consortium.client.site import Site, open_site, start
from consortium.client.task import Source, task_of
from consortium.protocol.endings import OVER
from consortium.protocol.layout import digest_of
from consortium.protocol.messages import Instruction, Payload, Statistics
from consortium.protocol.study import Study
from consortium.strategies.chosen import strategy_of

PASSWORD = "s3cret-of-the-database"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path).with_data()
    yield one
    one.end()


def inline(world: World, study: Study) -> Site:
    """The site as a simulation makes it, over the source itself."""
    torch.set_num_threads(1)
    own = mapping.load(world.folder / "mapping.toml")
    key = Datasets(world.home).get("patients").key()
    task, local = task_of(study), strategy_of(study).local
    source = Source(SITE, world.folder / "patienten.csv", mapping=own, key=key)
    return open_site(study, task, local, start(study, task, local), source)


def ask(
    world: World, study: Study, kind: str, round: int, sums: Statistics | None = None, **more: Any
) -> Instruction:
    """An instruction with the study's first model."""
    task, local = task_of(study), strategy_of(study).local
    net = start(study, task, local)
    vectors = {} if kind == "query" else {"shared": np.array(net.vector("shared"))}
    if kind == "train" and net.layout["control"].size:
        vectors["control"] = np.zeros(net.layout["control"].size, net.layout["control"].numpy_dtype)
    return world.instruction(
        kind,
        round,
        study=study.digest,
        layout=net.layout.digest,
        model=digest_of([vectors["shared"]]) if vectors else "",
        payload=Payload(vectors, sums or {}),
        **more,
    )


def with_study(world: World, **sections: Any) -> Study:
    """Another study that the server has and the policy allows."""
    study = world.study.with_(**sections)
    world.studies[study.digest] = study.text
    return study


LONG = {"training": {"lr": 0.01, "local_epochs": 6000}}


def test_a_site_answers_as_in_a_simulation_bit_for_bit(world: World) -> None:
    """Query, train (SCAFFOLD, with state between rounds) and evaluate by a real worker, one process for all, equal the
    simulation's site; nothing but the answers' own nonce differs. The agent's threads share one heap, it ends in 5 s,
    and it leaves no process."""
    study = with_study(world, strategy={"name": "scaffold"}, study={"rounds": 2})
    site = inline(world, study)
    with program(world) as one:
        query = ask(world, study, "query", 0)
        answers = [world.answer_to(query)]
        sums = answers[0].payload.statistics
        questions = [
            ask(world, study, "train", 1, sums),
            ask(world, study, "train", 2, sums, admitted=1),
            ask(world, study, "evaluate", 2, sums, admitted=2),
        ]
        answers += [world.answer_to(question) for question in questions]
        assert [answer.status for answer in answers] == ["done"] * 4
        assert [retold(answer) for answer in answers] == [retold(site.answer(q)) for q in (query, *questions)]
        assert one.log.count("is started") == 1
        assert answers[1].payload.vectors["control"].any()
        assert heaps(one.process.pid) == 1
        world.endings = lambda poll: world.ended(poll, OVER) if poll["runs"] else None
        wait_for(lambda: not list(world.home.spool.iterdir()), 5, "the copy of the data stays")
        assert one.end() < 5
        assert one.children() == []


def test_a_program_in_training_ends_within_five_seconds(world: World) -> None:
    """SIGTERM in mid-training: the agent ends, and so does its worker, with all of its session."""
    study = with_study(world, **LONG)
    with program(world) as one:
        world.offer(ask(world, study, "train", 1, expires=time.time() + 100))
        wait_for(lambda: one.state() == "training" and bool(one.children()), 20, "not in training")
        (worker,) = one.children()
        time.sleep(1)
        assert one.end() < 5
        assert not Path(f"/proc/{worker}").exists()


@pytest.mark.slow
def test_a_worker_that_is_killed_in_training_is_replaced(world: World) -> None:
    """kill -9 of the worker: another one gives the same answer as if nothing had happened; polls go on meanwhile."""
    study = with_study(world, training={"lr": 0.01, "local_epochs": 3000})
    question = ask(world, study, "train", 1)
    with program(world) as one:
        world.answer_to(ask(world, study, "query", 0))  # the worker is warm then
        nonce = world.offer(question)
        wait_for(lambda: one.state() == "training", 20, "not in training")
        (worker,) = one.children()
        time.sleep(0.5)  # of about six seconds of processor time
        os.kill(worker, signal.SIGKILL)
        before = len(world.polls)
        answer = world.answer(nonce, 100)
        assert len(world.polls) - before >= 3
        assert one.children() != [worker]
    assert retold(answer) == retold(inline(world, study).answer(question))
    assert "SIGKILL" in one.log


@pytest.mark.slow
def test_an_answer_that_was_stored_but_not_sent_is_sent_after_a_restart(world: World) -> None:
    """kill -9 of the agent when the answer was kept, before it was sent: its worker dies too, and the next agent sends
    the same bytes without computing anything (the data are gone by then)."""
    question = ask(world, world.study, "train", 1)
    world.refuse[question.nonce] = 500
    with program(world) as one:
        world.offer(question)
        wait_for(lambda: world.puts > 0, 60, "not sent")
        (worker,) = one.children()
        one.process.kill()
        one.process.wait()
        wait_for(lambda: not Path(f"/proc/{worker}").exists(), 5, "the worker lives on")
    expected = inline(world, world.study).answer(question)
    world.refuse.clear()
    (copy,) = world.home.spool.glob("*/snapshot/.sealed/0")
    copy.chmod(0o600)
    copy.write_text("nothing\n")
    again = ask(world, world.study, "train", 1)
    del world.offers[question.nonce]
    with program(world):
        answer = world.answer_to(again)
    assert retold(answer) == retold(expected)


def test_a_void_private_round_tried_again_gets_the_same_bytes_and_costs_nothing(world: World) -> None:
    """Noise would make a new answer another release: the next attempt gets the bytes of the one before, signed for it,
    and is not charged. A site that lost what it kept computes anew, and is charged before that leaves."""
    privacy = {"mechanism": "dp-sgd", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}
    study = with_study(world, privacy=privacy)

    def charges() -> int:
        book = ledger_in(world.home, world.home.lock())
        return len(book.accounts()["patients"].charges)

    with program(world):
        first, second = (world.answer_to(ask(world, study, "train", 1, attempt=number)) for number in (0, 1))
        assert (first.attempt, second.attempt, charges()) == (0, 1, 1)
        assert first.payload.vectors["shared"].tobytes() == second.payload.vectors["shared"].tobytes()
        other = ask(world, study, "train", 1, attempt=2, admitted=1)
        third = world.answer_to(other)  # not the same question: it is computed, and charged
        assert third.payload.vectors["shared"].tobytes() != second.payload.vectors["shared"].tobytes()
        assert charges() == 2
    for kept in world.home.state.iterdir():
        kept.unlink()
    with program(world):
        fourth = world.answer_to(ask(world, study, "train", 1, attempt=3))
        assert fourth.payload.vectors["shared"].tobytes() != third.payload.vectors["shared"].tobytes()
        assert charges() == 3


@pytest.mark.slow
def test_pause_ends_the_worker_and_resume_takes_part_again(world: World) -> None:
    """By the command line: the worker is gone at once, the server hears why; after `resume` the work is done."""
    study = with_study(world, **LONG)
    client = Path(sys.executable).with_name("consortium")
    with program(world) as one:
        nonce = world.offer(ask(world, study, "train", 1))
        wait_for(lambda: one.state() == "training" and bool(one.children()), 20, "not in training")
        subprocess.run([client, "client", "pause", "--dir", one.folder], check=True, timeout=20)
        assert world.answer(nonce, 5).reason == "the site is paused by its operator"
        assert one.children() == []
        assert one.status()["paused"] is True
        said = subprocess.run(
            [client, "client", "status", "--dir", one.folder],
            check=True,
            timeout=20,
            capture_output=True,
            text=True,
        ).stdout
        assert "no, paused" in said
        subprocess.run([client, "client", "resume", "--dir", one.folder], check=True, timeout=20)
        short = ask(world, world.study, "train", 1, run="another")
        assert world.answer_to(short).status == "done"


@pytest.mark.slow
def test_work_that_outlasts_its_instruction_is_ended(world: World) -> None:
    """At the expiry the worker is ended; the next instruction gets another one and is done."""
    study = with_study(world, training={"lr": 0.01, "local_epochs": 10_000})
    with program(world) as one:
        nonce = world.offer(ask(world, study, "train", 1, expires=time.time() + 8))
        wait_for(lambda: one.state() == "failed", 20, "not ended")
        assert one.children() == []
        assert nonce not in world.answers
        assert world.answer_to(ask(world, world.study, "train", 1, run="another")).status == "done"


def test_no_secret_is_where_others_can_see_it(world: World) -> None:
    """A database's password and the key file's secret stand in no argument, no environment of a worker, no log, no
    copy; and the agent holds neither torch nor pandas nor sqlalchemy nor flwr in memory."""
    secret = Path(world.home.config.key_file).read_text().strip()
    environment = {"HOSPITAL_PASSWORD": PASSWORD, "CONSORTIUM_PASSPHRASE": "a passphrase of hospital 1"}
    with program(world, environment) as one:
        assert world.answer_to(ask(world, world.study, "train", 1)).status == "done"
        (worker,) = one.children()
        seen = Path(f"/proc/{worker}/environ").read_bytes() + Path(f"/proc/{worker}/cmdline").read_bytes()
        seen += Path(f"/proc/{one.process.pid}/cmdline").read_bytes() + one.log.encode()
        seen += world.home.log.read_bytes()
        for word in (PASSWORD, secret, "a passphrase of hospital 1", "HOSPITAL_PASSWORD"):
            assert word.encode() not in seen
        libraries = Path(f"/proc/{one.process.pid}/maps").read_text()
        for word in ("torch", "pandas", "pyarrow", "sqlalchemy", "flwr"):
            assert f"/{word}/" not in libraries
        assert "torch" in Path(f"/proc/{worker}/maps").read_text()


def test_the_agents_modules_import_nothing_heavy() -> None:
    """Neither torch nor pandas, pyarrow, sqlalchemy, flwr or sklearn: the agent stays small, and reads no data."""
    code = (
        "import sys, consortium.client.program, consortium.client.cli; print([m for m in ('torch', 'pandas', "
        "'pyarrow', 'sqlalchemy', 'flwr', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_what_the_policy_does_not_allow_and_data_that_do_not_fit_are_declined(world: World) -> None:
    """No rule, data that are not registered, data that lack a column: declined, with a reason that names no path and
    no column of the site's own; the log says more."""
    with program(world) as one:
        world.home.policy_file.write_text("format = 1\n")
        answers = [world.answer_to(ask(world, world.study, "train", 1))]
        world.allow(data="elsewhere")
        answers.append(world.answer_to(ask(world, world.study, "train", 2)))
        Datasets(world.home).remove("patients")
        bare = world.folder / "bare.csv"
        bare.write_text("radius_mm,befund\n1.0,gut\n")
        Datasets(world.home).add("bare", str(bare), world.folder / "mapping.toml")
        world.allow(data="bare")
        answers.append(world.answer_to(ask(world, world.study, "train", 3)))
        wait_for(lambda: "mean_texture" in one.log, 5, "the log does not say more")
    assert [answer.status for answer in answers] == ["declined"] * 3
    reasons = [answer.reason for answer in answers]
    assert (
        reasons[0] == 'policy: there is no [[allow]] of task = "consortium.client.tasks.tabular:Classifier"'
    )
    assert reasons[1] == "the site's policy names data that the site has not registered"
    assert "mistakes" in reasons[2]
    for reason in reasons:
        assert not any(word in reason for word in ("radius_mm", "befund", str(world.folder), "bare"))


def test_a_second_agent_over_the_same_folder_is_refused(world: World) -> None:
    """With exit code 2 and a word on what to do."""
    with program(world) as one:
        done = subprocess.run(
            [Path(sys.executable).with_name("consortium"), "client", "start", "--dir", one.folder],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    assert done.returncode == 2
    assert "an agent runs here already" in done.stderr
