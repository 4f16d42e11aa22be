"""A plain Flower app (`flower_app.py`) over Flower's stock processes, and what is seen of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from consortium.simulations.programs import Programs
from contenders.flower_processes import App, flower_federation
from contenders.live import Watch, memory_mb

LIMIT = 1800.0
"""Seconds that a run may take."""


@dataclass(frozen=True)
class Measured:
    """rounds: seconds of each, the first too. peak_mb: peak memory of SuperLink and ServerApp above what both take
    without a model."""

    rounds: list[float]
    peak_mb: float


def measure(folder: Path, parameters: int, rounds: int, sites: int = 2, evaluate: bool = True) -> Measured:
    """Rounds of `FedAvg` over as many float32 parameters, in a new folder. evaluate: whether a round has a second
    exchange, in which the sites evaluate the new model."""
    report = folder / "report.json"
    config: dict[str, str | int | float] = {
        "sites": sites,
        "rounds": rounds,
        "parameters": parameters,
        "evaluate": int(evaluate),
        "report": str(report),
    }
    code = Path(__file__).with_name("flower_app.py")
    app = App("plain", "flower_app:server", "flower_app:client", {code.name: code}, config)
    with Programs() as programs, flower_federation(programs, folder / "server") as federation:
        for number in range(sites):
            federation.join(f"site-{number}", folder / f"site-{number}", {"site": number})
        idle = memory_mb(federation.server_pids())
        with Watch(federation.server_pids) as watch:
            federation.run(app, LIMIT)
    found = json.loads(report.read_text())
    times = found["times"]
    assert found["moved"] == rounds * 0.5, "the model is not the mean of what was sent"
    seconds = [after - before for before, after in pairwise(times)]
    return Measured(seconds, watch.mb - idle - found["memory"] / 1e6)
