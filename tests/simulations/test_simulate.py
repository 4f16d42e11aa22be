"""The runtimes: equal to the bit, robust against sites and workers that fail, and leaving nothing behind."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consortium.client import Source
from consortium.client.site import Site, start
from consortium.client.task import task_of
from consortium.client.trainer import schedule
from consortium.protocol import Study
from consortium.protocol.code import load
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.layout import digest_of
from consortium.protocol.messages import Answer, Instruction
from consortium.server.clients import Block
from consortium.server.coordinator import run
from consortium.server.records import Evaluation, InMemory, Plan, Round
from consortium.simulations.faults import KINDS, Fault, by_site, deliver
from consortium.simulations.host import Population, World, one_thread
from consortium.simulations.processes import Processes
from consortium.simulations.simulation import (
    Result,
    population_of,
    simulate,
)
from consortium.strategies.base import BLOCK
from consortium.strategies.chosen import strategy_of

HERE = Path(__file__).parent

FAULTS = [
    Fault("s02", "drop", {1}),
    Fault("s03", "late", {2}),
    Fault("s05", "nan", {1, 2}),
    Fault("s07", "wrong_shape", {2}),
    Fault("s11", "huge_weight"),
    Fault("s13", "sign_flip", {1, 2, 3}),
    Fault("s17", "twice", {3}),
    Fault("s19", "decline", {2}),
]


def toy(
    strategy: str = "fedavg", task: str = "Toy", rounds: int = 3, more: str = "", **parameters: object
) -> Study:
    table = "\n".join([f'name = "{strategy}"', *(f"{key} = {value}" for key, value in parameters.items())])
    text = f"""
format = 1
[study]
name = "toy"
task = "toy:{task}"
rounds = {rounds}
seed = 5
[training]
lr = 0.1
batch_size = 8
[strategy]
{table}
{more}
"""
    return Study.parse(text, folder=HERE)


def sources(count: int) -> list[Source]:
    return [Source(f"s{i:02}") for i in range(count)]


def name_of(result: Result) -> str:
    """One name for all that a run computed, seconds aside."""
    state = result.outcome.state
    rounds = [
        (r.round, r.attempt, r.asked, dict(r.admitted), dict(r.left_out), r.model) for r in state.rounds
    ]
    scores = [(e.round, e.model, dict(e.pooled)) for e in state.evaluations]
    control = digest_of([state.control]) if state.control is not None else ""
    return repr((result.outcome.digest, control, rounds, scores))


def children() -> set[str]:
    """Ids of this process's children that are there, zombies too."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        found |= set((task / "children").read_text().split())
    return found


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Each test leaves no process, no open file and no thread setting behind."""
    before, files, threads = children(), open_files(), torch.get_num_threads()
    yield
    gc.collect()
    assert children() == before
    assert open_files() <= files + 1
    assert torch.get_num_threads() == threads


class ByAnswer:
    """The plainest runtime: every answer by itself, gated and reduced by the coordinator alone."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sites: dict[str, Site] = {}
        for index, name in enumerate(world.population.names):
            self._sites[name] = world.open(index)
        self._pending: list[Answer] = []

    def sites(self) -> Sequence[str]:
        return self._world.population.names

    def ask(self, sites: Sequence[str], instruction: Instruction) -> None:
        self._pending = []
        for site in reversed(sites):
            answer = self._sites[site].answer(instruction.to(site))
            self._pending += deliver(answer, self._world.faults.get(site, ()))

    def answers(self, deadline: float) -> Iterator[Answer | Block]:
        yield from self._pending

    def wait(self, sites: Sequence[str]) -> bool:
        return False


def by_answer(study: Study, count: int, faults: Sequence[Fault]) -> Result:
    with one_thread():
        task, strategy = task_of(study), strategy_of(study)
        net = start(study, task, strategy.local)
        world = World(study, task, strategy, net, population_of(sources(count)), schedule, by_site(faults))
        plan = Plan(study, strategy, net.layout, net.vector("shared"), prepares=task.prepares)
        outcome = run(plan, ByAnswer(world), InMemory(), clock=time.time, rng=random.Random(study.seed))
    return Result(study, net.layout, outcome)


STUDIES = {
    "fedavg": toy(),
    "sampled": toy(more="[cohort]\nsize = 37"),
    "scaffold": toy("scaffold"),
    "weighted scaffold": toy("scaffold", weighted="true"),
    "fedmedian": toy("fedmedian"),
    "krum": toy("krum", byzantine=2),
    "fedadam": toy("fedadam"),
    "personal": toy("fedprox", "Personal"),
    "personal scaffold": toy("scaffold", "Personal"),
}


@pytest.mark.parametrize("name", STUDIES)
def test_every_runtime_gives_the_same_bits(name: str) -> None:
    """Model, control variates, records and metrics are equal for the plain loop, inline and 1, 2 and 3 processes."""
    study = STUDIES[name]
    plain = name_of(by_answer(study, 41, FAULTS))
    for processes in (0, 1, 2, 3):
        assert name_of(simulate(study, sites=sources(41), faults=FAULTS, processes=processes)) == plain


