"""What a federation is compared with: each site alone, and all rows in one place.

Only a simulation can make this comparison, as it needs every site's rows and scores in one machine. It is fair in
that all models start from the same weights, see the same preprocessing (by the sums of all sites), take the same
optimizer and batch size, make as many passes or steps as the whole federated run asks of a site, and are judged by
the same rows: the union of the sites' holdouts. AUROC is exact here, as scores may be pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consortium.client.site import Rows, rows, start
from consortium.client.task import Source, Task, task_of
from consortium.client.trainer import Batches, SiteState, TorchTrainer, schedule, seed_for
from consortium.protocol.errors import InputError
from consortium.protocol.layout import Vector
from consortium.protocol.messages import sum_statistics
from consortium.protocol.metrics import values
from consortium.protocol.study import Study
from consortium.strategies.base import Local

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class OneRoom:
    """All sites' rows on one machine.

    rows: by site in name order, inputs preprocessed. test_inputs, test_targets: the union of the holdouts.
    """

    study: Study
    task: Task
    rows: Mapping[str, Rows]
    test_inputs: Tensor
    test_targets: Tensor


@dataclass(frozen=True)
class Baselines:
    """One seed's baselines, each judged on the union of the holdouts.

    local: metrics by site of the model that it trained alone. pooled: of one model on all training rows.
    left_out: reasons by site (or "pooled") of what could not be trained or judged.
    """

    seed: int
    local: Mapping[str, Metrics]
    pooled: Metrics
    left_out: Mapping[str, str]


def one_room(study: Study, sources: Sequence[Source]) -> OneRoom:
    """The sites' rows in one room, AUROC exact.

    Raises:
        InputError: naming the file, column or row that is wrong.
    """
    # Not by `with_`: a private study may not send exact scores, but nothing is sent here.
    exact = study.evaluation.model_copy(update={"auroc": "exact"})
    task = task_of(study.model_copy(update={"evaluation": exact}))
    found = {source.site: rows(task, source) for source in sorted(sources, key=lambda source: source.site)}
    step = task.preprocessing(sum_statistics([one.sums for one in found.values()]) if task.prepares else {})
    if step is not None:
        with torch.no_grad():
            found = {
                site: replace(one, inputs=step(one.inputs), test_inputs=step(one.test_inputs))
                for site, one in found.items()
            }
    tests = torch.cat([one.test_inputs for one in found.values()])
    return OneRoom(study, task, found, tests, torch.cat([one.test_targets for one in found.values()]))


def judge(room: OneRoom, model: Vector, state: SiteState | None = None) -> dict[str, float]:
    """Metrics of a model on the union of the holdouts; empty where nothing is held out.

    model: the `shared` vector. state: the `local` one, where the layout has any.

    Raises:
        InputError: the model's outputs are not finite.
    """
    trainer = _trainer(room, room.study, room.test_inputs[:0], room.test_targets[:0])
    return values(trainer.evaluate({"shared": model}, state or {}))


def train(room: OneRoom, seed: int, *, report: Callable[[str], None] = lambda _: None) -> Baselines:
    """Both baselines from the initial model of `seed`.

    report: called with each site's name before it trains, then with "pooled".
    """
    study = room.study.with_(study={"seed": seed})
    local: dict[str, Metrics] = {}
    left_out: dict[str, str] = {}
    for site, own in room.rows.items():
        report(site)
        try:
            local[site] = _trained(room, study, site, own.inputs, own.targets)
        except InputError as error:
            left_out[site] = str(error)
    report("pooled")
    inputs = torch.cat([one.inputs for one in room.rows.values()])
    targets = torch.cat([one.targets for one in room.rows.values()])
    pooled: Metrics = {}
    try:
        pooled = _trained(room, study, "pooled", inputs, targets)
    except InputError as error:
        left_out["pooled"] = str(error)
    return Baselines(seed, local, pooled, left_out)


def _trained(room: OneRoom, study: Study, name: str, inputs: Tensor, targets: Tensor) -> Metrics:
    """Train once over the batches of all rounds in a row, then judge."""
    trainer = _trainer(room, study, inputs, targets)
    first = {"shared": trainer.resident.vector("shared")}
    state: SiteState = {}
    if trainer.layout["local"].size:
        state = {"local": trainer.resident.vector("local")}
    batches: Batches = (
        [
            batch
            for number in range(1, study.rounds + 1)
            for batch in schedule(study.training, len(inputs), study.seed, name, number)
        ]
        if len(inputs)
        else []
    )
    update, after = trainer.train(first, state, batches, seed_for(study.seed, name, 1))
    return values(trainer.evaluate({"shared": first["shared"] + update.vectors["shared"]}, after))


def _trainer(room: OneRoom, study: Study, inputs: Tensor, targets: Tensor) -> TorchTrainer:
    net = start(study, room.task, Local())
    return TorchTrainer(room.task, net, Local(), inputs, targets, room.test_inputs, room.test_targets)
