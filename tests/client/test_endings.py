"""A site is told that a run has ended: what it ends and removes then, and whom it believes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from breast_cancer import study_text
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from site_world import Trivial, World, program, wait_for

from consortium.client.agent import Agent
from consortium.client.home import Home
from consortium.client.seen import Place, Seen
from consortium.client.site import start
from consortium.client.task import task_of
from consortium.protocol.endings import FAILED, OVER
from consortium.protocol.errors import RefusedError
from consortium.protocol.layout import digest_of
from consortium.protocol.messages import Instruction, Payload
from consortium.protocol.signing import INSTRUCTION, sign
from consortium.protocol.study import Study
from consortium.strategies.chosen import strategy_of


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path)
    yield one
    one.end()


@contextmanager
def agent(world: World, work: Trivial) -> Iterator[Agent]:
    """An agent that runs while the block lasts."""
    home = Home(world.home.folder)
    one = Agent(home, home.lock(), work)
    one.start()
    try:
        yield one
    finally:
        one.stop()


def kept(world: World) -> dict[str, str]:
    """What the last poll named."""
    named: dict[str, str] = world.polls[-1]["runs"]
    return named


def telling(world: World, word: str) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """A server that has this word for run "r", and says it to whoever has not been told."""
    return lambda poll: world.ended(poll, word) if poll["runs"].get("r", word) != word else None


def test_a_run_that_is_over_is_never_worked_at_again(world: World) -> None:
    """What was under way is ended, all that is kept of it goes, and no instruction of it is done any more: not one that
    the server signs later, nor one that it signed before, not even after a new start."""
    work = Trivial()
    first = world.instruction()
    with agent(world, work):
        world.answer_to(first)
        wait_for(lambda: kept(world) == {"r": ""}, 5, "the run is not named")
        world.endings = telling(world, OVER)
        wait_for(lambda: work.finishes == [("r", True)], 5, "nothing is removed")
        assert work.ends == ["r"]
        wait_for(lambda: kept(world) == {}, 5, "the run is still named")
        world.offer(world.instruction(round=2))
        world.quiet()
    world.answers.clear()  # the first is offered again, too
    with agent(world, work):
        world.quiet()
    assert len(work.given) == 1
    assert world.answers == {}
    assert Seen(world.home.seen_file).over() == {"r"}


def test_a_run_that_failed_keeps_its_answers_and_goes_on(world: World) -> None:
    """Its worker and its data go, its answers stay; when it is resumed the site works at it, and can be told again."""
    work = Trivial()
    with agent(world, work):
        world.answer_to(world.instruction())
        world.endings = telling(world, FAILED)
        wait_for(lambda: work.finishes == [("r", False)], 5, "nothing is removed")
        wait_for(lambda: kept(world) == {"r": FAILED}, 5, "not remembered")
        world.endings = lambda poll: None
        assert world.answer_to(world.instruction(round=2)).status == "done"
        wait_for(lambda: kept(world) == {"r": ""}, 5, "not forgotten")
        world.endings = telling(world, OVER)
        wait_for(lambda: work.finishes[1:] == [("r", True)], 5, "nothing is removed")


def test_an_instruction_under_way_is_dropped(world: World) -> None:
    """Its run ends: nobody waits for an answer, and none is sent, neither a refusal."""
    work = Trivial()

    def busy(_: object) -> None:
        wait_for(lambda: bool(work.ends), 10, "the work is not ended")
        raise RefusedError("ended")

    work.before = busy
    with agent(world, work):
        world.offer(world.instruction())
        wait_for(lambda: bool(work.given), 10, "no work")
        world.endings = telling(world, OVER)
        wait_for(lambda: work.finishes == [("r", True)], 5, "nothing is removed")
        world.quiet()
    assert world.puts == 0


Forge = Callable[[World, dict[str, Any]], dict[str, Any]]


def _as_an_instruction(world: World, poll: dict[str, Any]) -> dict[str, Any]:
    text = world.ended(poll, OVER)["statement"]
    return {"statement": text, "signature": sign(world.key, INSTRUCTION, text.encode()).hex()}


def _altered(world: World, poll: dict[str, Any]) -> dict[str, Any]:
    said = world.ended(poll, FAILED)
    return {**said, "statement": said["statement"].replace(FAILED, OVER)}


FORGED: dict[str, Forge] = {
    "another key": lambda world, poll: world.ended(poll, OVER, key=Ed25519PrivateKey.generate()),
    "a replay": lambda world, poll: world.ended(world.polls[0], OVER),
    "another site": lambda world, poll: world.ended(poll, OVER, site="hospital-2"),
    "another federation": lambda world, poll: world.ended(poll, OVER, federation="heart"),
    "signed as an instruction": _as_an_instruction,
    "altered": _altered,
    "another word": lambda world, poll: world.ended(poll, "gone"),
    "what was not asked": lambda world, poll: world.ended(poll, OVER, runs={"r": OVER, "s": OVER}),
    "not signed": lambda world, poll: {"statement": world.ended(poll, OVER)["statement"]},
    "no object of runs": lambda world, poll: world.ended(poll, OVER, runs={}) | {"signature": "xy"},
    "nothing": lambda world, poll: {},
}


@pytest.mark.parametrize("how", list(FORGED))
def test_nobody_else_can_say_it(world: World, how: str) -> None:
    """Neither an outsider, nor a replay, nor words for another site: the run's state stays, and the run goes on."""
    work, forged = Trivial(), 0

    def forge(poll: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal forged
        if poll["runs"] != {"r": ""} or forged > 1:
            return None
        forged += 1
        return FORGED[how](world, poll)

    with agent(world, work) as one:
        world.answer_to(world.instruction())
        world.endings = forge
        wait_for(lambda: forged > 1, 10, "nothing was forged")
        assert world.answer_to(world.instruction(round=2)).status == "done"
        assert one.link.up
    assert (work.ends, work.finishes) == ([], [])
    assert Seen(world.home.seen_file).over() == set()


def test_what_has_ended_is_kept_beside_what_was_seen(tmp_path: Path) -> None:
    """On disk; a file of before it was known is read; a run that is not known cannot end."""
    path = tmp_path / "seen.json"
    path.write_text('{"format": 1, "runs": {"old": {"committed": 1, "attempt": 0, "at": 5e9}}}')
    seen = Seen(path)
    assert seen.accept("new", Place(0, 0))
    assert seen.runs() == ["old", "new"]
    seen.end("new")
    seen.end("stranger")
    for one in (seen, Seen(path)):
        assert (one.runs(), one.over()) == (["old"], {"new"})
        assert not one.accept("new", Place(5, 0))
        assert one.accept("old", Place(2, 0))


def first(world: World, **more: Any) -> Instruction:
    """An instruction to train with the study's first model."""
    task, local = task_of(world.study), strategy_of(world.study).local
    net = start(world.study, task, local)
    vectors = {"shared": np.array(net.vector("shared"))}
    told = {"model": digest_of(vectors["shared"]), "layout": net.layout.digest, "payload": Payload(vectors)}
    return world.instruction("train", 1, **{**told, **more})


def leftovers(home: Home) -> list[Path]:
    return [*home.state.glob("*"), *home.spool.glob("*")]


def test_worker_data_and_state_are_gone_within_seconds(world: World) -> None:
    """The real agent and worker: of a run that is over nothing is left, not even when the site was away when it ended,
    nor of a file that was not written to its end; of one that failed its answer, which is the same when it is asked for
    again."""
    world.with_data()
    question = first(world)
    with program(world) as one:
        before = world.answer_to(question)
        assert len(one.children()) == 1
        assert len(leftovers(world.home)) == 2
        world.endings = telling(world, FAILED)
        wait_for(lambda: not one.children() and not any(world.home.spool.iterdir()), 5, "something is left")
        (state,) = leftovers(world.home)
        written = state.stat().st_mtime_ns
        world.endings = lambda poll: None
        again = world.answer_to(first(world, nonce=os.urandom(32).hex()))
        np.testing.assert_array_equal(again.payload.vectors["shared"], before.payload.vectors["shared"])
        assert state.stat().st_mtime_ns == written, "it was computed again"
    state.with_name(f".{state.name}.0f1e2d3c").write_bytes(b"begun")  # as a worker that is killed leaves it
    world.endings = telling(world, OVER)
    with program(world) as one:
        wait_for(lambda: leftovers(world.home) == [] and not one.children(), 5, "something is left")


def test_training_is_ended_at_once(world: World) -> None:
    """A run that is stopped costs the site nothing more, also in the middle of a long training."""
    world.study = Study.parse(study_text(8, training={"local_epochs": 1_000_000}))
    world.studies[world.study.digest] = world.study.text
    world.with_data()
    with program(world) as one:
        world.offer(first(world))
        wait_for(lambda: one.state() == "training" and bool(one.children()), 20, "does not train")
        time.sleep(0.5)
        world.endings = telling(world, OVER)
        wait_for(lambda: not one.children() and leftovers(world.home) == [], 5, "something is left")
        world.quiet()
        assert world.puts == 0
        assert "has ended" in one.log
