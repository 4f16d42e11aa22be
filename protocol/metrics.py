"""Metrics from counts.

Sites send counts, never rates; counts of several sites add up, so a pooled metric is exactly the metric of the union.
What a name means here is agreed between client and server:

    accuracy, log_loss, brier, loss, and any other two numbers    [sum, n]        -> sum / n
    rmse                                                          [sum of squares, n] -> sqrt(sum / n)
    auroc        (2, bins): counts of negatives and positives by score bin, ties count half
    auroc_exact  (n, 2): score and label of every example; sites are concatenated, not summed
    confusion    (k, k): rows are true classes, columns predicted
    persons      (1,): how many persons the examples are of, where the study names them
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import Statistics

BINS = 512
LOGIT_LIMIT = 16.0
"""Scores are binned by logit, clipped to [-16, 16]: one bin is 1/16 wide, so that confident scores stay apart."""


SIZES = ("n", "persons")
"""What `values` says beside metrics: how many examples, and persons, stand behind them."""
FEWEST = 10
"""Persons below which a cell of an evaluation is not shown."""


def judged_by(metric: str) -> str:
    """The metric by which an exported model is compared, of the study's; a task of its own may have none."""
    return metric or "loss"


def cell_name(metric: str, cell: str) -> str:
    """The name of counts over one group of rows. cell: places of group and value, such as "0.2"; "" for all rows."""
    return f"{metric}@{cell}" if cell else metric


def cells(counts: Statistics) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Counts by cell, then by name; the inverse of `cell_name`."""
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, array in counts.items():
        metric, _, cell = name.partition("@")
        found.setdefault(cell, {})[metric] = array
    return found


def score_histogram(logits: NDArray[np.float64], positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The `auroc` counts of a site: (2, BINS) from 1-D logits and labels; not-finite logits are refused upstream."""
    unit = (np.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT) + LOGIT_LIMIT) / (2 * LOGIT_LIMIT)
    index = np.minimum((unit * BINS).astype(np.int64), BINS - 1)
    rows = [np.bincount(index[positive == value], minlength=BINS) for value in (False, True)]
    return np.asarray(rows, np.float64)


def reliability(counts: Statistics, bins: int = 10) -> tuple[tuple[float, float, float], ...]:
    """How predicted probabilities of class 1 meet what was observed, from `auroc` or `auroc_exact` counts.

    By bin of the probability (equal parts of 0 to 1, in order): examples, positives, sum of predicted probabilities. A
    histogram's scores count as the middle of their bin, 1/32 off in logit at most. Empty without such counts.
    """
    if "auroc_exact" in counts:
        logits, positive = counts["auroc_exact"].T
        examples = np.ones_like(positive)
    elif "auroc" in counts:
        width = 2 * LOGIT_LIMIT / BINS
        logits = -LOGIT_LIMIT + width * (np.arange(counts["auroc"].shape[1]) + 0.5)
        examples, positive = counts["auroc"].sum(axis=0), counts["auroc"][1]
    else:
        return ()
    predicted = 1 / (1 + np.exp(-np.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT)))
    place = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    n, k, p = (np.bincount(place, w, bins) for w in (examples, positive, examples * predicted))
    return tuple((float(a), float(b), float(c)) for a, b, c in zip(n, k, p, strict=True))


def auroc_of_histogram(counts: NDArray[np.float64]) -> float:
    """Probability that a positive scores above a negative, ties (one bin) counting half; NaN with one class only."""
    negative, positive = counts
    below = np.cumsum(negative) - negative
    pairs = negative.sum() * positive.sum()
    return float(np.dot(positive, below + negative / 2) / pairs) if pairs else float("nan")


