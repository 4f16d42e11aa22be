"""Results that are published, or known in closed form."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from consortium.client import Source
from consortium.protocol import Study
from consortium.simulations import simulate

STUDIES = Path(__file__).resolve().parents[1] / "studies"
SHARED = Path(os.environ.get("CONSORTIUM_SHARED", Path(__file__).resolve().parents[3] / "shared"))
HEART = SHARED / "data" / "heart" / "fed_heart_disease.csv"


@pytest.mark.parametrize(("strategy", "fixed_point"), [("fedavg", 0.598711), ("scaffold", 0.75)])
def test_fixed_points_of_two_quadratics(strategy: str, fixed_point: float) -> None:
    """Curvatures 1 and 3, optimum .75: FedAvg with ten local steps stops at .598711, SCAFFOLD at .75 exactly."""
    study = Study.load(STUDIES / "quadratic" / "study.toml").with_(strategy={"name": strategy})
    sites = [Source("one", table=(1.0, 0.0)), Source("three", table=(3.0, 1.0))]
    result = simulate(study, sites=sites, processes=1)
    assert result.status == "finished"
    assert result.model["x"] == pytest.approx(fixed_point, abs=1e-12 if strategy == "scaffold" else 5e-7)


# Five-seed means of correct code with streams of its own: accuracy as the mean of the four hospitals' tests, pooled.
PUBLISHED: dict[str, tuple[dict[str, Any], float, tuple[float, float], tuple[float, float]]] = {
    "fedavg": ({}, 0.001, (0.655, 0.740), (0.730, 0.785)),
    "fedprox": ({"mu": 0.01}, 0.001, (0.655, 0.740), (0.730, 0.785)),
    "scaffold": ({"server_lr": 1.0, "weighted": True}, 0.001, (0.655, 0.740), (0.730, 0.785)),
    "fedadam": ({"server_lr": 0.01}, 0.01, (0.715, 0.750), (0.760, 0.795)),
    "fedyogi": ({"server_lr": 0.01}, 0.003162, (0.715, 0.752), (0.765, 0.795)),
    "fedadagrad": ({"server_lr": 0.316228}, 0.003162, (0.715, 0.752), (0.765, 0.795)),
}


def pooled_accuracy(table: pd.DataFrame, model: Mapping[str, Any]) -> float:
    """Accuracy on the union of the tests. As in the benchmark, the pooled data set is normalised by the mean and
    deviation of the pooled training rows, not by each hospital's own."""
    columns = [name for name in table.columns if name not in ("centre", "split", "label")]
    training, test = table.loc[table["split"] == "train", columns], table[table["split"] == "test"]
    rows = (test[columns] - training.mean()) / (training.std(ddof=1) + 1e-9)
    logits = rows.to_numpy() @ model["weight"][0] + model["bias"]
    return float(((logits > 0) == (test["label"] > 0)).mean())


def scored(table: pd.DataFrame, name: str, seed: int) -> tuple[float, float]:
    """One run: the mean of the four hospitals' accuracies, and the pooled one."""
    parameters, lr, *_ = PUBLISHED[name]
    study = Study.load(STUDIES / "heart" / "study.toml")
    study = study.with_(strategy={"name": name, **parameters}, training={"lr": lr})
    sites = [Source(str(centre), table=rows) for centre, rows in table.groupby("centre")]
    result = simulate(study, sites=sites, seed=seed, processes=0)
    final = result.outcome.evaluation
    assert final is not None
    assert final.round == 15
    hospitals = [one["accuracy"] for one in final.sites.values()]
    return float(np.mean(hospitals)), pooled_accuracy(table, result.model)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not HEART.exists(), reason="the shared data folder beside the project is not here")
def test_fed_heart_disease_is_reproduced() -> None:
    """FLamby's protocol (batch 4, 100 updates x 15 rounds, seeds 42-46): five-seed means inside the published bands,
    for all six strategies."""
    table = pd.read_csv(HEART)
    runs = list(product(PUBLISHED, range(42, 47)))
    with multiprocessing.get_context("fork").Pool(
        len(os.sched_getaffinity(0))
    ) as pool:  # a run a core at a time
        scores = pool.starmap(partial(scored, table), runs, chunksize=1)
    means = {
        name: tuple(float(x) for x in np.mean(scores[5 * number : 5 * number + 5], axis=0).round(4))
        for number, name in enumerate(PUBLISHED)
    }
    for name, (_, _, *bands) in PUBLISHED.items():
        for (low, high), value in zip(bands, means[name], strict=True):
            assert low <= value <= high, (name, means)
