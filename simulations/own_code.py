"""A study's own code: what it raises, told from faults of ours and named by its line, and what its task gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from consortium.client.site import start
from consortium.protocol.code import PRIVATE
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.metrics import SIZES, values
from consortium.protocol.sections import TASKS
from consortium.simulations.baselines import OneRoom
from consortium.strategies.base import Local


@contextmanager
def named(where: str, kind: type[ConsortiumError]) -> Iterator[None]:
    """Turn what the study's own code raises inside into an error of `kind`; all else passes as it is.

    where: how the message begins, such as the site and its file.
    """
    try:
        yield
    except ConsortiumError:
        raise
    except (Exception, SystemExit) as error:
        line = _line(error)
        if line is None:
            raise
        what = f"{line}: {type(error).__name__}: {error}"
        raise kind(f"{where}the study's code failed: {what}; correct the code, then try again") from error


def _line(error: BaseException) -> str | None:
    """The innermost line of the study's own code ("task.py, line 13"); None where the error never passed it."""
    found, step = None, error.__traceback__
    while step is not None:
        if str(step.tb_frame.f_globals.get("__name__", "")).startswith(PRIVATE):
            found = f"{Path(step.tb_frame.f_code.co_filename).name}, line {step.tb_lineno}"
        step = step.tb_next
    return found


def check(room: OneRoom) -> None:
    """Refuse a task of the study's own whose model is none, or that does not count the metric that the study names:
    only running it shows this, and it should not show after hours.

    Raises:
        InputError: what the task's `model` or `metrics` gave instead.
    """
    study, task = room.study, room.task
    if study.task in TASKS:
        return
    if not isinstance(model := task.model(), nn.Module):
        raise InputError(f"{study.task}: 'model' gave {type(model).__name__}; return a torch.nn.Module")
    if not len(room.test_inputs):
        return
    net = start(study, task, Local())
    net.train(False)
    with torch.no_grad():
        counts: object = task.metrics(net.module(room.test_inputs[:64]), room.test_targets[:64])
    if not isinstance(counts, Mapping) or not all(isinstance(one, np.ndarray) for one in counts.values()):
        right = 'a dict of numpy arrays would be right: {"accuracy": np.array([sum, n])}'
        raise InputError(f"{study.task}: 'metrics' gave something else than counts; {right}")
    found = values(counts)
    if study.metric and study.metric not in found:
        counted = ", ".join(name for name in found if name not in SIZES) or "nothing that gives one number"
        raise InputError(
            f"evaluation.metric: got '{study.metric}', but the metrics of {study.task} counts {counted}; name one of "
            "these under [evaluation], or correct the code"
        )
