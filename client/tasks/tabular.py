"""Classification and regression over a table: linear, or a multi-layer perceptron.

Raw inputs are (n, features) in the study's order and the model's dtype: a number in the study's unit, or for a
categorical feature the index of its value, -1 where the value is not listed; NaN is missing. One preprocessing fits
all sites, from one exchange of sums over the declared ranges; it is also the first part of the exported graph.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from consortium.client.columns import Column
from consortium.client.tables import read_some
from consortium.client.task import Examples, Source, Task
from consortium.client.tasks import classification
from consortium.protocol.errors import InputError
from consortium.protocol.messages import Statistics
from consortium.protocol.sections import Categorical, Numeric, TabularData, TabularModel

BINS = 256
"""Bins of a feature's histogram over its declared range; the federated median is right within one of them."""

_CONSTANT = 1e-13
"""Variance, with the declared range as the unit, up to which a feature is taken for constant: a few float32 steps."""

_TORCH = {"float32": torch.float32, "float64": torch.float64}


class Prepare(nn.Module):
    """Raw inputs (n, features) to model inputs (n, width): numbers standardised, then categories one-hot.

    A missing number becomes the federated median (unless the study refuses missing values: then it stays NaN, and so
    does the result). Numbers are clipped to the declared range. A number that is constant in the federation becomes 0
    for every row, as no weight on it was learnt. A category that is missing or not listed is all zeros.
    """

    def __init__(
        self, task: _Tabular, median: NDArray[Any], mean: NDArray[Any], inverse: NDArray[Any]
    ) -> None:
        """median, mean: (numeric,) in the features' units; inverse: 1 / deviation, 0 where constant."""
        super().__init__()
        self.impute = task.table.missing == "median"
        features = list(task.table.features.values())
        numeric = [i for i, f in enumerate(features) if isinstance(f, Numeric)]
        onehot = [
            (i, k) for i, f in enumerate(features) if isinstance(f, Categorical) for k in range(len(f.values))
        ]
        self.numeric: Tensor
        self.register_buffer("numeric", torch.tensor(numeric, dtype=torch.int64))
        self.category: Tensor
        self.register_buffer("category", torch.tensor([i for i, _ in onehot], dtype=torch.int64))
        low, high = task.ranges
        numbers = {
            "code": np.array([k for _, k in onehot], np.float64),
            "low": low, "high": high, "median": median, "mean": mean, "inverse": inverse,
        }  # fmt: skip
        for name, values in numbers.items():
            self.register_buffer(name, torch.from_numpy(np.asarray(values, np.float64)).to(task.dtype))
        self.code: Tensor
        self.low: Tensor
        self.high: Tensor
        self.median: Tensor
        self.mean: Tensor
        self.inverse: Tensor

    def forward(self, raw: Tensor) -> Tensor:
        """(n, width) in the model's dtype."""
        raw = raw.to(self.mean.dtype)
        numbers = raw.index_select(1, self.numeric)
        if self.impute:
            numbers = torch.where(torch.isnan(numbers), self.median, numbers)
        numbers = torch.minimum(torch.maximum(numbers, self.low), self.high)
        scaled = (numbers - self.mean) * self.inverse
        categories = (raw.index_select(1, self.category) == self.code).to(scaled.dtype)
        return torch.cat([scaled, categories], dim=1)


