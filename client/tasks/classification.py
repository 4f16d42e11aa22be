"""What every classifier shares: outputs, loss, counts, and the probabilities that are served.

Two classes have one output, the logit of class 1, so that a linear model is logistic regression as textbooks have it;
their targets are (n, 1) numbers, 0 or 1, in the model's dtype. More classes have one output each; their targets are
(n,) int64 codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from consortium.protocol.errors import InputError
from consortium.protocol.messages import Statistics
from consortium.protocol.metrics import score_histogram

LARGEST_CONFUSION = 100
"""Classes; a study with more sends no confusion matrix, which would outgrow the model."""


def outputs_for(classes: int) -> int:
    """How many outputs a model of that many classes has: 1 for two classes."""
    return 1 if classes == 2 else classes


def targets_for(codes: NDArray[np.int64], classes: int, dtype: torch.dtype) -> Tensor:
    """Targets of class codes (n,), each 0 to classes - 1, in the form that `loss` takes."""
    tensor = torch.from_numpy(np.ascontiguousarray(codes, np.int64))
    return tensor.to(dtype).unsqueeze(1) if classes == 2 else tensor


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of a batch, from outputs (n, 1) or (n, classes); stable for logits of any size."""
    if outputs.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(outputs, targets)
    return F.cross_entropy(outputs, targets)


def counts(outputs: Tensor, targets: Tensor, exact: bool) -> Statistics:
    """The counts of `protocol.metrics` over held-out examples.

    accuracy, log_loss (nats) and brier are [sum, n]. Brier is (p - y)^2 of class 1 for two classes, and the sum of
    that over all classes for more. confusion is there up to 100 classes; for two classes also `auroc`, or with `exact`
    `auroc_exact`: logit and label of every example.

    Raises:
        InputError: an output is not finite, so that nothing can be counted.
    """
    if not bool(torch.isfinite(outputs).all()):
        raise InputError(
            "the received model's outputs are not finite: training has diverged; lower training.lr"
        )
    labels = targets.reshape(-1).long()
    log_p = _log_probabilities(outputs.double())
    n, classes = log_p.shape
    of_label = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    predicted = log_p.argmax(1)
    p = log_p.exp()
    squares = p.square().sum(1) - 2 * of_label.exp() + 1
    table = {
        "accuracy": np.array([float((predicted == labels).sum()), n]),
        "log_loss": np.array([-float(of_label.sum()), n]),
        "brier": np.array([max(float(squares.sum()), 0.0) / (2 if classes == 2 else 1), n]),
    }
    if classes <= LARGEST_CONFUSION:
        cells = torch.bincount(labels * classes + predicted, minlength=classes * classes)
        table["confusion"] = cells.reshape(classes, classes).double().numpy()
    if classes == 2:
        scores = outputs.double().reshape(-1).numpy()
        if exact:
            table["auroc_exact"] = np.stack([scores, labels.double().numpy()], axis=1)
        else:
            table["auroc"] = score_histogram(scores, labels.numpy() == 1)
    return table


def _log_probabilities(outputs: Tensor) -> Tensor:
    if outputs.shape[1] == 1:
        return torch.cat([F.logsigmoid(-outputs), F.logsigmoid(outputs)], dim=1)
    return F.log_softmax(outputs, dim=1)


class Probabilities(nn.Module):
    """From a model's outputs, (n, 1) or (n, classes), to probabilities (n, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.binary = classes == 2

    def forward(self, outputs: Tensor) -> Tensor:
        """(n, classes), each row summing to 1."""
        if self.binary:
            return torch.cat([torch.sigmoid(-outputs), torch.sigmoid(outputs)], dim=1)
        return torch.softmax(outputs, dim=1)


def scores(probabilities: Tensor) -> Tensor:
    """Outputs as `counts` takes them, (n, 1) or (n, classes), of which these probabilities (n, classes) are made."""
    logs = probabilities.double().clamp_min(torch.finfo(torch.float32).tiny).log()
    return logs[:, 1:] - logs[:, :1] if logs.shape[1] == 2 else logs


def served(classes: int) -> list[dict[str, object]]:
    """The outputs of a classifier's signature."""
    return [{"name": "probability", "classes": [str(code) for code in range(classes)]}]


def refuse_one_class(name: str, targets: Mapping[str, Tensor]) -> None:
    """Refuse training targets, by site, that are all of one class; `name` is what the class is called.

    One site alone may well have one class; a federation that has only one has nothing to learn.

    Raises:
        InputError: there are rows, and every one has the same class.
    """
    seen = {code for tensor in targets.values() for code in torch.unique(tensor.reshape(-1).long()).tolist()}
    if len(seen) == 1:
        raise InputError(
            f"{name}: every training row of every site ({len(targets)}) has the same class, so there is nothing to "
            "learn; check the column, and the codes in each site's mapping"
        )
