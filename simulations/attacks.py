"""What an attacker makes of what leaves the sites: membership inference and gradient inversion, on the real updates.

Each site's answers are computed again, which a simulation can, and what they show is what is attacked: a site's update
as it leaves it or, where the noise is added at the server, the change of the model that all others see.

    membership  which rows were trained on? By the final model's loss on a row (Yeom et al., arXiv 1709.01604), and by
                how far each update points along the row's own gradient (Nasr et al., arXiv 1812.00910).
    inversion   which row was it? Of a round that is one step over one row, the worst for a site: in closed form where a
                dense layer with a bias comes first (Geiping et al., arXiv 2003.14053, proposition 3.1), and by making
                the gradient's cosine small, with total variation for images (the same, equation 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consortium.client.private_training import Private
from consortium.client.site import Rows, open_site, rows, start
from consortium.client.task import Source, Task, task_of
from consortium.client.trainer import Resident, TorchTrainer, seed_for
from consortium.privacy import mechanisms
from consortium.privacy.accounting import spent
from consortium.privacy.ledger import Question, charge_of, seen_by
from consortium.privacy.mechanisms import Mechanism, Vector, mechanism_of
from consortium.privacy.randomness import Stream
from consortium.protocol.layout import digest_of
from consortium.protocol.messages import Instruction, Payload, Statistics
from consortium.protocol.study import Study
from consortium.server.records import InMemory, RunState
from consortium.strategies.base import Local
from consortium.strategies.chosen import strategy_of

FPR = 0.01
"""The share of rows that were not trained on which an attacker may take for trained on."""
ROUNDS = 30
"""Of a run, the first that are attacked."""
VICTIMS = 6
"""Rows that are looked for."""
STEPS, RATE, SMOOTH = 300, 0.05, 1e-3
"""Of the search for a row: steps, learning rate, and how much an image's total variation counts."""
_PIECE = 256

Table = tuple[Tensor, Tensor]
"""Inputs and targets, a row each."""


@dataclass(frozen=True)
class Attacked:
    """What attacks came to.

    true_positives: by attack, the share of trained rows that it finds while it takes at most `FPR` of the others for
        such. bound: what the privacy promises of that, at most 1; None without privacy.
    trained, others: how many rows of each kind there were.
    errors: by attack, the median error of a row that was looked for, over that of guessing the mean row: 0 where it is
        found exactly, 1 where nothing is learnt.
    """

    true_positives: Mapping[str, float]
    bound: float | None
    trained: int
    others: int
    errors: Mapping[str, float]


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
    aligned = _alignment(study, task, local, net, sources, states, mechanism, tables)
    net.load(model, None)
    losses = {site: tuple(-_losses(task, net, *table) for table in both) for site, both in tables.items()}
    found = {"loss": _rate(losses.values()), "updates": _rate(aligned.values())}
    first = max(tables.values(), key=lambda both: len(both[0][0]))[0]
    return Attacked(
        found,
        _bound(study, mechanism),
        sum(len(inside[0]) for inside, _ in tables.values()),
        sum(len(outside[0]) for _, outside in tables.values()),
        _inversion(study, task, local, net, first, len(sources), mechanism),
    )


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
    parts = {name: part.reshape(-1) for name, part in _named(net, direction).items()}
    length = math.sqrt(sum(float((part.double() ** 2).sum()) for part in parts.values())) or 1.0
    of, found = _gradients(task, net), []
    for at in range(0, len(table[0]), _PIECE):
        gradients = of(table[0][at : at + _PIECE], table[1][at : at + _PIECE])
        flat = {name: one.reshape(len(one), -1) for name, one in gradients.items() if name in parts}
        dots = sum((one @ parts[name] for name, one in flat.items()), torch.zeros(()))
        norms = torch.sqrt(sum(((one**2).sum(1) for one in flat.values()), torch.zeros(())))
        found.append((dots / norms.clamp_min(1e-12) / length).double().numpy())
    return np.concatenate(found) if found else np.zeros(0)


def _named(net: Resident, vector: Vector) -> dict[str, Tensor]:
    """A vector of the shared segment as arrays by name."""
    found, place = {}, 0
    for array in net.layout["shared"].arrays:
        size = math.prod(array.shape)
        found[array.name] = torch.from_numpy(np.array(vector[place : place + size])).reshape(array.shape)
        place += size
    return found


