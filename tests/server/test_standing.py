"""Who is asked, who is not waited for, and who is set aside: the loop against scripted sites, all without a clock."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
from scripted import Script, Scripted, honest, silent

from consortium.protocol import Layout, Study
from consortium.protocol.layout import Array, Segment
from consortium.protocol.messages import Answer, Instruction
from consortium.server.coordinator import run
from consortium.server.records import InMemory, Outcome, Plan, RunState
from consortium.server.standing import LONGEST, NOT_NEEDED, standings
from consortium.strategies.base import everyone, fixed_size
from consortium.strategies.named import fedavg

LAYOUT = Layout((Segment("shared", "float32", (Array("w", (3,)),)),))


def plan(rounds: int, failures: int = 3, spare: int = 0, **cohort: Any) -> Plan:
    text = f'format = 1\n[study]\nname = "s"\ntask = "task:T"\nrounds = {rounds}\n[evaluation]\nmetric = "accuracy"\n'
    study = Study.parse(text).with_(cohort={"min_sites": 2, "deadline": 5, **cohort})
    strategy = replace(fedavg(), selector=fixed_size(study.cohort.size) if study.cohort.size else everyone)
    return Plan(study, strategy, LAYOUT, np.zeros(3, np.float32), failures=failures, spare=spare)


def play(clients: Scripted, the_plan: Plan, commits: InMemory | None = None, **more: Any) -> Outcome:
    rng = random.Random(1)
    return run(the_plan, clients, commits or InMemory(), clock=clients.clock, rng=rng, **more)


def asked(clients: Scripted, site: str) -> list[int]:
    """Rounds of training in which a site was asked."""
    return [one.round for one, sites in clients.asked if one.kind == "train" and site in sites]


def failing(until: int) -> Script:
    """Silent in rounds before `until`, honest from then on."""

    def answer(instruction: Instruction) -> list[Answer]:
        return silent(instruction) if instruction.round < until else honest(1.0)(instruction)

    return answer


def test_a_site_that_fails_again_and_again_is_asked_at_longer_and_longer_intervals() -> None:
    """Three failures, then rests of 2, 4, 8 rounds; each record names it with its reason; the final evaluation does not
    wait for it either."""
    clients = Scripted({"a": honest(1.0), "b": honest(1.0), "dead": silent})
    outcome = play(clients, plan(24))
    assert asked(clients, "dead") == [1, 2, 3, 6, 11, 20]
    resting = [one.round for one in outcome.state.rounds if one.aside]
    assert resting == [4, 5, 7, 8, 9, 10, *range(12, 20), *range(21, 25)]
    assert outcome.state.rounds[3].aside == {
        "dead": "set aside after 3 failures in a row, asked again in 2 rounds: no answer before the deadline"
    }
    assert "dead" not in clients.asked[-1][1]
    assert clients.asked[-1][0].kind == "evaluate"


def test_a_site_that_answers_again_is_taken_back_and_all_is_forgotten() -> None:
    """It comes back in round 6, and would have to fail three times anew."""
    clients = Scripted({"a": honest(1.0), "b": honest(1.0), "c": failing(6)})
    outcome = play(clients, plan(9))
    assert asked(clients, "c") == [1, 2, 3, 6, 7, 8, 9]
    assert [one.round for one in outcome.state.rounds if "c" in one.admitted] == [6, 7, 8, 9]


def test_nobody_is_set_aside_where_the_quorum_needs_him() -> None:
    """Of two sites with a quorum of two, the failing one is asked every time."""
    clients = Scripted({"a": honest(1.0), "dead": silent}, more=lambda: len(clients.asked) < 9)
    outcome = play(clients, plan(3))
    assert (outcome.status, [*outcome.state.rounds[-1].left_out]) == ("failed", ["dead"])
    assert all(not one.aside for one in outcome.state.rounds)
    assert len(asked(clients, "dead")) == len(outcome.state.rounds) == 9


def test_who_is_set_aside_is_the_same_after_a_restart() -> None:
    """A loop that is cut after any commit and continued asks as one that was not."""
    scripts = {"a": honest(1.0), "b": honest(1.0), "dead": silent}
    whole = Scripted(scripts)
    play(whole, plan(12))
    cut = Scripted(scripts)
    state: RunState | None = None
    for _ in range(12):
        kept = OneCommit(state)
        try:
            play(cut, plan(12), kept)
        except OneCommit.CutError:
            state = kept.load()
    play(cut, plan(12), OneCommit(state, more=99))
    assert asked(cut, "dead") == asked(whole, "dead") == [1, 2, 3, 6, 11]


class OneCommit(InMemory):
    """Commits that cut the loop after so many."""

    class CutError(Exception):
        pass

    def __init__(self, state: RunState | None, more: int = 1) -> None:
        super().__init__()
        self._state, self._more = state, more

    def commit(self, state: RunState) -> RunState:
        super().commit(state)
        self._more -= 1
        if not self._more:
            raise OneCommit.CutError
        return state


def test_intervals_end_somewhere() -> None:
    """However often a site fails, it is asked after at most `LONGEST` rounds."""
    clients = Scripted({"a": honest(1.0), "b": honest(1.0), "dead": silent})
    outcome = play(clients, plan(400))
    gaps = np.diff(asked(clients, "dead"))
    assert gaps.max() == LONGEST + 1
    last = standings(outcome.state.rounds, 3)["dead"]
    assert last.failures == len(asked(clients, "dead"))


def test_spare_sites_are_asked_and_the_first_answers_count() -> None:
    """Five sites, a cohort of two and two spare: four are asked, the first two valid answers are summed whatever comes
    later, and who was not waited for is named, without being a failure."""
    names = "abcde"
    clients = Scripted(
        {name: honest(float(i)) for i, name in enumerate(names)}, order=lambda all_: all_[::-1]
    )
    outcome = play(clients, plan(30, failures=1, spare=2, size=2))
    for (_, sites), record in zip(clients.asked, outcome.state.rounds, strict=False):
        assert len(sites) == 4
        assert list(record.admitted) == sorted(sites)[2:]
        assert dict(record.left_out) == dict.fromkeys(sorted(sites)[:2], NOT_NEEDED)
        assert not record.aside
    assert {site for _, sites in clients.asked for site in sites} == set(names)


def test_spare_sites_stand_in_for_answers_that_do_not_count() -> None:
    """The invalid and the silent are among those asked; the round is whole all the same."""
    clients = Scripted({"a": spoil(honest(1.0)), "b": silent, "c": honest(1.0), "d": honest(1.0)})
    outcome = play(clients, plan(3, failures=0, spare=2, size=2))
    assert [dict(one.admitted) for one in outcome.state.rounds] == [{"c": 10.0, "d": 10.0}] * 3
    assert outcome.state.rounds[0].left_out == {
        "a": "the shared update is not finite",
        "b": NOT_NEEDED,
    }


def spoil(script: Script) -> Script:
    """The same answers, with NaN for numbers."""

    def answer(instruction: Instruction) -> list[Answer]:
        out = []
        for one in script(instruction):
            spoiled = {kind: vector * np.float32("nan") for kind, vector in one.payload.vectors.items()}
            out.append(replace(one, payload=replace(one.payload, vectors=spoiled)))
        return out

    return answer


def test_attempts_at_a_void_round_have_longer_and_longer_pauses() -> None:
    """1, 2 seconds, then the run waits for sites; 8, 16 after that; never more than a minute."""
    clients = Scripted({"a": honest(1.0), "b": silent}, more=lambda: len(clients.asked) < 12)
    pauses: list[float] = []
    assert play(clients, plan(3), rest=pauses.append).status == "failed"
    assert pauses == [1, 2, 8, 16, 60, 60, 60, 60]
    assert len(clients.waited) == 4