def test_few_sums_wait_though_one_worker_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of two workers needs much longer, the other helps: the bits stay, and of 48 blocks few wait."""
    monkeypatch.setattr("consortium.simulations.processes.LEAD", 2)
    names = [f"s{i:03}" for i in range(48 * BLOCK)]
    plain = simulate(toy(rounds=1), sites=[Source(name) for name in names], processes=0)
    slow = [i // BLOCK % 2 == 0 for i in range(len(names))]  # these blocks are dealt to the first worker
    sites = [
        Source(name, table=partial(time.sleep, 0.003) if late else None)
        for name, late in zip(names, slow, strict=True)
    ]
    with one_thread():
        study = toy(rounds=1)
        task, strategy = task_of(study), strategy_of(study)
        net = start(study, task, strategy.local)
        world = World(study, task, strategy, net, population_of(sites), schedule)
        plan = Plan(study, strategy, net.layout, net.vector("shared"), prepares=task.prepares)
        with Processes(world, 2) as clients:
            outcome = run(plan, clients, InMemory(), clock=time.time, rng=random.Random(study.seed))
            written = clients._areas.rows["shared"].any(axis=1).sum()
    assert outcome.digest == plain.outcome.digest
    assert written <= 16


def test_order_of_sites_and_repetition_change_nothing() -> None:
    """The same run twice, and with the sites given in another order, is the same run; another seed is not."""
    first = simulate(toy(), sites=sources(20), processes=2)
    again = simulate(toy(), sites=sources(20)[::-1], processes=2)
    other = simulate(toy(), sites=sources(20), processes=2, seed=6)
    assert name_of(first) == name_of(again)
    assert first.outcome.digest != other.outcome.digest
    assert other.study.seed == 6


REASONS = {
    "drop": "no answer before the deadline",
    "late": "late: answers round 1",
    "nan": "not finite",
    "wrong_shape": "has shape",
    "huge_weight": "above the study's cohort.max_weight",
    "twice": "answered twice",
    "decline": "declined: scripted fault",
}


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_faulty_site_is_left_out_with_its_reason(kind: Any, processes: int) -> None:
    """Each fault costs that site that round and no other, with its reason; a flipped sign nobody can see."""
    seen: list[Round] = []
    simulate(
        toy(rounds=2),
        sites=sources(20),
        faults=[Fault("s04", kind, {2})],
        processes=processes,
        report=lambda one: seen.append(one) if isinstance(one, Round) else None,
    )
    assert [dict(one.left_out) for one in seen[:1]] == [{}]
    if kind == "sign_flip":
        assert seen[1].left_out == {}
    else:
        assert list(seen[1].left_out) == ["s04"]
        assert REASONS[kind] in seen[1].left_out["s04"]


@pytest.mark.parametrize("processes", [0, 2])
def test_too_few_answers_never_move_the_model(processes: int) -> None:
    """With fewer valid answers than min_sites all attempts are void, and the run is failed with its first model."""
    faults = [Fault(f"s{i:02}", "nan") for i in range(3)]
    result = simulate(toy(), sites=sources(4), faults=faults, processes=processes)
    assert result.status == "failed"
    assert "1 of 4 sites" in result.outcome.why
    rounds = result.rounds
    assert rounds["admitted"].tolist() == [0, 1, 1, 1]
    assert all(rounds["void"][1:])
    fresh = simulate(toy(rounds=1), sites=sources(4), processes=0)
    assert result.outcome.digest != fresh.outcome.digest


def test_a_killed_worker_costs_its_sites_the_round() -> None:
    """A site that takes its process with it is left out with the signal's name; the others count; no hang."""
    killed = load("toy:killed", HERE)
    with_killer = [Source(f"s{i:02}", table=killed if i == 3 else None) for i in range(5)]
    result = simulate(toy(), sites=with_killer, processes=2)
    assert result.status == "finished"
    for record in result.outcome.state.rounds:
        assert list(record.left_out) == ["s03"]
        assert "killed by SIGKILL (perhaps out of memory)" in record.left_out["s03"]
    others = simulate(toy(), sites=sources(5), faults=[Fault("s03", "drop")], processes=0)
    assert result.outcome.digest == others.outcome.digest


def test_site_state_survives_the_death_of_a_worker() -> None:
    """Workers killed between two rounds take no control variate with them: the run's bits are the same."""
    pids: list[int] = []
    original = Processes.ask

    def ask(self: Processes, sites: Sequence[str], instruction: Instruction) -> None:
        if instruction.round == 3 and instruction.kind == "train":
            pids.extend(self.pids)
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        original(self, sites, instruction)

    study = toy("scaffold", rounds=4)
    quiet = simulate(study, sites=sources(20), processes=2)
    patch = pytest.MonkeyPatch()
    with patch.context() as changed:
        changed.setattr(Processes, "ask", ask)
        killed = simulate(study, sites=sources(20), processes=2)
    assert len(pids) == 2
    assert name_of(killed) == name_of(quiet)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_mistake_in_the_studys_code_ends_the_run(processes: int) -> None:
    """The error names site, round, the exception and, in its notes or cause, the line."""
    with pytest.raises(ConsortiumError, match=r"site s0., train, round 1: .* TypeError: a mistake") as caught:
        simulate(toy(task="Broken"), sites=sources(4), processes=processes)
    where = "".join(getattr(caught.value, "__notes__", [])) + repr(caught.value.__cause__)
    del caught  # its frames hold the shared memory
    assert "a mistake in the study" in where


