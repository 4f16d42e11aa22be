"""The process of one run: the round loop, without the federation's keys and without the database.

    python -m consortium.server.run_process DESCRIPTOR

DESCRIPTOR is a socket to the server that started it (`server/link.py`), over which it learns which study this is, and
through which alone it reaches sites and commits. It works in its run's folder, where `plan.json` and `initial.bin` keep
what a worker made of the study (seconds of work), so that a restart need not make it again. It can be killed at any
moment: the next one continues from the last commit.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from consortium.protocol import bundle
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.files import write_private
from consortium.protocol.layout import Layout, digest_of
from consortium.protocol.local import ClosedError
from consortium.protocol.memory import give_freed_memory_back, keep_freed_memory
from consortium.protocol.sealed import DataKey
from consortium.protocol.study import Study
from consortium.server import results, worker_process
from consortium.server.coordinator import run
from consortium.server.link import Link, LinkClients, LinkCommits
from consortium.server.records import Outcome, Plan
from consortium.server.standing import FAILURES
from consortium.strategies.base import Strategy
from consortium.strategies.chosen import strategy_of

FORMAT = 1
PLAN, INITIAL, MODEL, CODE = "plan.json", "initial.bin", "model", "code"
"""Files of a run's folder; the last two are folders: the exported model, and the study's code."""
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
    plan = _plan(study, first, folder, begun=state is not None)
    link.call("ready", layout_bytes=plan.layout.nbytes)
    keep_freed_memory()
    clients = LinkClients(link, commits, Path(first["spool"]), time.time)
    report = results.reporter(folder / "rounds.jsonl", state)
    del state  # the round loop loads it for itself, and lets go of it
    with threadpool_limits(1, user_api="blas"):  # more threads would change the bits of a sum of products
        outcome = run(
            plan,
            clients,
            commits,
            clock=time.time,
            rng=random.SystemRandom(),
            report=report,
            rest=time.sleep,
            name=commits.name,
        )
    give_freed_memory_back()  # what follows needs other memory, and is done once
    (folder / INITIAL).unlink(missing_ok=True)
    results.write(folder, plan, outcome)
    if outcome.status == "failed":
        return outcome.status, outcome.why
    exported = _exported(link, plan, outcome, folder)
    return outcome.status, "; ".join(text for text in (outcome.why, exported) if text)


def _study(first: dict[str, Any], folder: Path) -> Study:
    """The run's study, its code laid out in the run's folder."""
    if not first.get("bundle"):
        return Study.parse(str(first["study"]), source="the run's study")
    shutil.rmtree(folder / CODE, ignore_errors=True)
    return bundle.read((folder / str(first["bundle"])).read_bytes()).unpack(folder / CODE)


def _plan(study: Study, first: dict[str, Any], folder: Path, begun: bool) -> Plan:
    """The plan, from the run's folder where it is there and of this study, else by a worker."""
    strategy = strategy_of(study)
    kept = _kept(study, folder, begun) or _made(study, strategy, folder)
    if begun:
        (folder / INITIAL).unlink(missing_ok=True)
    layout = Layout.parse(kept["layout"])
    dtype = layout["shared"].numpy_dtype
    # Mapped, not read: it is needed before the first commit alone.
    initial = np.empty(0, dtype) if begun else np.memmap(folder / INITIAL, dtype, "r").view(np.ndarray)
    names = str(first["federation"]), str(first["run"])
    prepares, spare = bool(kept["prepares"]), study.cohort.spare
    return Plan(study, strategy, layout, initial, *names, prepares, spare, FAILURES)


def _kept(study: Study, folder: Path, begun: bool) -> dict[str, Any] | None:
    """What `_made` wrote, or None where that is not whole or of another study."""
    try:
        kept = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        dtype = Layout.parse(kept["layout"])["shared"].numpy_dtype
        whole = kept["format"] == FORMAT and kept["study"] == study.digest and "prepares" in kept
        if whole and not begun:
            whole = digest_of([np.memmap(folder / INITIAL, dtype, "r")]) == kept["model"]
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None
    return dict(kept) if whole else None


def _made(study: Study, strategy: Strategy, folder: Path) -> dict[str, Any]:
    return keep(study, worker_process.initial(study, strategy.local), folder)


def keep(study: Study, first: worker_process.Initial, folder: Path) -> dict[str, Any]:
    """Put a study's first model and its plan into a run's folder; returns what `plan.json` holds."""
    first.vector.tofile(folder / INITIAL)
    kept = {
        "format": FORMAT,
        "study": study.digest,
        "layout": first.layout.document(),
        "model": digest_of([first.vector]),
        "prepares": first.prepares,
    }
    write_private(folder / PLAN, json.dumps(kept).encode())
    return kept


def _exported(link: Link, plan: Plan, outcome: Outcome, folder: Path) -> str:
    """Write the model that serves into the run's folder; returns why that was not possible, or nothing."""
    from consortium.server.export import export  # loads what only exporting needs

    def sign(manifest: bytes, lineage: bytes) -> dict[str, Any] | None:
        return link.call("seal", manifest=manifest.decode(), lineage=lineage.decode())["signature"]  # type: ignore[no-any-return]

    try:
        shutil.rmtree(folder / MODEL, ignore_errors=True)  # of a process that died after it exported
        export(plan, outcome, folder / MODEL, sign=sign)
    except ConsortiumError as error:
        return f"the model is not exported: {error}"
    return ""


if __name__ == "__main__":
    os.umask(0o077)
    raise SystemExit(main())
