"""Gradient inversion: which row was it? Of a round that is one step over one row, the worst for a site.

In closed form where a dense layer with a bias comes first (Geiping et al., arXiv 2003.14053, proposition 3.1), and by
making the gradient's cosine small, with total variation for images (the same, equation 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from consortium.client.private_training import Private
from consortium.client.site import start
from consortium.client.task import Task
from consortium.client.trainer import Resident, TorchTrainer, seed_for
from consortium.privacy import mechanisms
from consortium.privacy.mechanisms import Mechanism, Vector
from consortium.privacy.randomness import Stream
from consortium.protocol.study import Study
from consortium.strategies.base import Local

VICTIMS = 6
"""Rows that are looked for."""
STEPS, RATE, SMOOTH = 300, 0.05, 1e-3
"""Of the search for a row: steps, learning rate, and how much an image's total variation counts."""

Table = tuple[Tensor, Tensor]
"""Inputs and targets, a row each."""


def invert(
    study: Study,
    task: Task,
    local: Local,
    net: Resident,
    table: Table,
    sites: int,
    mechanism: Mechanism | None,
) -> dict[str, float]:
    """By way, the median error of some rows of `table` that are looked for, over that of guessing the mean row.

    Empty for a model with BatchNorm, where a row has no gradient of its own, nor can be trained on by itself.
    """
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in net.module.modules()):
        return {}
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
    arrays = named(net, seen)
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
    each = [named(net, -one) for one in seen]
    of = row_gradients(task, net)

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


def named(net: Resident, vector: Vector) -> dict[str, Tensor]:
    """A vector of the shared segment as arrays by name."""
    found, place = {}, 0
    for array in net.layout["shared"].arrays:
        size = math.prod(array.shape)
        found[array.name] = torch.from_numpy(np.array(vector[place : place + size])).reshape(array.shape)
        place += size
    return found


def row_gradients(task: Task, net: Resident) -> Any:
    """From inputs and targets to each row's gradients by parameter, of the model as it is now."""
    weights = {name: one.detach() for name, one in net.module.named_parameters() if one.requires_grad}
    buffers = dict(net.module.named_buffers())
    net.train(False)

    def loss(own: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        output = torch.func.functional_call(net.module, (own, buffers), (row.unsqueeze(0),))
        return task.loss(output, target.unsqueeze(0))

    of_row = torch.func.grad(loss)
    together = torch.func.vmap(of_row, in_dims=(None, 0, 0), randomness="different")

    def gradients(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        try:
            return dict(together(weights, inputs, targets))
        except RuntimeError:  # a loss that looks at its numbers (`if`, `.item()`) goes row by row alone
            each = [of_row(weights, row, target) for row, target in zip(inputs, targets, strict=True)]
            return {name: torch.stack([one[name] for one in each]) for name in weights}

    return gradients
