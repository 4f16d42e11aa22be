"""What an attacker makes of what leaves the sites: membership inference and gradient inversion, on the real updates.

Each site's answers are computed again, which a simulation can, and what they show is what is attacked: a site's update
as it leaves it or, where the noise is added at the server, the change of the model that all others see.

    membership  which rows were trained on? By the final model's loss on a row (Yeom et al., arXiv 1709.01604), and by
                how far each update points along the row's own gradient (Nasr et al., arXiv 1812.00910).
    inversion   which row was it? See `simulations/inversion.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consortium.client.site import Rows, open_site, rows, start
from consortium.client.task import Source, Task, task_of
from consortium.client.trainer import Resident
from consortium.privacy import mechanisms
from consortium.privacy.accounting import spent
from consortium.privacy.ledger import Question, charge_of, seen_by
from consortium.privacy.mechanisms import Mechanism, Vector, mechanism_of
from consortium.privacy.randomness import Stream
from consortium.protocol.layout import digest_of
from consortium.protocol.messages import Instruction, Payload, Statistics
from consortium.protocol.study import Study
from consortium.server.records import InMemory, RunState
from consortium.simulations.inversion import Table, invert, named, row_gradients
from consortium.strategies.base import Local
from consortium.strategies.chosen import strategy_of

FPR = 0.01
"""The share of rows that were not trained on which an attacker may take for trained on."""
ROUNDS = 30
"""Of a run, the first that are attacked."""
LONGEST = 300
"""Characters of the reason why an attack was left out."""
_PIECE = 256


@dataclass(frozen=True)
class Attacked:
    """What attacks came to.

    true_positives: by attack, the share of trained rows that it finds while it takes at most `FPR` of the others for
        such. bound: what the privacy promises of that, at most 1; None without privacy.
    trained, others: how many rows of each kind there were.
    errors: by attack, the median error of a row that was looked for, over that of guessing the mean row: 0 where it is
        found exactly, 1 where nothing is learnt.
    left_out: by attack, why it could not be made on this task.
    """

    true_positives: Mapping[str, float]
    bound: float | None
    trained: int
    others: int
    errors: Mapping[str, float]
    left_out: Mapping[str, str] = field(default_factory=dict)


class States(InMemory):
    """Commits that keep the state after each of the first `ROUNDS` rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.after: dict[int, RunState] = {}

    def commit(self, state: RunState) -> RunState:
        if state.round <= ROUNDS:
            self.after[state.round] = state
        return super().commit(state)


def attack(study: Study, sources: Sequence[Source], states: States, model: Vector) -> Attacked:
    """Attack a run of a study over these sites. states: as its commits kept them. model: the one that it selected."""
    task, local, mechanism = task_of(study), strategy_of(study).local, mechanism_of(study)
    net = start(study, task, local)
    data = {source.site: rows(task, source) for source in sources}
    sums = _sums(states.after[max(states.after)].statistics)
    tables = {site: _tables(task, one, sums) for site, one in data.items()}
    first = max(tables.values(), key=lambda both: len(both[0][0]))[0]
    left_out: dict[str, str] = {}

    def by_loss() -> float:
        net.load(model, None)
        return _rate([tuple(-_losses(task, net, *table) for table in both) for both in tables.values()])

    def by_updates() -> float:
        return _rate(_alignment(study, task, local, net, sources, states, mechanism, tables).values())

    found = {
        "loss": _tried("loss", by_loss, math.nan, left_out),
        "updates": _tried("updates", by_updates, math.nan, left_out),
    }
    nothing: Mapping[str, float] = {}
    errors = _tried(
        "inversion",
        lambda: invert(study, task, local, net, first, len(sources), mechanism),
        nothing,
        left_out,
    )
    return Attacked(
        found,
        _bound(study, mechanism),
        sum(len(inside[0]) for inside, _ in tables.values()),
        sum(len(outside[0]) for _, outside in tables.values()),
        errors,
        left_out,
    )


T = TypeVar("T")


def _tried(name: str, attempt: Callable[[], T], instead: T, left_out: dict[str, str]) -> T:
    """What an attack gives; `instead`, with the reason in `left_out`, where the task's own code is not made for it."""
    try:
        return attempt()
    except Exception as error:  # noqa: BLE001 - of the study's own code; the run and the other attacks stand
        left_out[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:LONGEST]
        return instead


def _sums(statistics: Statistics) -> Statistics:
    return {name: value for name, value in statistics.items() if name not in mechanisms.RESERVED}