class _Tabular(Task):
    """What classifier and regressor share."""

    @property
    def prepares(self) -> bool:  # type: ignore[override] # of the study here
        """Whether scales and medians are learnt; under differential privacy they are the middles of declared ranges."""
        return self.study.privacy.mechanism == "none"

    @property
    def table(self) -> TabularData:
        """[data] of the study."""
        return cast(TabularData, self.study.data)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return _TORCH[self.study.model.dtype]

    @property
    def ranges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper ends of the numeric features, each (numeric,)."""
        pairs = [(f.min, f.max) for f in self.table.features.values() if isinstance(f, Numeric)]
        low, high = np.array(pairs, np.float64).reshape(-1, 2).T
        return low, high

    @property
    def width(self) -> int:
        """How many inputs the model has after preprocessing."""
        return sum(
            1 if isinstance(feature, Numeric) else len(feature.values)
            for feature in self.table.features.values()
        )

    @abstractmethod
    def target_column(self) -> Column:
        """How the target is read from a site's table."""

    @abstractmethod
    def targets(self, values: NDArray[Any]) -> Tensor:
        """Targets as `loss` takes them, from the target's column (n,)."""

    @abstractmethod
    def outputs(self) -> int:
        """How many outputs the model has."""

    def model(self) -> nn.Module:
        """A linear model where `hidden` is empty, else a perceptron with ReLU."""
        widths = [self.width, *cast(TabularModel, self.study.model).hidden]
        head = nn.Linear(widths[-1], self.outputs())
        if len(widths) == 1:
            return head
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, head)

    def data(self, source: Source) -> Examples:
        """A site's table through its mapping; see `client.tables.read_some` for what is refused."""
        table = self.table
        refuse = table.missing == "refuse"
        columns = [
            Column(name, range=(feature.min, feature.max), needed=refuse)
            if isinstance(feature, Numeric)
            else Column(name, values=tuple(feature.values), needed=refuse)
            for name, feature in table.features.items()
        ]
        columns.append(self.target_column())
        if table.person is not None:
            columns.append(Column(table.person, text=True, needed=True))
        if table.split is not None:
            columns.append(Column(table.split, values=("train", "test"), closed=True, needed=True))
        frame, skipped = read_some(source, columns, table.tolerance)
        raw = np.stack([frame[name].to_numpy(np.float64) for name in table.features], axis=1)
        return Examples(
            torch.from_numpy(raw).to(self.dtype),
            self.targets(frame[table.target].to_numpy(np.float64)),
            ids=self._ids(frame, bool(skipped.count)),
            test=None if table.split is None else frame[table.split].to_numpy() == 1,
            skipped=skipped,
        )

    def _ids(self, frame: pd.DataFrame, some: bool) -> NDArray[Any] | None:
        """Persons; else row numbers, which are said only where `some` are skipped: the others keep their places."""
        if self.table.person is not None:
            return frame[self.table.person].to_numpy()
        return frame.index.to_numpy() if some else None

    def statistics(self, examples: Examples) -> Statistics:
        """Sums over the observed numbers, clipped, with each declared range as the unit interval.

        histogram: (numeric, 256) counts; count, sum, squares: (numeric,).
        """
        low, high = (ends[:, None] for ends in self.ranges)
        numeric = [i for i, f in enumerate(self.table.features.values()) if isinstance(f, Numeric)]
        # One row a feature, each contiguous, so that numpy sums pairwise and a constant is seen as one.
        raw = np.ascontiguousarray(examples.inputs[:, numeric].double().numpy().T)
        unit = (np.clip(raw, low, high) - low) / (high - low)
        seen = ~np.isnan(unit)
        histogram = np.zeros((len(numeric), BINS))
        for row, values, some in zip(histogram, unit, seen, strict=True):
            bins = np.minimum((values[some] * BINS).astype(np.int64), BINS - 1)
            row[:] = np.bincount(bins, minlength=BINS)
        unit[~seen] = 0.0
        return {
            "histogram": histogram,
            "count": seen.sum(axis=1).astype(np.float64),
            "sum": unit.sum(axis=1),
            "squares": np.square(unit).sum(axis=1),
        }

    def preprocessing(self, sums: Statistics) -> Prepare:
        """The step from raw inputs to model inputs, from the sums of all sites; under differential privacy from the
        declared ranges alone, which costs nothing.

        What no data have is pulled back to what they can have (a mean within the range, a variance of at most a
        quarter of its square, no count below zero), so that a site that lies can make it useless, but no NaN.

        Raises:
            InputError: the sums are not those of this study's features.
        """
        low, high = self.ranges
        if not self.prepares:
            # A number spread evenly over its range has a twelfth of the squared range as variance.
            middle = (low + high) / 2
            return Prepare(self, middle, middle, math.sqrt(12.0) / (high - low))
        shapes = {"histogram": (len(low), BINS), "count": low.shape, "sum": low.shape, "squares": low.shape}
        for name, shape in shapes.items():
            if name not in sums or sums[name].shape != shape or not np.isfinite(sums[name]).all():
                raise InputError(
                    f"statistics: '{name}' is not {shape} finite numbers, as study '{self.study.name}' has it"
                )
        n = np.maximum(sums["count"], 1.0)
        mean = np.where(sums["count"] > 0, np.clip(sums["sum"] / n, 0.0, 1.0), 0.5)
        variance = np.minimum(sums["squares"] / n - np.square(mean), 0.25)
        varies = (sums["count"] > 0) & (variance > _CONSTANT)
        inverse = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
        span = high - low
        return Prepare(
            self, low + span * _medians(np.maximum(sums["histogram"], 0)), low + span * mean, inverse / span
        )

    def signature(self) -> dict[str, Any]:
        """Raw inputs by name, in order, and what is served."""
        inputs: list[dict[str, Any]] = [
            {"name": name, "kind": "numeric", "min": feature.min, "max": feature.max}
            if isinstance(feature, Numeric)
            else {"name": name, "kind": "categorical", "values": list(feature.values)}
            for name, feature in self.table.features.items()
        ]
        return {"inputs": inputs, "outputs": self.served(), "missing": self.table.missing}

    @abstractmethod
    def served(self) -> list[dict[str, object]]:
        """The outputs of the signature."""


