"""Our own simulator on the benchmark's work, as a study whose own code is `workload_task.py` beside this file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from consortium.client import Source
from consortium.client.trainer import Batches
from consortium.protocol import Study
from consortium.protocol.sections import Training
from consortium.server.records import InMemory, RunState
from consortium.simulations.host import Population
from consortium.simulations.simulation import simulate
from contenders.workloads import BATCH, LEARNING_RATE, Recorder, Spec, first_model, load_records


def study_of(spec: Spec) -> Study:
    """The case as a study file."""
    text = f"""
    format = 1
    [study]
    name = "benchmark"
    task = "workload_task:WorkloadTask"
    rounds = {spec.rounds}
    [data]
    holdout = 0.0
    workload = "{spec.workload}"
    [training]
    lr = {LEARNING_RATE[spec.workload]}
    batch_size = {BATCH}
    [strategy]
    name = "workload_task:given_cohorts"
    spec = '{spec.to_json()}'
    [cohort]
    min_sites = 1
    """
    return Study.parse(text, folder=Path(__file__).parent)


def in_order(training: Training, rows: int, seed: int, site: str, round: int) -> Batches:
    """One pass in the order of the records, as every contender has it."""
    order, size = np.arange(rows), training.batch_size
    return [order[i : i + size] for i in range(0, rows, size)]


class Recording(InMemory):
    """Commits that note the end of each round."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def commit(self, state: RunState) -> RunState:
        super().commit(state)
        self._recorder.end_round(state.model)
        if state.round == self._recorder.spec.rounds:
            self._recorder.finish()
            raise SystemExit  # the evaluation of the last model is no part of the case
        return state


def run(spec: Spec) -> None:
    """Any torch trainer: one resident model a process."""
    recorder, records = Recorder(spec), load_records(spec)
    names = [f"{i:06}" for i in range(spec.population)]
    simulate(
        study_of(spec),
        sites=Population(names, lambda i: Source(names[i], table=records.client(i))),
        processes=spec.processes,
        initial=first_model(spec),
        batches=in_order,
        commits=Recording(recorder),
    )
