"""The server's end of a run over Flower: a ServerApp around `server.coordinator.run`.

The app (FAB) holds `study.toml` and the study's own code, so its hash covers both. Its run config holds

    run         a name for this run, unique in the results folder
    sites       how many sites to wait for before the first round
    patience    seconds to wait, for them and later for sites that went away

The results go into the folder that the environment variable CONSORTIUM_RESULTS of the SuperLink names, under the run's
name: `rounds.jsonl` (a line a round and evaluation, while it runs), `result.json`, `model.npy`, `model/` (exported).
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from threadpoolctl import threadpool_limits

from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.study import Study
from consortium.server import results, worker_process
from consortium.server.coordinator import run
from consortium.server.export import export
from consortium.server.grid import FlowerSites
from consortium.server.records import InMemory, Plan
from consortium.strategies.chosen import strategy_of

RESULTS = "CONSORTIUM_RESULTS"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that came with the app, from its initial model to the export.

    Raises:
        ConsortiumError: no model was made; Flower then reports the run as failed, with this text.
    """
    config = context.run_config
    study = Study.load(Path(sys.path[0]) / "study.toml")  # Flower puts the app's folder first
    folder = _results(str(config["run"]))
    plan = _plan(study, str(config["run"]))
    number, patience = int(config["sites"]), float(config["patience"])
    with tempfile.TemporaryDirectory(prefix=".spool-", dir=folder) as spool:
        clients = FlowerSites(grid, plan.layout, Path(spool), patience=patience)
        if not clients.gather(number):
            raise ConsortiumError(
                f"study '{study.name}': {len(clients.sites())} of {number} sites came within {patience:g} s; "
                "start the others, then submit the run again"
            )
        report = results.reporter(folder / "rounds.jsonl")
        rng = random.SystemRandom()
        with threadpool_limits(1, user_api="blas"):  # more threads would change the bits of a sum of products
            outcome = run(plan, clients, InMemory(), clock=time.time, rng=rng, report=report)
    results.write(folder, plan, outcome)
    if outcome.status == "failed":
        raise ConsortiumError(f"study '{study.name}': no round was committed; {outcome.why}")
    export(plan, outcome, folder / "model", trusted=True)


def _results(run: str) -> Path:
    """The new folder of this run."""
    if RESULTS not in os.environ:
        raise InputError(
            f"{RESULTS} is not set; set it to the results folder before flower-superlink is started"
        )
    if not run or Path(run).name != run or run.startswith("."):
        raise InputError(f"run: got {run!r}; a plain name would be right, it becomes a folder")
    folder = Path(os.environ[RESULTS]) / run
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); give the run another name") from error
    return folder


def _plan(study: Study, run: str) -> Plan:
    strategy = strategy_of(study)
    first = worker_process.initial(study, strategy.local, trusted=True)
    return Plan(study, strategy, first.layout, first.vector, "flower", run, first.prepares)