def auroc_exact(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The Mann-Whitney statistic of 1-D scores, ties counting half; NaN with one class only."""
    n_positive = int(positive.sum())
    n_negative = positive.size - n_positive
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    total = float(ranks[inverse][positive].sum())
    return (total - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def examples(name: str, counts: NDArray[np.float64]) -> float:
    """How many examples a count stands for, so that one site cannot count for more than the study allows.

    Infinite for counts below zero where only a number of examples makes sense.
    """
    if name.endswith("_exact"):
        return float(len(counts))
    numbers = counts[1:] if counts.shape == (2,) else counts
    return float("inf") if (numbers < 0).any() else float(numbers.sum())


_LARGEST_SUM = {"accuracy": 1.0, "brier": 2.0, "log_loss": float("inf"), "rmse": float("inf")}
"""By how much one example adds to the sum at most; none adds less than zero."""


def problem(name: str, counts: NDArray[np.float64]) -> str:
    """Why no honest site has these counts, finite numbers, under this name; empty where one may."""
    shape = counts.shape
    right = {
        "auroc": len(shape) == 2 and shape[0] == 2 and shape[1] > 0,
        "auroc_exact": len(shape) == 2 and shape[1] == 2,
        "confusion": len(shape) == 2 and shape[0] == shape[1],
        "persons": shape == (1,) and counts[0] >= 0,
    }
    if not right.get(name, shape == (2,) if name in _LARGEST_SUM else True):
        return f"has shape {shape}"
    if name.endswith("_exact") and not shape:
        return "has no rows"
    if name in _LARGEST_SUM:
        total, n = float(counts[0]), max(float(counts[1]), 0.0)
        slack = 1e-9 * (n + 1)  # sums of many rounded numbers
        if not -slack <= total <= (_LARGEST_SUM[name] * n if n else 0.0) + slack:
            return f"has the sum {total:g} over {n:g} examples"
    return ""


def at_most(counts: Statistics, most: float) -> Statistics:
    """The counts of a site as if it had `most` examples, where it has more: the same metrics, with less weight.

    Rows of an `_exact` count are thinned evenly instead.
    """
    capped: dict[str, NDArray[np.float64]] = {}
    for name, array in counts.items():
        n = examples(name, array)
        if not most < n < float("inf"):
            capped[name] = array
        elif name.endswith("_exact"):
            capped[name] = array[np.linspace(0, len(array) - 1, int(most)).astype(np.int64)]
        else:
            capped[name] = array * (most * (1 - 1e-12) / n)  # not above `most` by rounding
    return capped


def pool(tables: Sequence[Statistics]) -> dict[str, NDArray[np.float64]]:
    """Counts of several sites as if of one, in the order given.

    Raises:
        IntegrityError: two sites sent one name in different shapes.
    """
    pooled: dict[str, NDArray[np.float64]] = {}
    for table in tables:
        for name, counts in table.items():
            if name not in pooled:
                pooled[name] = np.array(counts, np.float64)
            elif name.endswith("_exact"):
                pooled[name] = np.concatenate([pooled[name], counts])
            elif pooled[name].shape != counts.shape:
                raise IntegrityError(f"metric '{name}': sites sent counts of different shapes")
            else:
                pooled[name] = pooled[name] + counts
    return pooled


def values(counts: Statistics) -> dict[str, float]:
    """Metrics of counts by name; what the counts do not decide (no example, one class) is NaN.

    `n` is how many examples stand behind them, where any count says so. An exact AUROC takes the name `auroc`.
    """
    result: dict[str, float] = {}
    for name, array in counts.items():
        if name == "auroc":
            result["auroc"] = auroc_of_histogram(array)
        elif name == "auroc_exact":
            result["auroc"] = auroc_exact(array[:, 0], array[:, 1] > 0.5)
        elif name == "persons":
            result["persons"] = float(array.sum())
        elif name == "confusion":
            continue
        elif array.shape == (2,):
            mean = float(array[0] / array[1]) if array[1] else float("nan")
            result[name] = float(np.sqrt(mean)) if name == "rmse" else mean
            result["n"] = float(array[1])
    return result