def _tables(task: Task, data: Rows, sums: Statistics) -> tuple[Table, Table]:
    """The rows that were trained on, and the others, as the model takes them."""
    inputs, test = data.inputs, data.test_inputs
    step = task.preprocessing(sums) if sums or not task.prepares else None
    if step is not None:
        with torch.no_grad():
            inputs, test = step(inputs), step(test)
    return (inputs.clone(), data.targets), (test.clone(), data.test_targets)


def _bound(study: Study, mechanism: Mechanism | None) -> float | None:
    """TPR <= exp(epsilon) FPR + delta, epsilon being a row's (Kairouz et al., arXiv 1311.0776)."""
    if mechanism is None:
        return None
    whole = replace(
        charge_of("", Question("", 1, 0, ""), "", mechanism), release=mechanism.release(study.rounds)
    )
    epsilon = spent([seen_by("record", whole)], mechanism.delta, "record", "add or remove one").epsilon
    return min(1.0, math.exp(min(epsilon, 100.0)) * FPR + mechanism.delta)


def _rate(scores: Any) -> float:
    """The share of trained rows above the threshold that at most `FPR` of the others pass; scores: by site, of both."""
    pairs = list(scores)
    inside = np.concatenate([one for one, _ in pairs] or [np.zeros(0)])
    outside = np.sort(np.concatenate([other for _, other in pairs] or [np.zeros(0)]))
    if not inside.size or not outside.size:
        return math.nan
    threshold = outside[outside.size - 1 - int(FPR * outside.size)]
    return float((inside > threshold).mean())


# Membership


def _alignment(
    study: Study,
    task: Task,
    local: Local,
    net: Resident,
    sources: Sequence[Source],
    states: States,
    mechanism: Mechanism | None,
    tables: Mapping[str, tuple[Table, Table]],
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """By site, of the rows that were trained on and of the others: how far what left points along their gradients."""
    found = {site: (np.zeros(len(i[0])), np.zeros(len(o[0]))) for site, (i, o) in tables.items()}
    central = mechanism is not None and mechanism.name == "central-gaussian"
    initial = net.vector("shared")
    draws = partial(Stream.seeded, study.seed)
    sites = [
        replace(open_site(study, task, local, net, source, draws=draws), name=source.site)
        for source in sources
    ]
    for number in range(1, max(states.after) + 1):
        before = states.after.get(number - 1)
        model = initial if before is None else before.model
        if number not in states.after or (before is None and number > 1):
            continue
        for site in sites:
            if central:
                seen = states.after[number].model - model
            else:
                question = _question(study, net, number, model, before)
                answer = site.answer(question.to(site.name))
                if answer.status != "done":
                    continue
                seen = answer.payload.vectors["shared"]
            net.load(model, None)
            for score, table in zip(found[site.name], tables[site.name], strict=True):
                score += _along(task, net, table, -seen)
    return found


def _question(
    study: Study, net: Resident, number: int, model: Vector, before: RunState | None
) -> Instruction:
    vectors = {"shared": model}
    if net.layout["control"].size:
        control = None if before is None else before.control
        vectors["control"] = np.zeros(net.layout["control"].size, net.layout["control"].numpy_dtype)
        vectors["control"] = vectors["control"] if control is None else control
    return Instruction(
        "simulation", "run", number, 0, "train", study.digest, digest_of([model]), net.layout.digest, "", math.inf,
        Payload(vectors, {} if before is None else before.statistics),
        counted={} if before is None else before.counted,
    )  # fmt: skip


def _along(task: Task, net: Resident, table: Table, direction: Vector) -> NDArray[np.float64]:
    """By row: the cosine of its loss's gradient with `direction`, (shared,) as in the layout; 0 for no gradient."""
    parts = {name: part.reshape(-1) for name, part in named(net, direction).items()}
    length = math.sqrt(sum(float((part.double() ** 2).sum()) for part in parts.values())) or 1.0
    of, found = row_gradients(task, net), []
    for at in range(0, len(table[0]), _PIECE):
        gradients = of(table[0][at : at + _PIECE], table[1][at : at + _PIECE])
        flat = {name: one.reshape(len(one), -1) for name, one in gradients.items() if name in parts}
        dots = sum((one @ parts[name] for name, one in flat.items()), torch.zeros(()))
        norms = torch.sqrt(sum(((one**2).sum(1) for one in flat.values()), torch.zeros(())))
        found.append((dots / norms.clamp_min(1e-12) / length).double().numpy())
    return np.concatenate(found) if found else np.zeros(0)


def _losses(task: Task, net: Resident, inputs: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """By row, of the model as it is now."""
    net.train(False)
    with torch.no_grad():
        outputs = net.module(inputs)
        each = [float(task.loss(outputs[i : i + 1], targets[i : i + 1])) for i in range(len(inputs))]
    return np.array(each, np.float64)
