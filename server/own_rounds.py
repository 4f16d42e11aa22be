"""The round loop of a study that brings its own strategy: a confined program (`server/own_code.py`).

It is the loop of every run over `LinkClients` and `LinkCommits`; only what it may reach is less. It is told what the
run's process was told, and `folder`, the run's, where the plan lies.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from consortium.protocol.memory import keep_freed_memory
from consortium.protocol.sealed import DataKey
from consortium.protocol.study import Study
from consortium.server.coordinator import run
from consortium.server.link import Link, LinkClients, LinkCommits
from consortium.server.own_code import run_inside
from consortium.server.plans import CODE, kept_plan
from consortium.strategies.chosen import strategy_of


def main(arguments: Sequence[str], confine: Callable[[], None]) -> int:
    """Run the rounds; returns the exit code: 0 where it was said how they ended."""
    return run_inside(arguments, confine, _rounds)


def _rounds(link: Link) -> None:
    first = link.first()
    folder, scratch = Path(first["folder"]), Path.cwd()
    key = DataKey(bytes.fromhex(first["key"]))
    commits = LinkCommits(link, str(first["run"]), scratch, key)
    begun = commits.load() is not None
    study = Study.parse(str(first["study"]), source="the run's study", folder=folder / CODE)
    plan = kept_plan(study, strategy_of(study), first, folder, begun)
    keep_freed_memory()
    clients = LinkClients(link, commits, scratch, time.time)
    run(  # with one thread, as the environment says: more would change the bits of a sum of products
        plan,
        clients,
        commits,
        clock=time.time,
        rng=random.SystemRandom(),
        rest=time.sleep,
        name=commits.name,
        interrupted=clients.interrupted(),
        begins=clients.begins,
    )