def test_idle_sites_are_never_opened() -> None:
    """Of 100,000 sites only those asked have their source made, and in few seconds."""
    opened = np.frombuffer(bytearray(100_000), np.uint8)

    def source(index: int) -> Source:
        opened[index] += 1
        return Source(names[index])

    names = [f"{i:06}" for i in range(100_000)]
    study, asked = toy(rounds=2, more="[cohort]\nsize = 20"), set[str]()

    class EnoughError(Exception):
        pass

    def report(one: Round | Evaluation) -> None:
        if isinstance(one, Round):
            asked.update(one.asked)
            if one.round == 2:
                raise EnoughError

    with pytest.raises(EnoughError):
        simulate(study, sites=Population(names, source), processes=0, report=report)
    assert opened.sum() == len(asked)
    assert len(asked) in range(20, 41)


def test_result_has_rounds_and_arrays() -> None:
    """`rounds` is a table with the metrics of each round's model, `model` the arrays by name in their shapes."""
    result = simulate(toy(), sites=sources(4), processes=0)
    table = result.rounds
    assert table["round"].tolist() == [0, 1, 2, 3]
    assert table["admitted"].tolist() == [0, 4, 4, 4]
    assert table["loss"].notna().all()
    assert {name: array.shape for name, array in result.model.items()} == {
        "0.weight": (8, 6), "0.bias": (8,), "3.weight": (3, 8), "3.bias": (3,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:one", "mine:one: got an unexpected keyword argument 'bound'"),
        ("mine:NUMBER", "mine:NUMBER: is no function"),
        ("consortium.nowhere:one", "there is no module 'consortium.nowhere'"),
        ("mine:wrong", "mine:wrong: .* ZeroDivisionError: division by zero"),
        ("mine:none", "mine:none: returned int, not a"),
    ],
)
def test_mistakes_in_a_strategy_of_ones_own_are_said(name: str, message: str, tmp_path: Path) -> None:
    """A parameter it does not take, no function, one that fails or returns no strategy: which one, and why."""
    code = "NUMBER = 1\ndef one(a=1): ...\ndef wrong(bound): 1 / 0\ndef none(bound): return 3\n"
    (tmp_path / "mine.py").write_text(code)
    text = toy().with_(strategy={"name": name, "bound": 1.0}).text
    with pytest.raises(InputError, match=message):
        strategy_of(Study.parse(text, folder=tmp_path))


def test_given_start_and_batches_are_used() -> None:
    """With a first model and batches of one's own a run is that model's, and no other's."""
    once = simulate(toy(rounds=1), sites=sources(2), processes=0)
    zeros = np.zeros_like(once.outcome.model)
    result = simulate(
        toy(rounds=1),
        sites=sources(2),
        initial=zeros,
        batches=lambda training, rows, seed, site, round: [np.arange(rows)],
        processes=2,
    )
    assert result.rounds["loss"][0] == pytest.approx(np.log(3))
    # With zero weights everywhere only the last bias has a gradient.
    assert not any(array.any() for name, array in result.model.items() if name != "3.bias")
    assert result.model["3.bias"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": []}, "there is none"),
        ({"sites": [Source("a"), Source("a")]}, "'a' is there twice"),
        ({"sites": Population(["a", "a"], sources(2).__getitem__)}, "'a' is there twice"),
        ({"sites": Population(["b", "a"], sources(2).__getitem__)}, "'a' stands after 'b'"),
        ({"sites": Population([], sources(2).__getitem__)}, "there is none"),
        ({"sites": sources(2), "faults": [Fault("s1", "drop")]}, "no site 's1', did you mean"),
        ({"sites": sources(2), "processes": -1}, "0 .none. or more"),
        ({"sites": sources(2), "initial": np.zeros(3, np.float32)}, "initial: float32 .3,. given"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """What is wrong, and what would be right, before anything runs."""
    with pytest.raises(InputError, match=message):
        simulate(toy(), **arguments)


SCRIPT = r"""
import os, sys, time
sys.path.insert(0, {folder!r})
import test_simulate as t
from consortium.simulations.simulation import simulate

def slow():
    os.write(1, b"ready\n")
    time.sleep(60)

simulate(t.toy(), sites=[t.Source(f"s{{i}}", table=slow) for i in range(4)], processes=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_the_run_is_ended(number: signal.Signals) -> None:
    """Ctrl-C, kill and kill -9 in mid-round leave no process; workers print nothing."""
    script = textwrap.dedent(SCRIPT.format(folder=str(HERE)))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        os.kill(process.pid, number)
    _, errors = process.communicate(timeout=20)
    limit = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert errors.count("Traceback") == (1 if number is signal.SIGINT else 0)
    assert "resource_tracker" not in errors