def _medians(histogram: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median of each row of counts (rows, bins) over the unit interval, interpolated within its bin.

    Off by at most one bin, 1/bins; 0.5 for a row without counts. Where the two middle values lie in two bins, the
    median is halfway between these bins.
    """
    medians = np.full(len(histogram), 0.5)
    for i, row in enumerate(histogram):
        half = row.sum() / 2
        if half > 0:
            above = np.cumsum(row)
            first, second = (int(np.searchsorted(above, half, side)) for side in ("left", "right"))
            place = first + (half - (above[first] - row[first])) / row[first]
            medians[i] = (place if first == second else (place + second) / 2) / len(row)
    return medians


class Classifier(_Tabular):
    """Classes 0 to classes - 1. Two classes have one output, the logit of class 1."""

    def target_column(self) -> Column:
        """Codes 0 to classes - 1, none missing."""
        codes = tuple(str(code) for code in range(self.table.classes))
        return Column(self.table.target, values=codes, closed=True, needed=True)

    def targets(self, values: NDArray[Any]) -> Tensor:
        """(n, 1) numbers for two classes, (n,) int64 codes for more."""
        return classification.targets_for(values.astype(np.int64), self.table.classes, self.dtype)

    def outputs(self) -> int:
        """1 for two classes, else one a class."""
        return classification.outputs_for(self.table.classes)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy."""
        return classification.loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Statistics:
        """See `classification.counts`."""
        return classification.counts(outputs, targets, self.study.evaluation.auroc == "exact")

    def served_metrics(self, served: tuple[Tensor, ...], targets: Tensor) -> Statistics:
        """As `metrics`, from probabilities (n, classes)."""
        return self.metrics(classification.scores(served[0]), targets)

    def check(self, targets: Mapping[str, Tensor]) -> None:
        """Refuse a federation of one class."""
        classification.refuse_one_class(f"study '{self.study.name}', target '{self.table.target}'", targets)

    def served(self) -> list[dict[str, object]]:
        """One probability a class."""
        return classification.served(self.table.classes)

    def output(self) -> nn.Module:
        """Probabilities (n, classes)."""
        return classification.Probabilities(self.table.classes)


class Scale(nn.Module):
    """From a regressor's outputs, in units of `target_range`, to the target's unit."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.span = low, high - low

    def forward(self, outputs: Tensor) -> Tensor:
        """(n, 1) in the target's unit."""
        return outputs * self.span + self.low


class Regressor(_Tabular):
    """A number. The model learns it as a share of `target_range`; metrics and export are in the target's unit."""

    @property
    def target_range(self) -> tuple[float, float]:
        """Lower and upper end of the target, in its unit."""
        declared = cast(Numeric, self.table.target_range)  # a study without it does not pass its checks
        return declared.min, declared.max

    def target_column(self) -> Column:
        """A number within `target_range`, none missing."""
        return Column(self.table.target, range=self.target_range, closed=True, needed=True)

    def targets(self, values: NDArray[Any]) -> Tensor:
        """(n, 1) shares of `target_range`."""
        low, high = self.target_range
        return torch.from_numpy((values - low) / (high - low)).to(self.dtype).unsqueeze(1)

    def outputs(self) -> int:
        """One."""
        return 1

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error, in squares of `target_range`."""
        return F.mse_loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Statistics:
        """rmse: [sum of squared errors, n], in the target's unit.

        Raises:
            InputError: an output is not finite.
        """
        if not bool(torch.isfinite(outputs).all()):
            raise InputError(
                "the received model's outputs are not finite: training has diverged; lower training.lr"
            )
        low, high = self.target_range
        errors = (outputs.double() - targets.double()) * (high - low)
        return {"rmse": np.array([float(errors.square().sum()), len(targets)])}

    def served_metrics(self, served: tuple[Tensor, ...], targets: Tensor) -> Statistics:
        """As `metrics`, from predictions (n, 1) in the target's unit."""
        low, high = self.target_range
        return self.metrics((served[0].double() - low) / (high - low), targets)

    def served(self) -> list[dict[str, object]]:
        """One number in the target's unit."""
        return [{"name": "prediction"}]

    def output(self) -> nn.Module:
        """Predictions (n, 1) in the target's unit."""
        return Scale(*self.target_range)
