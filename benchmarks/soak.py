"""Many rounds with sites of which one answer in ten is late, lost or wrong: nothing may grow, and nothing may be left.

    python benchmarks/soak.py [--quick] [--json] [--rounds 300] [--sites 20] [--faulty 0.1]

The real server over mTLS with durable commits, and real agents as threads of two processes, whose work is trivial. A
round asks all sites but takes the first answers of most (`cohort.spare`), so that rounds are closed with answers under
way, by enough answers or by their deadline. After each round it is noted how much memory (anonymous and shared) server,
run process and agents have, and how many threads, sockets, pipes and files they have open. Growth is the median of the
last twenty rounds over that of the twenty after round 20; in the quick form, over fewer rounds, it says little.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from contenders import agents
from contenders.live import Processes, live_federation, memory_mb, own_folder, study_of
from report import Row, Target, emit

WARM, WINDOW = 20, 20
"""Rounds before the first look, and in each of the two windows that are compared."""
DEADLINE = "2s"


@dataclass
class Look:
    """One process over the rounds. memory: MB (1e6 bytes). threads, open: how many; open: by kind of descriptor."""

    memory: list[float] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    open: list[Counter[str]] = field(default_factory=list)

    def take(self, pid: int) -> None:
        """Look at a process now."""
        kinds = Counter[str]()
        with suppress(OSError):
            for path in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    kinds[_kind(str(path.readlink()))] += 1
        self.memory.append(memory_mb([pid]))
        self.threads.append(sum(1 for _ in Path(f"/proc/{pid}/task").iterdir()))
        self.open.append(kinds)

    def growth(self, early: slice, late: slice) -> float:
        """The later median of memory as a multiple of the earlier one."""
        return median(self.memory[late]) / median(self.memory[early])

    def more(self, early: slice, late: slice) -> int:
        """By how much threads, or any kind of descriptor, are more at most in the later rounds than in the earlier."""
        kinds = {kind for one in self.open for kind in one}
        found = [max(self.threads[late]) - max(self.threads[early])]
        for kind in kinds:
            found.append(max(c[kind] for c in self.open[late]) - max(c[kind] for c in self.open[early]))
        return max(found)


def _kind(target: str) -> str:
    if target.startswith("/"):
        return "deleted file" if target.endswith("(deleted)") else "file"
    return target.partition(":")[0]


def soak(rounds: int, sites: int, faulty: float) -> tuple[list[Row], list[Target]]:
    """The rows and targets of one soak."""
    spare = max(1, sites // 7)
    with own_folder() as folder, live_federation(folder / "live") as live:
        seen = Processes(folder / "live")
        study = study_of("soak", rounds).with_(
            cohort={"size": sites - spare, "spare": spare, "deadline": DEADLINE},
            export={"formats": ["safetensors"]},
        )
        homes = agents.join(live.admin, folder / "sites", sites)
        with agents.agents(homes, faulty=faulty) as pids:
            _until(lambda: len(live.connected()) == sites, 120, "not all sites connect")
            say(f"{rounds} rounds of {sites} sites")
            looks = {name: Look() for name in ("server", "run", *(f"agents {i}" for i in range(len(pids))))}
            done = _rounds(live, study, seen, pids, looks)
            _until(lambda: len(seen.all()) == 1, 60, "processes of the run are left")
            spooled = list((folder / "live" / "server" / "spool").iterdir())
            after = Look()
            _until(lambda: not _left(after, seen.server), 60, "the server still holds spooled answers")
        state = live.admin.get("/v1/studies/soak")
    early, late = slice(WARM, WARM + WINDOW), slice(-WINDOW, None)
    if rounds < WARM + 2 * WINDOW:
        early, late = slice(rounds // 3, rounds * 2 // 3), slice(rounds * 2 // 3, None)
    rows = [
        Row(f"{name}, memory at the end", look.memory[-1], min(look.memory), max(look.memory), "MB")
        for name, look in looks.items()
    ]
    rows.append(Row.of("a round", done["seconds"]))
    rows += [_count(what, done["counts"][what]) for what in ("admitted", "left out", "late", "void", "aside")]
    targets = [
        Target(f"{name}, memory, last / after round 20", look.growth(early, late), "<=", 1.05)
        for name, look in looks.items()
    ]
    targets += [
        Target(f"{name}, more threads or descriptors", look.more(early, late), "<=", 2)
        for name, look in looks.items()
    ]
    targets.append(Target("spooled files left", len(spooled), "<=", 0))
    if (state["state"], state["round"]) != ("finished", rounds):
        raise RuntimeError(f"the run is {state['state']} at round {state['round']}: {state['why']}")
    return rows, targets


def _rounds(
    live: Any, study: Any, seen: Processes, pids: Sequence[int], looks: dict[str, Look]
) -> dict[str, Any]:
    """Follow the run to its end, looking at every process after each round."""
    live.start(study)
    counts, seconds, last = Counter[str](), [], time.monotonic()
    for event in live.events(study):
        if event["kind"] == "late":
            counts["late"] += 1
        if event["kind"] != "round":
            continue
        counts.update({"admitted": len(event["admitted"]), "left out": len(event["left_out"])})
        counts.update({"void": bool(event["void"]), "aside": len(event["aside"])})
        seconds.append(time.monotonic() - last)
        last = time.monotonic()
        loop = seen.loop()
        for (_, look), pid in zip(looks.items(), [*loop[:2], *pids], strict=True):
            if len(loop) == 2:
                look.take(pid)
    return {"counts": counts, "seconds": seconds[1:]}


def _left(look: Look, pid: int) -> bool:
    look.take(pid)
    return look.open[-1]["deleted file"] > 0


def _count(what: str, number: float) -> Row:
    return Row(what, number, number, number, "")


def _until(reached: Any, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} within {seconds:g} s")
        time.sleep(0.2)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="20 rounds of 5 sites")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--rounds", type=int, metavar="N")
    parser.add_argument("--sites", type=int, metavar="N")
    parser.add_argument("--faulty", type=float, default=0.1, help="share of answers late, lost or wrong")
    given = parser.parse_args(arguments)
    rounds, sites = given.rounds or (20 if given.quick else 300), given.sites or (5 if given.quick else 20)
    if rounds < 6 or sites < 3:
        parser.error("at least 6 rounds and 3 sites")
    rows, targets = soak(rounds, sites, given.faulty)
    emit(rows, targets, given.json)


if __name__ == "__main__":
    main()
