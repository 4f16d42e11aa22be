"""Studies that ask for differential privacy, and tables for them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from consortium.protocol import Study

TEXT = """
format = 1
[study]
name = "private"
task = "consortium.client.tasks.tabular:Classifier"
rounds = {rounds}
[data]
target = "sick"
features = {{ a = {{ min = -4.0, max = 4.0 }}, b = {{ min = -4.0, max = 4.0 }} }}
{data}
[model]
hidden = {hidden}
[training]
lr = 0.5
{training}
[strategy]
name = "fedavg"
weighted = false
[cohort]
min_sites = 2
{cohort}
[privacy]
{privacy}
"""
ASKED = "epsilon = 3.0\ndelta = 1e-5\nclip_norm = 1.0"


def private_study(
    privacy: str,
    rounds: int = 6,
    data: str = "",
    training: str = "",
    cohort: str = "",
    asked: str = ASKED,
    hidden: str = "[]",
) -> Study:
    """A study with these lines in its sections; `asked` is left out where there is no mechanism."""
    privacy = privacy if '"none"' in privacy else f"{privacy}\n{asked}"
    return Study.parse(
        TEXT.format(
            rounds=rounds, data=data, training=training, cohort=cohort, privacy=privacy, hidden=hidden
        )
    )


def table(rows: int, seed: int, people: int | None = None) -> pd.DataFrame:
    """Rows of two features and a target that depends on them; `people` of them where given, by turns."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, rows))
    frame = pd.DataFrame({"a": a, "b": b, "sick": (a - b + 0.3 * rng.standard_normal(rows) > 0).astype(int)})
    if people is not None:
        frame["who"] = [f"p{number % people}" for number in range(rows)]
    return frame
