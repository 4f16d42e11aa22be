"""An exported model is judged on a site's held-out rows: the very bytes that would be served, by onnxruntime.

The graph takes raw columns, so the rows go in as a caller would send them. What leaves the site are counts, of all
held-out rows and of each group of the study's `evaluation.groups`; a cell of fewer than `FEWEST` persons does not, nor
one that could be told from what does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consortium.client.task import Task
from consortium.client.tracing import signature
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.messages import Instruction, Statistics
from consortium.protocol.metrics import FEWEST, at_most, cell_name, judged_by, values

BATCH = 1024


def check_graph(instruction: Instruction) -> None:
    """Raises IntegrityError where the file to judge is not the one that the instruction names."""
    if hashlib.sha256(instruction.payload.opaque).hexdigest() != instruction.model:
        raise IntegrityError("the model to judge is not the one that the instruction names")


def judged(
    task: Task,
    module: nn.Module,
    graph: bytes,
    inputs: Tensor,
    targets: Tensor,
    people: NDArray[np.int64] | None,
) -> Statistics:
    """Counts of the study's metric over held-out rows, by cell (`metrics.cell_name`).

    inputs, targets: (n, ...), the rows before preprocessing. people: (n,) whose each row is; None: each its own.

    Raises:
        InputError: there are too few rows, or the graph is not one of this study.
    """
    study = task.study
    metric = judged_by(study.metric)
    persons = _persons(people, np.ones(len(inputs), np.bool_))
    if persons < FEWEST:
        raise InputError(f"fewer than {FEWEST} persons are held out at this site, so no model is judged here")
    answers = _answers(task, module, graph, inputs)
    found: dict[str, NDArray[np.float64]] = {}
    for cell, rows in [("", np.ones(len(inputs), np.bool_)), *_groups(task, inputs, people)]:
        place = torch.from_numpy(np.flatnonzero(rows))
        counts = task.served_metrics(tuple(one[place] for one in answers), targets[place])
        kept = {name: array for name, array in counts.items() if metric in values({name: array})}
        if not kept:
            raise InputError(f"the task counts nothing of which '{metric}' is made")
        capped = at_most(kept, study.cohort.max_weight)
        found |= {cell_name(name, cell): array for name, array in capped.items()}
    return found


def _answers(task: Task, module: nn.Module, graph: bytes, inputs: Tensor) -> tuple[Tensor, ...]:
    """What the graph answers, by output, (n, ...)."""
    import onnxruntime

    takes, _ = signature(task, module)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    with _running():
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    if [one.name for one in session.get_inputs()] != [str(one["name"]) for one in takes]:
        raise InputError("the model to judge does not take this study's inputs")
    pieces = []
    for piece in inputs.split(BATCH):
        fed = dict(_fed(takes, piece))
        with _running():
            answers = [np.asarray(one) for one in session.run(None, fed)]
        if any(one.shape[:1] != (len(piece),) or one.dtype.kind not in "fiub" for one in answers):
            raise InputError("the model to judge does not answer each row by a number")
        pieces.append(answers)
    return tuple(torch.from_numpy(np.concatenate(one)) for one in zip(*pieces, strict=True))


@contextmanager
def _running() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's errors share no class
        raise InputError(f"the model to judge cannot be run ({type(error).__name__})") from error


def _fed(takes: Sequence[Mapping[str, Any]], rows: Tensor) -> Iterator[tuple[str, NDArray[Any]]]:
    """The graph's inputs for rows as the task sees them: columns (n, 1), or one tensor."""
    raw = rows.numpy()
    for place, one in enumerate(takes):
        name = str(one["name"])
        if one["kind"] == "tensor":
            yield name, raw.astype(one["dtype"])
        elif one["kind"] == "numeric":
            yield name, raw[:, place : place + 1].astype(one["dtype"])
        else:
            listed = [*map(str, one["values"]), ""]
            codes = np.where(raw[:, place] >= 0, raw[:, place], len(listed) - 1).astype(np.int64)
            yield name, np.array(listed, object)[codes][:, None]


def _groups(
    task: Task, inputs: Tensor, people: NDArray[np.int64] | None
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """By group that may be shown its cell and its rows, (n,) True for those in it."""
    names = task.study.evaluation.groups
    features: Mapping[str, Any] = getattr(task.study.data, "features", {})
    columns = list(features)
    for number, name in enumerate(names):
        codes = inputs[:, columns.index(name)].numpy()
        cells = {place: codes == place for place in range(len(features[name].values))}
        rest = ~np.logical_or.reduce(list(cells.values()))
        persons = {place: _persons(people, rows) for place, rows in cells.items()}
        for place in shown(persons, _persons(people, rest)):
            yield f"{number}.{place}", cells[place]


def shown(persons: Mapping[int, int], rest: int) -> list[int]:
    """Which cells may be shown, of their numbers of persons. rest: persons in none of them.

    Cells of fewer than `FEWEST` are not; nor the smallest of the others as long as all that is hidden together, which
    the difference to the whole tells, is that small.
    """
    kept = [place for place, count in persons.items() if count >= FEWEST]
    hidden = rest + sum(count for place, count in persons.items() if place not in kept)
    while kept and 0 < hidden < FEWEST:
        least = min(kept, key=lambda place: (persons[place], place))
        kept.remove(least)
        hidden += persons[least]
    return kept


def _persons(people: NDArray[np.int64] | None, rows: NDArray[np.bool_]) -> int:
    return int(rows.sum()) if people is None else len(np.unique(people[rows]))
