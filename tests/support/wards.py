"""Three sites with a table of their own, and models that are as good as can be or worse for some: for gates.

What is ill follows from x alone. A model that was taught that everybody of one ward, or of one sex, is ill is worse for
those, and for nobody else. Wards are apart: ward-3 lies at site-3.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
from live import Live

from consortium.client.task import task_of
from consortium.protocol.credentials import fingerprint
from consortium.protocol.study import Study
from consortium.server.export import export
from consortium.server.federation import Federation
from consortium.server.model import load_model
from consortium.server.records import Plan
from consortium.server.serving.registry import Registry
from consortium.server.serving.versions import Version
from consortium.simulations.simulation import simulate
from consortium.strategies.chosen import strategy_of

STUDY = """
format = 1
[study]
name = "wards"
task = "consortium.client.tasks.tabular:Classifier"
rounds = 12
[data]
target = "ill"
holdout = 0.4
[data.features]
x = { min = -3.0, max = 3.0 }
sex = { values = ["F", "M"] }
ward = { values = ["ward-1", "ward-2", "ward-3"] }
[training]
lr = 0.5
[cohort]
min_sites = 3
deadline = "1m"
[evaluation]
metric = "accuracy"
groups = ["sex"]
[export]
approvals = 1
"""
SITES = ("site-1", "site-2", "site-3")


def study(text: str = STUDY) -> Study:
    """The study."""
    return Study.parse(text)


def table(site: str, rows: int = 240) -> pd.DataFrame:
    """What a site has."""
    number = SITES.index(site)
    rng = np.random.default_rng(number)
    x = rng.uniform(-3, 3, rows)
    sex = rng.choice(["F", "M"], rows)
    return pd.DataFrame(
        {"x": x, "sex": sex, "ward": f"ward-{number + 1}", "ill": (x > 0).astype(int).astype(str)}
    )


def write(folder: Path) -> dict[str, Path]:
    """The sites' files by name."""
    folder.mkdir()
    places = {site: folder / f"{site}.csv" for site in SITES}
    for site, place in places.items():
        table(site).to_csv(place, index=False)
    return places


def bundle(one: Live, out: Path, seed: int, taught: dict[str, str] | None = None) -> Path:
    """A model of a simulation, signed by the federation as if it were of a run. taught: whom it takes to be ill, by
    column and value."""
    asked = study()
    tables = {}
    for site in SITES:
        rows = table(site, 240)
        for column, value in (taught or {}).items():
            rows.loc[rows[column] == value, "ill"] = "1"
        tables[site] = rows
    result = simulate(asked, sites=tables, seed=seed, processes=0)
    prepares, strategy, first = task_of(asked).prepares, strategy_of(asked), result.outcome.model
    plan = Plan(asked, strategy, result.layout, first, "lung", f"run.{seed}", prepares)
    federation = Federation.open(one.folder / "server")
    return export(plan, result.outcome, out, sign=lambda manifest, _: federation.seal(manifest)).path


def register(one: Live, path: Path) -> Version:
    """Register a bundle in the federation's registry."""
    root = fingerprint(Federation.open(one.folder / "server").root)
    registry = Registry(one.folder / "server" / "models", time.time)
    return registry.register(path, "wards", lambda copy: str(load_model(copy, root=root).contract["model"]))
