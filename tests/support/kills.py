"""kill -9 of everything, at random moments: of the server, the run's process, agents and workers of a live federation.

    python tests/support/kills.py [--kills 200] [--seed 0] [--strategy fedavg ...] [--rounds 20] [--dir DIR]

Runs of twenty rounds over four sites, the strategies in turn, until so many processes were killed. Whatever was killed
is started again as its operator's machine would, after a moment; nothing else is done. Each run must end by itself, and
then it is checked that

- it is finished: every round was committed once, and its exported model is there;
- the model has the bits of a replay of the recorded survivor sets (`replay.py`), and so had it after each round;
- each site keeps what the replay says that it keeps (SCAFFOLD's variates), and gave the answers that counted there;
- no site's own record has two answers to one question;
- no process, spooled file or copy of data is left.

The seed decides what is killed and how long after what before; how far the programs have got by then, it does not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from live import Live, children, hospitals, study
from replay import Replayed, replay, rounds_of

from consortium.client import store
from consortium.protocol.errors import ConsortiumError
from consortium.protocol.files import write_private
from consortium.protocol.study import Study
from consortium.server.records import Round
from consortium.server.states import OVER

SITES = 4
LEAST = 2
"""How few answers move the model."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "fedadam": {"name": "fedadam", "server_lr": 0.01},
    "scaffold": {"name": "scaffold"},
}
DEADLINES = ("8s", "30s", "1m")
"""The first loses answers to kills, the last waits for them."""
WHATS = ("server", "run", "agent", "worker")
PATIENCE = 0.7
"""The share of kills before which a round is let pass: while all is only starting again, there is little to break."""
DOWN = 1.0
"""The longest that a server or an agent is down before it is started again, seconds."""

Say = Callable[[str], None]


