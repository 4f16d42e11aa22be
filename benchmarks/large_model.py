"""A round with 100 million float32 parameters (400 MB) over the network: ours beside Flower's stock processes.

    python benchmarks/large_model.py [--quick] [--json] [--rounds N]

Ours: the real server and clients over mTLS, two sites; a perceptron of that size, which a site trains for one step on
one row and evaluates; each round durable. A round's time is that from commit to commit. What a site computes is in it,
and is a row of its own, so that one sees how much of a round it is.

Flower: a plain app (`contenders/flower_app.py`) over its stock processes with TLS and node authentication; the model
is one array, the sites add a constant in place of training, and there is no evaluation, which would send the model a
second time: all three are in Flower's favour.

Memory is the sum of anonymous and shared memory, page cache left out: of the server's process and the run's, above
their peak with a model of ten numbers; in MB, and as a number of models.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from contenders import agents, flower_live, raw_tls
from contenders.live import (
    FEATURES,
    Processes,
    Watch,
    follow,
    live_federation,
    own_folder,
    study_of,
    write_table,
)
from report import Row, Target, emit, isolated

from consortium.client import Source
from consortium.client.site import open_site, start
from consortium.client.task import task_of
from consortium.protocol.messages import Instruction, Payload
from consortium.simulations.host import one_thread
from consortium.strategies.chosen import strategy_of

HIDDEN = (10_000, 9_980)
QUICK = (1_000, 985)
FLOWER = 3
MANY = 8


def parameters_of(hidden: tuple[int, int]) -> int:
    """Of the perceptron with these two hidden layers."""
    first, second = hidden
    return (FEATURES + 1) * first + (first + 1) * second + (second + 1)


@dataclass(frozen=True)
class Ours:
    """Rounds of ours.

    seconds: of each round after the first. memory, whole: MB above what a model of ten numbers takes, of server and run
    process, and with the workers that make the first model and export the last.
    """

    seconds: list[float]
    memory: float
    whole: float


def with_clients(folder: Path, hidden: tuple[int, int], rounds: int, quick: bool) -> Ours:
    """Two real clients, whose workers train. quick: without a baseline, and without the export."""
    with live_federation(folder / "live") as live:
        for number in range(2):
            site = f"site-{number}"
            live.join(site, write_table(folder / "data" / site, number))
        seen = Processes(folder / "live")
        with Watch(seen.loop) as loop, Watch(seen.all) as whole:
            if not quick:
                follow(live, study_of("ten-numbers", 2), export=True)
        before = loop.mb, whole.mb
        with Watch(seen.loop) as loop, Watch(seen.all) as whole:
            found = follow(live, study_of("large", rounds, hidden), export=not quick)
    return Ours(found.rounds, loop.mb - before[0], whole.mb - before[1])


def with_agents(folder: Path, hidden: tuple[int, int], rounds: int, sites: int) -> Ours:
    """More sites, which answer with zeros: so many workers would not fit into the memory of one machine."""
    with live_federation(folder / "live") as live:
        homes = agents.join(live.admin, folder / "sites", sites)
        seen = Processes(folder / "live")
        with agents.agents(homes), Watch(seen.loop) as loop, Watch(seen.all) as whole:
            follow(live, study_of("ten-numbers", 2))
        before = loop.mb, whole.mb
        with (
            agents.agents(homes, parameters_of(hidden)),
            Watch(seen.loop) as loop,
            Watch(seen.all) as whole,
        ):
            found = follow(live, study_of("large", rounds, hidden))
    return Ours(found.rounds, loop.mb - before[0], whole.mb - before[1])


def at_a_site(hidden: tuple[int, int], folder: str, repeats: int) -> list[float]:
    """Seconds in which one site, alone on this machine and in this process, answers an instruction to train."""
    place = write_table(Path(folder) / "alone", 0)
    study = study_of("large", repeats, hidden)
    with one_thread():
        task, strategy = task_of(study), strategy_of(study)
        net = start(study, task, strategy.local)
        site = open_site(
            study, task, strategy.local, net, Source("alone", place / "table.csv", key=b"k" * 32)
        )
        model = net.vector("shared")
        query = Instruction(
            "f", "r", 0, 0, "query", study.digest, "", net.layout.digest, "n", time.time() + 600
        )
        sums = site.answer(query.to("alone")).payload.statistics
        seconds = []
        for number in range(1, repeats + 2):
            content = Payload({"shared": model}, sums)
            asked = replace(query, round=number, kind="train", model="m", payload=content).to("alone")
            began = time.perf_counter()
            answer = site.answer(asked)
            seconds.append(time.perf_counter() - began)
            assert answer.status == "done", answer.reason
            np.add(model, answer.payload.vectors["shared"], out=model)
    return seconds[1:]


def rows_and_targets(hidden: tuple[int, int], rounds: int, quick: bool) -> tuple[list[Row], list[Target]]:
    """All contenders, one after the other."""
    parameters = parameters_of(hidden)
    model = parameters * 4 / 1e6
    with own_folder() as folder:
        say(f"{parameters:,} parameters: raw TLS")
        raw = raw_tls.rounds(folder / "raw", parameters * 4, 3)
        say("what a site computes")
        computing = isolated(at_a_site, hidden, str(folder), 3)
        say(f"ours, two sites, {rounds} rounds")
        two = with_clients(folder / "two", hidden, rounds, quick)
        many = None
        if not quick:
            say(f"ours, {MANY} sites")
            many = with_agents(folder / "many", hidden, 3, MANY)
        flower = None
        if not quick:  # `round_latency.py --quick` shows that it runs
            say("flower, two sites")
            flower = flower_live.measure(folder / "flower", parameters, FLOWER, evaluate=False)
    rows = [
        Row.of("consortium, 2 sites", two.seconds, "s", two.memory),
        Row.of("raw TLS and SHA-256, 2 clients", raw, "s"),
        Row.of("of a round: what one site computes", computing, "s"),
    ]
    targets = [Target("a round, s", median(two.seconds), "<=", 4)]
    if flower is not None:
        theirs = flower.rounds[1:]
        rows.insert(1, Row.of("flower, 2 sites", theirs, "s", flower.peak_mb))
        targets.append(Target("flower / ours", median(theirs) / median(two.seconds), ">=", 5))
    if many is not None:
        targets.append(Target("server's memory, 2 sites, in models", two.memory / model, "<=", 3))
        rows.append(Row.of(f"consortium, {MANY} sites that compute nothing", many.seconds, "s", many.memory))
        rows.append(Row.of("consortium, 2 sites, with first model and export", two.seconds, "s", two.whole))
        targets.append(Target(f"server's memory, {MANY} sites, in models", many.memory / model, "<=", 3))
    return rows, targets


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="a million parameters, two rounds, no other framework"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--rounds", type=int, metavar="N", help="of ours, the first included")
    given = parser.parse_args()
    rounds = given.rounds or (2 if given.quick else 6)
    if rounds < 2:
        parser.error(f"--rounds: at least 2, got {rounds}")
    rows, targets = rows_and_targets(QUICK if given.quick else HIDDEN, rounds, given.quick)
    emit(rows, targets, given.json)


if __name__ == "__main__":
    main()
