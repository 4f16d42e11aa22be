"""What a torch user writes: a `Task`.

A task says what the model is, what the loss is, where the data come from and how a model is judged. The study gives
the rest: optimizer, steps or epochs, batches, proximal term, control variates. Only `model` and `loss` and `data`
have no default.

    class Digits(Task):
        def model(self):
            return nn.Linear(64, 10)

        def loss(self, outputs, targets):
            return F.cross_entropy(outputs, targets)

        def data(self, source):
            table = np.load(source.path)
            return Examples(torch.from_numpy(table["x"]), torch.from_numpy(table["y"]))
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from consortium.client.skipping import Skipped
from consortium.protocol.code import load
from consortium.protocol.errors import InputError
from consortium.protocol.messages import Statistics
from consortium.protocol.study import Study


@dataclass(frozen=True)
class Source:
    """Where a site's data lie.

    site: the site's name.
    path: a file or folder; a table's file for the tabular task. None where `table` is given.
    mapping: how the site's columns, codes and units become the study's (`client/mapping.py`); empty for none.
    key: the site's secret for splitting rows into training and holdout; the same key gives the same split.
    gaps: numbers, from 0, of the rows of the site's table that are not in the file, as the site excludes them. The
        others keep their numbers, by which they are held out or not.
    table: data already in memory: a DataFrame, for images a dict of arrays x and y, for another task what its
        `data` takes; or `Examples`, which no task needs to read.
    """

    site: str
    path: Path | None = None
    mapping: Mapping[str, Any] = field(default_factory=dict)
    key: bytes = b"consortium holdout"
    table: Any = None
    gaps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Examples:
    """A site's data, as the task sees them, before preprocessing.

    inputs: (n, ...), a float tensor. targets: (n, ...).
    ids: one per row, the person's or row's identity, by which rows are held out together; None: the row's number.
    test: (n,) True for held-out rows; None: the study's holdout decides by keyed id.
    skipped: records that could not be read, where the study tolerates some.
    """

    inputs: Tensor
    targets: Tensor
    ids: NDArray[Any] | None = None
    test: NDArray[np.bool_] | None = None
    skipped: Skipped = field(default_factory=Skipped)


class Task(ABC):
    """One learning problem. It holds the study and nothing else: no data, no model."""

    prepares = False
    """Whether `statistics` of all sites are summed before round 1 and handed to `preprocessing`."""

    local: tuple[str, ...] = ()
    """Patterns (as in fnmatch) of parameter and buffer names that stay at the site: a personal head, "*.norm*"."""

    frozen: tuple[str, ...] = ()
    """Patterns of names that are part of the study and are not trained: a pre-trained base."""

    def __init__(self, study: Study) -> None:
        self.study = study

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh model; its random start comes from torch's generator, which is seeded by the study."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over a batch: a 0-d tensor."""

    @abstractmethod
    def data(self, source: Source) -> Examples:
        """The data of one site.

        Raises:
            InputError: naming the file, column or row that is wrong.
        """

    def metrics(self, outputs: Tensor, targets: Tensor) -> Statistics:
        """Counts over a batch of held-out examples (see `protocol.metrics`); batches are added up."""
        return {"loss": np.array([float(self.loss(outputs, targets)) * len(targets), len(targets)])}

    def served_metrics(self, served: tuple[Tensor, ...], targets: Tensor) -> Statistics:
        """As `metrics`, from what the exported model answers: (n, ...) by output, after `output`.

        Raises:
            InputError: the task has an output step, and does not say here how its answers are judged.
        """
        if self.output() is not None or len(served) != 1:
            raise InputError(
                f"{self.study.task}: its exported model cannot be judged; define `served_metrics` in the task"
            )
        return self.metrics(served[0], targets)

    def statistics(self, examples: Examples) -> Statistics:
        """Sums over the training rows that `preprocessing` needs from all sites.

        Each is a sum of numbers between -1 and 1, at most one a row, so that no site can count for more than the
        study's cohort.max_weight: scale by the declared ranges first.
        """
        return {}

    def preprocessing(self, sums: Statistics) -> nn.Module | None:
        """The step from raw inputs to the model's inputs, given the sums of all sites; None for no step.

        It is applied once to a site's data, and becomes a part of the exported graph.
        """
        return None

    def output(self) -> nn.Module | None:
        """The step from the model's outputs to what is served, such as probabilities; None to serve the outputs."""
        return None

    def signature(self) -> dict[str, Any]:
        """What the exported model takes and gives, for its contract.

        inputs: raw inputs in order, before `preprocessing`; each is
            {"name", "kind": "numeric", "min", "max"}, a column (n, 1) in that range,
            {"name", "kind": "categorical", "values"}, a column (n, 1) of indices into the values, or
            {"name", "kind": "tensor", "shape"}, (n, *shape).
            None at all stands for one tensor, of the study's `data.shape` or of what the first layer takes.
        outputs: {"name"} and for probabilities {"classes"}, after `output`.
        """
        return {"inputs": [], "outputs": []}

    def check(self, targets: Mapping[str, Tensor]) -> None:
        """Refuse a federation whose training targets, by site, leave nothing to learn; a simulation asks this.

        Raises:
            InputError: for a classifier, every row of every site has one class.
        """
        return


def task_of(study: Study) -> Task:
    """The study's task.

    Raises:
        InputError: the study's code has no such class, it is not a `Task`, leaves something out that a task needs, or
            uses a name of `Task` for something else.
    """
    if study.app is not None:
        raise InputError(
            f"study '{study.name}': is a Flower app, which has no task of ours; it runs in a federation "
            "(consortium study submit), or in Flower's own simulation (flwr run)"
        )
    made = load(study.task, study.folder)
    if not (isinstance(made, type) and issubclass(made, Task)):
        raise InputError(
            f"{study.task}: is not a task; write a class that derives from consortium.client.Task"
        )
    missing = sorted(made.__abstractmethods__)
    if missing:
        raise InputError(
            f"{study.task}: defines no {', '.join(missing)}; consortium.client.Task says what each gives"
        )
    try:
        inspect.signature(made).bind(study)
    except TypeError as error:
        raise InputError(
            f"{study.task}: its __init__ cannot be called with the study alone ({error}); take `study`, give what "
            "else it takes a default, and what is to differ between studies a value in the study file"
        ) from error
    task = made(study)
    for name in ("local", "frozen"):
        _check_patterns(study.task, name, getattr(task, name))
    if type(task.prepares) is not bool:
        raise InputError(f"{study.task}: `prepares` is {_said(task.prepares)}; True or False would be right")
    return task


def _check_patterns(task: str, name: str, found: object) -> None:
    """Raises InputError where the task uses for something else what names its parameters: a method, one pattern alone
    (of which every letter would be taken for one)."""
    if not isinstance(found, tuple | list) or not all(isinstance(one, str) for one in found):
        raise InputError(
            f"{task}: `{name}` is {_said(found)}; it stands for patterns of parameter names, such as "
            f'{name} = ("head.*",); name what you mean otherwise'
        )


def _said(value: object) -> str:
    return "a method" if callable(value) else f"a {type(value).__name__}"