def _gradients(task: Task, net: Resident) -> Any:
    """From inputs and targets to each row's gradients by parameter, of the model as it is now."""
    weights = {name: one.detach() for name, one in net.module.named_parameters() if one.requires_grad}
    buffers = dict(net.module.named_buffers())
    net.train(False)

    def loss(own: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        output = torch.func.functional_call(net.module, (own, buffers), (row.unsqueeze(0),))
        return task.loss(output, target.unsqueeze(0))

    return partial(
        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different"), weights
    )


def _losses(task: Task, net: Resident, inputs: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """By row, of the model as it is now."""
    net.train(False)
    with torch.no_grad():
        outputs = net.module(inputs)
        each = [float(task.loss(outputs[i : i + 1], targets[i : i + 1])) for i in range(len(inputs))]
    return np.array(each, np.float64)


# Inversion


def _inversion(
    study: Study,
    task: Task,
    local: Local,
    net: Resident,
    table: Table,
    sites: int,
    mechanism: Mechanism | None,
) -> dict[str, float]:
    chosen = torch.arange(0, len(table[0]), max(1, len(table[0]) // VICTIMS))[:VICTIMS]
    inputs, targets = table[0][chosen], table[1][chosen]
    initial = start(study, task, local).vector("shared")
    seen = [
        _one_step(study, task, net, initial, (inputs[i : i + 1], targets[i : i + 1]), sites, mechanism)
        for i in range(len(chosen))
    ]
    net.load(initial, None)
    middle = table[0].mean(0)
    guesses = {"cosine": _search(task, net, seen, targets, middle)}
    exact = [_closed_form(net, one, middle.shape) for one in seen]
    if all(one is not None for one in exact):
        guesses["closed form"] = torch.stack([one for one in exact if one is not None])
    worst = (inputs - middle).flatten(1).norm(dim=1).clamp_min(1e-12)
    return {
        name: median(((guess - inputs).flatten(1).norm(dim=1) / worst).tolist())
        for name, guess in sorted(guesses.items())
    }


def _one_step(
    study: Study,
    task: Task,
    net: Resident,
    model: Vector,
    table: Table,
    sites: int,
    mechanism: Mechanism | None,
) -> Vector:
    """What is seen of a site whose round is one step over one row. Noise at the server hides it among as many sites as
    there are, of which the attacker knows all others' updates."""
    inputs, targets = table
    trainer = TorchTrainer(task, net, Local(), inputs, targets, inputs[:0], targets[:0])
    draws = Stream.system()
    private = Private(mechanism, draws) if mechanism is not None and mechanism.name == "dp-sgd" else None
    seed = seed_for(study.seed, "attack", 0)
    update, _ = trainer.train({"shared": model}, {}, [np.array([0])], seed, private)
    shared = np.array(update.vectors["shared"])
    if mechanism is None or private is not None:
        return shared
    clipped, _ = mechanisms.clip(shared, mechanism.clip_norm)
    deviation = mechanism.local_deviation or mechanism.update_multiplier(sites) * mechanism.clip_norm
    return mechanisms.add_noise(clipped, deviation, draws)


def _closed_form(net: Resident, seen: Vector, shape: Sequence[int]) -> Tensor | None:
    """The row from the first dense layer with a bias: the ratio of its gradients, by least squares over its units."""
    arrays = _named(net, seen)
    for name, part in net.module.named_modules():
        prefix = f"{name}." if name else ""
        weight, bias = arrays.get(f"{prefix}weight"), arrays.get(f"{prefix}bias")
        if isinstance(part, nn.Linear) and weight is not None and bias is not None:
            if weight.shape[1] != math.prod(shape):
                return None  # something else comes first
            return (bias @ weight / (bias @ bias).clamp_min(1e-30)).reshape(tuple(shape))
    return None


def _search(task: Task, net: Resident, seen: Sequence[Vector], targets: Tensor, middle: Tensor) -> Tensor:
    """Rows, starting from the mean one, whose gradients point where the updates do; their targets are known."""
    each = [_named(net, -one) for one in seen]
    of = _gradients(task, net)

    def away(rows: Tensor) -> Tensor:
        made = of(rows, targets)
        pairs = [
            (one.flatten(1), torch.stack([other[name] for other in each]).flatten(1))
            for name, one in made.items()
            if name in each[0]
        ]
        dots = torch.stack([(one * other).sum(1) for one, other in pairs]).sum(0)
        lengths = [torch.stack([(pair[side] ** 2).sum(1) for pair in pairs]).sum(0) for side in (0, 1)]
        found = (1 - dots / (lengths[0] * lengths[1]).clamp_min(1e-24).sqrt()).sum()
        if rows.dim() == 4:
            found = found + SMOOTH * (rows.diff(dim=2).abs().mean() + rows.diff(dim=3).abs().mean())
        return found

    rows = middle.expand(len(seen), *middle.shape).clone()
    mover = torch.optim.Adam([rows], RATE)
    gradient = torch.func.grad(away)
    for _ in range(STEPS):
        rows.grad = gradient(rows)
        mover.step()
    return rows
