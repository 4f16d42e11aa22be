"""The process of one run: the round loop, without the federation's keys and without the database.

    python -m consortium.server.run_process DESCRIPTOR

DESCRIPTOR is a socket to the server that started it (`server/link.py`), over which it learns which study this is, and
through which alone it reaches sites and commits. It works in its run's folder, where `server/plans.py` keeps what
a worker made of the study. It can be killed at any moment: the next one continues from the last commit.

No code that a study brings is loaded here: its model is made and exported by workers, its strategy runs in a process of
its own (`server/own_code.py`), all of them confined.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from consortium.protocol import bundle
from consortium.protocol.code import is_own
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.local import ClosedError
from consortium.protocol.memory import give_freed_memory_back, keep_freed_memory
from consortium.protocol.sealed import DataKey
from consortium.protocol.study import Study
from consortium.server import flower_results, own_code, plans, results
from consortium.server.coordinator import outcome_of, run
from consortium.server.link import Link, LinkClients, LinkCommits
from consortium.server.plans import CODE, INITIAL, PLAN
from consortium.server.records import Outcome, Plan
from consortium.strategies.chosen import strategy_of
from consortium.strategies.named import fedavg

MODEL = "model"
"""The folder of the exported model in a run's."""
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run to the end; returns the exit code: 0 where the server was told how it ended."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing goes on without its server
    signal.signal(signal.SIGTERM, _ended)
    link = Link(socket.socket(fileno=int(given[0])))
    try:
        try:
            status, why = _run(link, link.first(), Path.cwd())
        except ClosedError:
            raise
        except ConsortiumError as error:
            status, why = "failed", str(error)
        except OSError as error:
            status, why = "failed", f"{error.filename or 'a file'}: {error.strerror}; is the disk full?"
        if why:
            print(why, file=sys.stderr, flush=True)
        link.call("finished", status=status, why=why)
    except ClosedError as error:
        print(f"the server has ended: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _ended(number: int, _: Any) -> None:
    raise SystemExit(128 + number)  # so that a worker under way is ended too


def _run(link: Link, first: dict[str, Any], folder: Path) -> tuple[str, str]:
    """Status and reason of the run that `first` names."""
    study = _study(first, folder)
    key = DataKey(bytes.fromhex(first["key"]))
    commits = LinkCommits(link, str(first["run"]), Path(first["checkpoints"]), key)
    state = commits.load()
    if study.app is not None:
        return flower_results.run(link, study, first, folder, results.teller(folder / "rounds.jsonl", state))
    own = is_own(study.strategy.name)
    # A strategy of the study's own is never loaded here; of what it decides only the name is needed.
    strategy = replace(fedavg(), name=study.strategy.name) if own else strategy_of(study)
    plan = plans.plan(study, strategy, first, folder, begun=state is not None)
    link.call("ready", layout_bytes=plan.layout.nbytes)
    keep_freed_memory()
    tell = results.teller(folder / "rounds.jsonl", state)
    del state  # the round loop loads it for itself, and lets go of it
    if own:
        outcome = _confined(link, plan, commits, first, folder, tell)
    else:
        with threadpool_limits(1, user_api="blas"):  # more threads would change the bits of a sum of products
            clients = LinkClients(link, commits, Path(first["spool"]), time.time)
            outcome = run(
                plan,
                clients,
                commits,
                clock=time.time,
                rng=random.SystemRandom(),
                report=lambda one: tell(results.document(one)),
                rest=time.sleep,
                name=commits.name,
                interrupted=clients.interrupted(),
                begins=clients.begins,
            )
    (folder / INITIAL).unlink(missing_ok=True)
    results.write(folder, plan, outcome)
    if outcome.status == "failed":
        return outcome.status, outcome.why
    outcome = results.laid_down(folder, outcome)
    give_freed_memory_back()  # what follows needs other memory, and is done once
    exported = _exported(link, plan, outcome, folder)
    return outcome.status, "; ".join(text for text in (outcome.why, exported) if text)


def _confined(
    link: Link,
    plan: Plan,
    commits: LinkCommits,
    first: dict[str, Any],
    folder: Path,
    tell: Callable[[Mapping[str, Any]], None],
) -> Outcome:
    """The rounds of a study with a strategy of its own, which runs confined."""
    read = [str(folder / name) for name in (CODE, PLAN, INITIAL) if (folder / name).exists()]
    scratch = Path(os.environ["TMPDIR"]) / "own"
    about = {**first, "folder": str(folder), "apart": str(folder)}

    def told(commit: Mapping[str, Any]) -> None:
        for event in commit["events"]:
            tell(event)

    said = own_code.hold(link, "consortium.server.own_rounds", about, read, scratch, told)
    if why := own_code.reason(said):
        raise InputError(why)
    state = commits.load()
    if state is None:
        raise ConsortiumError("the study's code ended without a commit")
    return outcome_of(plan, state)


def _study(first: dict[str, Any], folder: Path) -> Study:
    """The run's study, its code laid out in the run's folder."""
    if not first.get("bundle"):
        return Study.parse(str(first["study"]), source="the run's study")
    shutil.rmtree(folder / CODE, ignore_errors=True)
    return bundle.read((folder / str(first["bundle"])).read_bytes()).unpack(folder / CODE)


def _exported(link: Link, plan: Plan, outcome: Outcome, folder: Path) -> str:
    """Write the model that serves into the run's folder; returns why that was not possible, or nothing."""
    from consortium.server.export import export  # loads what only exporting needs

    def sign(manifest: bytes, lineage: bytes) -> dict[str, Any] | None:
        return link.call("seal", manifest=manifest.decode(), lineage=lineage.decode())["signature"]  # type: ignore[no-any-return]

    try:
        shutil.rmtree(folder / MODEL, ignore_errors=True)  # of a process that died after it exported
        ledger = link.call("released")["ledger"]
        export(plan, outcome, folder / MODEL, sign=sign, ledger=ledger)
    except ConsortiumError as error:
        return f"the model is not exported: {error}"
    return ""


if __name__ == "__main__":
    os.umask(0o077)
    raise SystemExit(main())
