"""kill -9 of a site at random moments of a private run: what its ledger holds, against what the server got.

    python tests/support/ledger_kills.py [--kills 50] [--seed 3] [--dir DIR]

A run by dp-sgd over two sites, of which one's agent or worker is killed and started again, nothing else. Each time,
while it is down, it is checked that

- the ledger verifies, by the site's own command, also against what the server has countersigned;
- of each answer that the server admitted, the ledger holds the charge, and the very bytes as what left;
- of no round have more different answers left than it has charges.

The seed decides what is killed and how long after what before; how far the programs have got by then, it does not.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from live import COMMAND, Live, children, hospitals, study

from consortium.client.charges import ledger_in
from consortium.privacy.ledger import Ledger
from consortium.protocol.study import Study

SITES = 2
PRIVACY = 'unit = "record"\nmechanism = "dp-sgd"\nepsilon = {epsilon}\ndelta = 1e-5\nclip_norm = 1.0'
EARLY = 0.3
"""The share of kills that do not wait until the site has charged another round: else most come while it starts."""
AGENTS = 0.7
"""The share of kills that end the agent; the others end its worker."""


@dataclass
class Tally:
    """What was done, and what it led to. kills: by what was killed. admitted: answers that were compared."""

    kills: Counter[str] = field(default_factory=Counter)
    charges: int = 0
    answers: int = 0
    admitted: int = 0
    unsent: int = 0

    def __str__(self) -> str:
        killed = ", ".join(f"{count} {what}" for what, count in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({killed}): {self.charges} charges, {self.answers} different answers left, "
            f"{self.admitted} of them admitted; {self.unsent} charges of which nothing left"
        )


def private(name: str, rounds: int, epsilon: float = 3.0) -> Study:
    """A study by dp-sgd with short rounds."""
    text = study(name, SITES, rounds=rounds, epochs=1, deadline="2m").text
    text = re.sub(r"\[privacy\][^\[]*", "", text)
    return Study.parse(text + f"\n[privacy]\n{PRIVACY.format(epsilon=epsilon)}\n")


def client(federation: Live, site: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of a site's."""
    command = [*map(str, COMMAND), "client", *words, "--dir", str(federation.home(site).folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def book_of(federation: Live, site: str) -> Ledger:
    """A site's ledger as it is on the disk now."""
    home = federation.home(site)
    return ledger_in(home, home.lock())


def check(federation: Live, name: str, site: str) -> Tally:
    """Compare a site's ledger with what the server has; what was found.

    Raises:
        AssertionError: the ledger shows less than what left, or does not verify.
    """
    # What the server has is read first: whatever it has was in the ledger before it was sent.
    events = [one for one in federation.events(name) if one["round"] and site in one["admitted"]]
    found = client(federation, site, "ledger", "verify")
    assert found.returncode == 0, found.stderr
    book = book_of(federation, site)
    accounts = book.accounts()
    charges = [one for account in accounts.values() for one in account.charges]
    left = {step: digests for account in accounts.values() for step, digests in account.left.items()}
    made = Counter(one.question.step for one in charges)
    for event in events:
        sent = event["updates"][site]
        steps = [step for step in left if step[:2] == (f"{name}.1", event["round"])]
        assert any(sent in left[step] for step in steps), f"{site}, round {event['round']}: left uncharged"
    for step, digests in left.items():
        assert len(digests) <= made[step], f"{site}, {step[:2]}: {len(digests)} answers, {made[step]} charges"
    answers = sum(map(len, left.values()))
    return Tally(Counter(), len(charges), answers, len(events), len(charges) - answers)


def _charged_more(federation: Live, site: str) -> None:
    """Wait until the site has charged something."""
    before = book_of(federation, site).head.sequence
    federation.until(
        lambda: book_of(federation, site).head.sequence > before, 120, "nothing is charged", 0.05
    )


def campaign(folder: Path, kills: int, seed: int, say: Callable[[str], None] = lambda _: None) -> Tally:
    """Kill one site so often within one run, and check its ledger each time."""
    rng, done, name = random.Random(seed), Counter[str](), "killed"
    with hospitals(folder, SITES) as federation:
        site = sorted(federation.places)[0]
        federation.start(private(name, 40 * kills, epsilon=8.0))
        while done.total() < kills:
            if rng.random() > EARLY:
                _charged_more(federation, site)
                time.sleep(rng.uniform(0.0, 1.0))
            else:
                time.sleep(rng.uniform(0.0, 3.0))
            workers = children(federation.pids[site], "consortium.client.worker")
            what = "agent" if rng.random() < AGENTS or not workers else "worker"
            if what == "worker":
                with suppress(ProcessLookupError):  # it ended by itself since
                    federation.kill(workers[0])
            else:
                federation.end(site)
            done[what] += 1
            say(f"  killed the {what}: {check(federation, name, site)}")
            if what == "agent":
                federation.start_client(site)
        federation.until(
            lambda: any(site in one["admitted"] and one["round"] for one in federation.events(name)),
            120,
            "no answer of the site counts",
        )
        federation.admin.post(f"/v1/studies/{name}/stop")
        tally = check(federation, name, site)
        federation.quiet(60)  # what was killed last may still be on its way out
    tally.kills = done
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where its folder is made, which stays where a run fails")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="consortium-ledger-", dir=given.dir))
    print(f"in {folder}", flush=True)
    began = time.monotonic()
    tally = campaign(folder, given.kills, given.seed, lambda text: print(text, flush=True))
    print(f"seed {given.seed}: {tally}, {time.monotonic() - began:.0f} s")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