@dataclass
class Tally:
    """What was done, and what it led to. kills: by what was killed."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    rounds: int = 0
    void: int = 0
    left_out: int = 0

    def __str__(self) -> str:
        killed = ", ".join(f"{count} {what}" for what, count in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({killed}) in {self.runs} runs: {self.rounds} rounds committed, "
            f"{self.void} attempts void, {self.left_out} answers left out"
        )


class Kept:
    """What each site keeps of the runs, as it was last: sites remove it when a run is over, so it is copied before.

    A file is replaced whole, and the last one stands until the server has exported the model.
    """

    def __init__(self, federation: Live, folder: Path) -> None:
        self._federation, self._folder = federation, folder
        self._seen: dict[Path, tuple[int, int]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Kept:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def of(self, site: str, run: str) -> store.Kept:
        """What the site kept of a run."""
        home = self._federation.home(site)
        return store.Store(self._folder / site, run, home.data_key(home.lock()).of(f"run {run}")).load()

    def _loop(self) -> None:
        while not self._ended.wait(0.02):
            for site in list(self._federation.places):
                with suppress(OSError):  # it is removed
                    for path in self._federation.home(site).state.iterdir():
                        if not path.name.startswith("."):  # one that is only being written
                            self._copy(site, path)

    def _copy(self, site: str, path: Path) -> None:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if self._seen.get(path) == (about.st_ino, about.st_mtime_ns):
                return
            content = file.read()
        (self._folder / site).mkdir(parents=True, exist_ok=True)
        write_private(self._folder / site / path.name, content)
        self._seen[path] = (about.st_ino, about.st_mtime_ns)


@dataclass
class Storm:
    """The killing within one run. gaps: seconds between two kills, least and most."""

    federation: Live
    name: str
    rng: random.Random
    gaps: tuple[float, float]
    say: Say
    back: dict[str, float] = field(default_factory=dict)

    def rage(self, kills: int) -> Counter[str]:
        """Kill so many, or until the run is over; all is started again then."""
        done = Counter[str]()
        pause, due, passed = self.rng.uniform(*self.gaps), math.inf, -1
        while done.total() < kills and (at := self._round()) is not None:
            self._start_again()
            if due == math.inf and at > passed:
                due = time.monotonic() + pause
            if time.monotonic() >= due:
                what = self._kill()
                done[what] += bool(what)
                pause, due, passed = self.rng.uniform(*self.gaps), math.inf, max(at, passed)
                if self.rng.random() > PATIENCE:
                    due = time.monotonic() + pause
            time.sleep(0.05)
        while self.back:
            self._start_again()
            time.sleep(0.01)
        self.federation.until(self.federation.answers, 60, "the server does not answer")
        return +done

    def _round(self) -> int | None:
        """The rounds committed, as far as the server says, -1 where it says nothing; None: the run is over."""
        if "server" not in self.back:
            with suppress(ConsortiumError):
                shown = self.federation.show(self.name)
                return None if shown["state"] in OVER else int(shown["round"])
        return -1

    def _start_again(self) -> None:
        for name in [name for name, at in self.back.items() if time.monotonic() >= at]:
            del self.back[name]
            if name == "server":
                self.federation.launch_server()
            else:
                self.federation.start_client(name)

    def _kill(self) -> str:
        """Kill one process; what it was, empty where none of what was drawn is there."""
        for what in self.rng.sample(WHATS, len(WHATS)):
            site = self.rng.choice(sorted(self.federation.places))
            pause = self.rng.uniform(0, DOWN)
            pid, name = self._found(what, site)
            if pid:
                self.federation.kill(pid)
                self.say(f"  killed the {what}{f' of {site}' if what in ('agent', 'worker') else ''}")
                if name:
                    self.back[name] = time.monotonic() + pause
                return what
        return ""

    def _found(self, what: str, site: str) -> tuple[int, str]:
        """The process of that kind, and the program that is to be started again; 0 where there is none."""
        one, pids = self.federation, self.federation.pids
        if what == "server":
            return (0, "") if "server" in self.back else (pids["server"], "server")
        if what == "agent":
            return (0, "") if site in self.back else (pids[site], site)
        parent, program = ("server", "server.run_process") if what == "run" else (site, "client.worker")
        found = [] if parent in self.back else children(one.pids[parent], f"consortium.{program}")
        return (found[0] if found else 0), ""


def study_of(number: int, strategy: str, rounds: int, epochs: int, deadline: str) -> Study:
    """The study of one run."""
    one = study(f"{strategy}-{number}", SITES, rounds, epochs, deadline, LEAST)
    return one.with_(strategy=STRATEGIES[strategy], export={"formats": ["safetensors"]})


def check(federation: Live, one: Study, sites: Kept) -> list[Round]:
    """See that a run that is over came to what its records say; gives these. sites: what they kept of it.

    Raises:
        AssertionError: it did not.
    """
    shown = federation.show(one.name)
    assert (shown["state"], shown["why"]) == ("finished", ""), f"{shown}\n{federation.logs()}"
    folder = Path(shown["model"]).parent
    rounds = rounds_of(json.loads((folder / "result.json").read_text()))
    moved = [record.round for record in rounds if not record.void]
    assert moved == list(range(one.rounds + 1)), moved
    assert all(record.updates.keys() == record.admitted.keys() for record in rounds)
    tries = [(record.round, record.attempt) for record in rounds]
    assert len(set(tries)) == len(tries), tries
    told = [(event["round"], event["attempt"]) for event in federation.events(one.name)]
    assert told == tries, (told, tries)
    right = replay(one, shown["run"], federation.places, rounds)
    loaded: np.ndarray[Any, Any] = np.load(folder / "model.npy", allow_pickle=False)
    assert loaded.tobytes() == right.model.tobytes()
    for site in federation.places:
        _check_site(site, sites.of(site, shown["run"]), rounds, right)
    return rounds


def _check_site(site: str, kept: store.Kept, rounds: Sequence[Round], right: Replayed) -> None:
    counted = max((one.round for one in rounds if not one.void and site in one.admitted), default=0)
    state = kept.memory.settled(counted).committed
    assert state.keys() == right.states[site].keys(), site
    for kind, vector in right.states[site].items():
        assert state[kind].tobytes() == vector.tobytes(), f"{site}: its {kind} is out of step"
    assert kept.last is not None, f"{site}: what it kept was not seen"
    asked = [question for question, _ in kept.given]
    assert len(set(asked)) == len(asked), f"{site} answered twice: {asked}"
    given = dict(kept.given)
    for question, fingerprint in right.answers[site].items():
        assert given.get(question) == fingerprint, f"{site} gave another answer to {question}"


def campaign(
    folder: Path,
    kills: int,
    seed: int,
    strategies: Sequence[str] = tuple(STRATEGIES),
    *,
    rounds: int = 20,
    epochs: int = 150,
    most: int = 1_000_000,
    gaps: tuple[float, float] = (0.05, 3.0),
    say: Say = lambda _: None,
) -> Tally:
    """Runs of the strategies in turn, each at least once, until so many processes were killed.

    most: kills of one run.
    """
    rng, tally = random.Random(seed), Tally()
    with hospitals(folder, SITES) as federation, Kept(federation, folder / "kept") as sites:
        while tally.kills.total() < kills or tally.runs < len(strategies):
            strategy = strategies[tally.runs % len(strategies)]
            one = study_of(tally.runs + 1, strategy, rounds, epochs, rng.choice(DEADLINES))
            began = time.monotonic()
            federation.start(one)
            storm = Storm(federation, one.name, rng, gaps, say)
            done = storm.rage(min(most, kills - tally.kills.total()))
            federation.over(one.name, 300)
            records = check(federation, one, sites)
            federation.quiet()
            tally.kills += done
            tally.runs += 1
            tally.rounds += sum(not record.void for record in records)
            tally.void += sum(bool(record.void) for record in records)
            tally.left_out += sum(len(record.left_out) for record in records)
            say(
                f"{one.name} ({one.cohort.deadline:g} s): {done.total()} kills, {time.monotonic() - began:.0f} s"
            )
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", choices=sorted(STRATEGIES), action="append")
    parser.add_argument("--rounds", type=int, default=20, metavar="N")
    parser.add_argument("--epochs", type=int, default=150, metavar="N", help="of a site's round: its length")
    parser.add_argument("--dir", type=Path, help="where its folder is made, which stays where a run fails")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="consortium-kills-", dir=given.dir))
    print(f"in {folder}", flush=True)
    tally = campaign(
        folder,
        given.kills,
        given.seed,
        given.strategy or tuple(STRATEGIES),
        rounds=given.rounds,
        epochs=given.epochs,
        say=lambda text: print(text, flush=True),
    )
    print(f"seed {given.seed}: {tally}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
