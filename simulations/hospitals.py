"""The demonstration's data: scikit-learn's breast-cancer table, split over made-up hospitals with habits of their own.

The split is artificial: one clinic's 569 patients are dealt out unevenly, in number and in diagnosis. Each hospital
then writes its part with its own names of columns, units and codes, and a mapping that says how to read them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tomli_w
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer

from consortium.protocol.files import write_private
from consortium.protocol.study import Study

SEED = 7
TARGET, PERSON = "malignant", "patient"
RANGES = {
    "radius": (0.0, 40.0), "texture": (0.0, 50.0), "perimeter": (0.0, 250.0), "area": (0.0, 3000.0),
    "smoothness": (0.0, 0.3), "compactness": (0.0, 0.5), "concavity": (0.0, 0.6), "concave_points": (0.0, 0.3),
    "symmetry": (0.0, 0.5), "fractal_dimension": (0.0, 0.15),
}  # fmt: skip
"""The study's features, means over each patient's cell nuclei, and the ranges that it declares."""


@dataclass(frozen=True)
class Habits:
    """How one hospital writes its table.

    columns: its names of the ten features, the diagnosis and the patient, in the study's order.
    codes: what it writes for benign and malignant. factor: by which it writes lengths (and its square, areas).
    """

    columns: tuple[str, ...]
    codes: tuple[str, str]
    factor: float = 1.0
    separator: str = ","
    decimal: str = "."


HABITS = (
    Habits(
        ("mean radius", "mean texture", "mean perimeter", "mean area", "mean smoothness", "mean compactness",
         "mean concavity", "mean concave points", "mean symmetry", "mean fractal dimension", "diagnosis", "id"),
        ("B", "M"),
    ),
    Habits(
        ("Radius", "Textur", "Umfang", "Flaeche", "Glaette", "Kompaktheit", "Konkavitaet", "KonkavePunkte",
         "Symmetrie", "FraktaleDimension", "Befund", "PatientenNr"),
        ("gutartig", "boesartig"), factor=0.1, separator=";", decimal=",",
    ),
    Habits(
        ("rayon", "texture", "perimetre", "aire", "regularite", "compacite", "concavite", "points_concaves",
         "symetrie", "dimension_fractale", "malin", "dossier"),
        ("non", "oui"), factor=1000.0,
    ),
    Habits(
        ("radio_um", "textura", "perimetro_um", "area_um2", "suavidad", "compacidad", "concavidad",
         "puntos_concavos", "simetria", "dimension_fractal", "resultado", "historia"),
        ("1", "2"), separator="|",
    ),
)  # fmt: skip

_STUDY = """\
format = 1
[study]
name = "breast-cancer-demo"
task = "consortium.client.tasks.tabular:Classifier"
rounds = {rounds}
seed = {seed}

[data]
target = "{target}"
person = "{person}"
holdout = 0.25
[data.features]
{features}

[training]
optimizer = "sgd"
lr = 0.1
batch_size = 16
local_epochs = 2

[strategy]
{strategy}

[cohort]
min_sites = 2
deadline = "{deadline}"
"""


def study_of(rounds: int, strategy: str = 'name = "fedavg"', deadline: str = "2m") -> Study:
    """The demonstration's study. strategy: the lines of its [strategy]."""
    features = "\n".join(f"{name} = {{ min = {low}, max = {high} }}" for name, (low, high) in RANGES.items())
    text = _STUDY.format(
        rounds=rounds,
        seed=SEED,
        target=TARGET,
        person=PERSON,
        features=features,
        strategy=strategy,
        deadline=deadline,
    )
    return Study.parse(text, source="the demonstration's study")


def patients() -> pd.DataFrame:
    """All 569 rows in the study's columns, with the diagnosis (1: malignant) and a patient's number."""
    bunch = load_breast_cancer()
    frame = pd.DataFrame(bunch.data[:, : len(RANGES)], columns=list(RANGES))
    return frame.assign(**{TARGET: 1 - bunch.target, PERSON: [f"P{n:04}" for n in range(1, len(frame) + 1)]})


def write_hospitals(folder: Path, number: int) -> dict[str, Path]:
    """Make a folder for each of `number` hospitals, with table, mapping and holdout key; folders by name.

    The same call writes the same bytes, keys too, so that the demonstration's figures repeat; a real site's key is
    random.
    """
    whole = patients()
    folders = {}
    for place, rows in enumerate(_uneven(whole[TARGET].to_numpy(), number)):
        name = f"hospital-{place + 1}"
        folders[name] = folder / name
        folders[name].mkdir(mode=0o700, parents=True)
        _write(folders[name], whole.iloc[rows], HABITS[place % len(HABITS)])
    return folders


def _uneven(labels: NDArray[np.int64], number: int) -> list[NDArray[np.int64]]:
    """Rows of each hospital: each has about 0.6 of the rows of the one before, and more or less than its share of
    malignant ones in turn; every row goes to one hospital, and none is without both diagnoses."""
    rng = np.random.default_rng(SEED)
    size = np.maximum(0.6 ** np.arange(number), 0.1)
    lean = np.where(np.arange(number) % 2, 1.5, 1 / 1.5)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(number)]
    for label, shares in ((0, size / lean), (1, size * lean)):
        rows = rng.permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum(shares / shares.sum()) * len(rows)).astype(int)
        for part, own in zip(parts, np.split(rows, ends[:-1]), strict=True):
            part.append(own)
    return [np.sort(np.concatenate(part)) for part in parts]


def _write(folder: Path, rows: pd.DataFrame, habits: Habits) -> None:
    names = dict(zip([*RANGES, TARGET, PERSON], habits.columns, strict=True))
    columns: dict[str, dict[str, object]] = {study: {"column": own} for study, own in names.items()}
    table = rows.copy()
    for name, power in (("radius", 1), ("perimeter", 1), ("area", 2)):
        factor = habits.factor**power
        if factor != 1:
            table[name] = table[name] * factor
            columns[name]["scale"] = 1 / factor
    table[TARGET] = np.array(habits.codes)[table[TARGET].to_numpy()]
    columns[TARGET]["codes"] = {code: value for value, code in enumerate(habits.codes)}
    document = {
        "format": 1,
        "source": {"separator": habits.separator, "decimal": habits.decimal},
        "columns": columns,
    }
    table.rename(columns=names).to_csv(
        folder / "patients.csv", index=False, sep=habits.separator, decimal=habits.decimal
    )
    (folder / "mapping.toml").write_text(tomli_w.dumps(document), encoding="utf-8")
    write_private(folder / "holdout.key", hashlib.sha256(folder.name.encode()).digest())
