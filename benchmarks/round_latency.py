"""A round of a trivial model over the network, two sites, train and evaluate: ours beside Flower's stock processes.

    python benchmarks/round_latency.py [--quick] [--json] [--rounds N] [--agents N]

Ours: the real server and clients over mTLS, a linear model of ten numbers, durable commits; a round's time is that from
commit to commit, so nothing is left out. The first round, which loads data and model, is none of the rows.

Flower: a plain app (`contenders/flower_app.py`) as its documentation says, FedAvg and ten numbers, numpy alone, over
flower-superlink and flower-supernode with TLS and node authentication; settings in `contenders/flower_processes.py`.

--agents N: N sites in place of two, as threads of two processes, that answer without computing: what a round and an
idle site cost the server.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from contenders import agents, flower_live
from contenders.live import (
    Processes,
    Watch,
    cpu_seconds,
    follow,
    live_federation,
    memory_mb,
    own_folder,
    study_of,
    write_table,
)
from report import Row, Target, emit

FLOWER = 5
SITES = ("site-a", "site-b")


def ours(folder: Path, rounds: int) -> list[float]:
    """Seconds of each round after the first."""
    with live_federation(folder / "live") as live:
        for number, site in enumerate(SITES):
            live.join(site, write_table(folder / "data" / site, number))
        return follow(live, study_of("latency", rounds)).rounds


def compared(rounds: int, flower_rounds: int) -> tuple[list[Row], list[Target]]:
    """Ours and Flower's, one after the other."""
    with own_folder() as folder:
        say(f"ours, {rounds} rounds")
        own = ours(folder / "ours", rounds)
        say(f"flower, {flower_rounds} rounds")
        theirs = flower_live.measure(folder / "flower", 10, flower_rounds).rounds
    theirs = theirs[1:] or theirs
    rows = [Row.of("consortium, 2 sites", own), Row.of("flower, 2 sites", theirs)]
    ratio = median(theirs) / median(own)
    targets = [
        Target("a round, ms, at first", rows[0].median, "<=", 250),
        Target("a round, ms, then", rows[0].median, "<=", 100),
        Target("flower / ours, at first", ratio, ">=", 25),
        Target("flower / ours, then", ratio, ">=", 60),
    ]
    return rows, targets


def many(number: int, rounds: int, idle: float) -> list[Row]:
    """What `number` sites cost the server. idle: seconds for which they are watched while nothing runs."""
    with own_folder() as folder, live_federation(folder / "live") as live:
        seen = Processes(folder / "live")
        say(f"{number} sites join")
        began = time.monotonic()
        homes = agents.join(live.admin, folder / "sites", number)
        joining = time.monotonic() - began
        alone = memory_mb([seen.server])
        with agents.agents(homes):
            say("they connect")
            wait_for(lambda: connected(live.admin.get("/v1/status")) == number)
            say(f"nothing runs for {idle:g} s")
            before = cpu_seconds([seen.server])
            time.sleep(idle)
            resting = cpu_seconds([seen.server]) - before
            resident = memory_mb([seen.server]) - alone
            say(f"{rounds} rounds")
            marks: list[float] = []
            with Watch(seen.loop) as watch:
                found = follow(
                    live, study_of("many", rounds), lambda _: marks.append(cpu_seconds(seen.loop()))
                )
    spent = [after - before for before, after in pairwise(marks)]
    name = f"{number} sites"
    return [
        Row.of(f"{name}, a round", found.rounds, peak_mb=watch.mb),
        Row.of(f"{name}, server's processor a round", spent),
        Row.of("one more idle site, processor a minute", [resting / number * 60 / idle]),
        single("one more idle site, memory", resident / number * 1000, "KB"),
        Row.of("a site joins", [joining / number]),
    ]


def single(name: str, value: float, unit: str) -> Row:
    return Row(name, value, value, value, unit)


def connected(status: dict[str, object]) -> int:
    sites = status["sites"]
    assert isinstance(sites, list)
    return sum(bool(site["connected"]) for site in sites)


def wait_for(reached: object, seconds: float = 180.0) -> None:
    """Wait until `reached()` is true; raises RuntimeError where it is not in time."""
    assert callable(reached)
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise RuntimeError(f"not all sites connected within {seconds:g} s")
        time.sleep(0.5)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few rounds")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--rounds", type=int, metavar="N", help="of ours, the first included")
    parser.add_argument(
        "--agents", type=int, metavar="N", help="N sites that compute nothing, without Flower"
    )
    given = parser.parse_args(arguments)
    rounds = given.rounds or (4 if given.quick else 101)
    if rounds < 2:
        parser.error(f"--rounds: at least 2, got {rounds}")
    if given.agents:
        emit(many(given.agents, rounds, 5.0 if given.quick else 60.0), (), given.json)
        return
    rows, targets = compared(rounds, 1 if given.quick else FLOWER)
    emit(rows, targets, given.json)


if __name__ == "__main__":
    main()
