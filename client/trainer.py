"""Training one model on one site's data.

`Trainer` is the protocol that everything else speaks; `TorchTrainer` is it for any `Task`. A `Resident` is one model
of a process: its parameters, gradients and float buffers are views into flat tensors, so that loading a global model
is one copy and a step of SGD is one addition. Trainers of many sites share it and overwrite it in turn.

Equal in every world: one torch thread, the batch schedule and the seed as arguments, nothing read from a clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consortium.client.private_training import Private, descend
from consortium.client.task import Task
from consortium.protocol.errors import InputError
from consortium.protocol.layout import Array, Kind, Layout, Segment, Vector
from consortium.protocol.messages import Statistics
from consortium.protocol.metrics import pool
from consortium.protocol.sections import Training
from consortium.strategies.base import Local

Batches = Sequence[NDArray[np.int64]]
"""Row numbers of each step's batch, in order."""

Schedule = Callable[[Training, int, int, str, int], Batches]
"""(training, rows, the study's seed, site, round) -> that round's batches, as `schedule` below."""

SiteState = Mapping[str, Vector]
"""What a site keeps between rounds: vectors by segment kind, `control` (SCAFFOLD's c_i) and `local`."""

EVALUATION_BATCH = 1024
_GATHER = 4096


@dataclass(frozen=True)
class Update:
    """What training changed: local minus global vectors by segment kind, and how much it counts."""

    vectors: Mapping[str, Vector]
    weight: float


class Trainer(Protocol):
    """One model on one site's data."""

    layout: Layout

    def train(
        self,
        model: Mapping[str, Vector],
        state: SiteState,
        batches: Batches,
        seed: int,
        private: Private | None = None,
    ) -> tuple[Update, SiteState]:
        """Train from the global `model` (vectors by segment kind) over these very batches, by dp-sgd if `private`."""

    def evaluate(self, model: Mapping[str, Vector], state: SiteState) -> Statistics:
        """Counts over the held-out rows; empty where there are none."""

    def query(self) -> Statistics:
        """Sums over the training rows for the federation's preprocessing."""


def seed_for(study_seed: int, site: str, number: int) -> int:
    """The seed of one site's round: the first 8 bytes of SHA-256(study seed, site, round), as an integer."""
    digest = hashlib.sha256(f"{study_seed}|{site}|{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch and numpy both take 63 bits


def schedule(
    training: Training, rows: int, study_seed: int, site: str, round: int
) -> list[NDArray[np.int64]]:
    """The batches of one round.

    With `local_epochs` (1 where the study says nothing): that many passes, each over all rows in a fresh order, the
    last batch of a pass perhaps smaller. With `local_steps`: that many batches of one endless stream of passes, which
    goes on where the round before stopped, as a data loader does that is kept over rounds.
    """
    if not rows:
        return []
    size = training.batch_size
    per_pass = -(-rows // size)
    if training.local_steps is None:
        rng = np.random.Generator(np.random.PCG64(seed_for(study_seed, site, round)))
        orders = [rng.permutation(rows) for _ in range(training.local_epochs or 1)]
        return [order[i : i + size] for order in orders for i in range(0, rows, size)]
    first = (round - 1) * training.local_steps
    batches: list[NDArray[np.int64]] = []
    for number in range(first // per_pass, (first + training.local_steps - 1) // per_pass + 1):
        rng = np.random.Generator(np.random.PCG64(seed_for(study_seed, site, -1 - number)))
        order = rng.permutation(rows)
        batches += [order[i : i + size] for i in range(0, rows, size)]
    start = first % per_pass
    return batches[start : start + training.local_steps]


@dataclass
class Resident:
    """One model of this process, flat.

    flat: [shared buffers | shared parameters | local parameters | local buffers], so that shared and local segments
    and the trainable part are each one contiguous run; arrays are views of it by segment kind.
    parameters: the trainable ones, in the order of `flat`; weights are the same without autograd.
    first: the local segment's start, for a site that has none yet.
    counters: integer buffers. still: modules of frozen parts alone, which never see training mode.
    lends: whether an update lies in the model's own memory, until the model is used again: for whoever stores each
        update before anything else is done.
    """

    module: nn.Module
    layout: Layout
    flat: Tensor
    arrays: Mapping[str, Vector]
    trainable: slice
    parameters: Sequence[nn.Parameter]
    weights: Sequence[Tensor]
    first: Vector
    counters: Sequence[Tensor]
    still: Sequence[nn.Module]
    lends: bool = False

    def load(self, shared: Vector, local: Vector | None) -> None:
        """Overwrite the model with these segments; integer buffers start from zero, as nothing of them travels."""
        self.arrays["shared"][...] = shared
        if self.first.size:
            self.arrays["local"][...] = self.first if local is None else local
        for counter in self.counters:
            counter.zero_()

    def train(self, mode: bool) -> None:
        """Training or evaluation mode, for all that is not frozen."""
        if self.module.training != mode:
            self.module.train(mode)
            for module in self.still:
                module.eval()

    def vector(self, kind: Kind) -> Vector:
        """A copy of a segment as it is now."""
        return self.arrays[kind].copy()


_TORCH = {"float32": torch.float32, "float64": torch.float64}
_ONE = {dtype: torch.ones((), dtype=dtype) for dtype in _TORCH.values()}
"""d loss / d loss, made once."""


def resident(task: Task, local: Local, seed: int) -> Resident:
    """The task's model, laid out flat, at the start that `seed` gives.

    Raises:
        InputError: the model has nothing to train, or float parameters of other types than the study's dtype.
    """
    torch.default_generator.manual_seed(seed)
    dtype = task.study.model.dtype
    module = task.model().to(_TORCH[dtype])
    kinds: dict[str, list[tuple[str, Tensor]]] = {
        k: [] for k in ("buffers", "shared", "local", "local buffers")
    }
    counters = []
    for name, parameter in module.named_parameters():
        if _matches(name, task.frozen) or not parameter.requires_grad:
            parameter.requires_grad_(False)
        else:
            kinds["local" if _matches(name, task.local) else "shared"].append((name, parameter))
    for name, buffer in module.named_buffers():
        if not buffer.is_floating_point():
            counters.append(buffer)
        elif not _matches(name, task.frozen):
            kinds["local buffers" if _matches(name, task.local) else "buffers"].append((name, buffer))
    if not kinds["shared"]:
        raise InputError(f"{task.study.task}: the model has no parameter to train together")
    ordered = [item for group in kinds.values() for item in group]
    sizes = {group: sum(t.numel() for _, t in items) for group, items in kinds.items()}
    flat = torch.empty(sum(sizes.values()), dtype=_TORCH[dtype])
    _move(module, ordered, flat)
    shared_end = sizes["buffers"] + sizes["shared"]
    numbers: Vector = flat.numpy()
    parameters = [t for group in ("shared", "local") for _, t in kinds[group] if isinstance(t, nn.Parameter)]
    module.eval()  # so that the first call of `Resident.train` sets every module's mode
    return Resident(
        module=module,
        layout=_layout(kinds, dtype, local.control_variates),
        flat=flat,
        arrays={"shared": numbers[:shared_end], "local": numbers[shared_end:]},
        trainable=slice(sizes["buffers"], shared_end + sizes["local"]),
        parameters=parameters,
        weights=[parameter.detach() for parameter in parameters],
        first=numbers[shared_end:].copy(),
        counters=counters,
        still=_still(module, task.frozen),
    )


def _still(module: nn.Module, frozen: Sequence[str]) -> list[nn.Module]:
    """Modules that hold parameters or buffers, all of them frozen: a norm's statistics must not move either."""
    found = []
    for prefix, part in module.named_modules():
        own = [*part.named_parameters(prefix), *part.named_buffers(prefix)]
        if own and all(_matches(name, frozen) for name, _ in own):
            found.append(part)
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _move(module: nn.Module, ordered: Sequence[tuple[str, Tensor]], flat: Tensor) -> None:
    """Make every parameter and float buffer a view into `flat`, values kept."""
    start = 0
    for name, tensor in ordered:
        view = flat[start : start + tensor.numel()].view(tensor.shape)
        view.copy_(tensor.detach())
        start += tensor.numel()
        owner = module.get_submodule(name.rpartition(".")[0])
        if isinstance(tensor, nn.Parameter):
            tensor.data = view
        else:
            owner._buffers[name.rpartition(".")[2]] = view


def _layout(kinds: Mapping[str, Sequence[tuple[str, Tensor]]], dtype: Any, control: bool) -> Layout:
    def arrays(*groups: str) -> tuple[Array, ...]:
        return tuple(Array(name, tuple(t.shape)) for group in groups for name, t in kinds[group])

    segments = [Segment("shared", dtype, arrays("buffers", "shared"))]
    if control:
        segments.append(Segment("control", dtype, arrays("shared")))
    if kinds["local"] or kinds["local buffers"]:
        segments.append(Segment("local", dtype, arrays("local", "local buffers")))
    return Layout(tuple(segments))


@dataclass
class TorchTrainer:
    """A task's model on one site's data. `inputs` and `targets` are preprocessed tensors, (n, ...)."""

    task: Task
    resident: Resident
    local: Local
    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    sums: Statistics = field(default_factory=dict)
    preprocessed: bool = False

    @property
    def layout(self) -> Layout:
        return self.resident.layout

    def train(
        self,
        model: Mapping[str, Vector],
        state: SiteState,
        batches: Batches,
        seed: int,
        private: Private | None = None,
    ) -> tuple[Update, SiteState]:
        """See `Trainer`. The update's weight is the number of training rows, at most the study's cap; 1 in any study
        that asks for differential privacy, as the number would tell of every row.

        Raises:
            InputError: there is no row to train on.
        """
        if private is None and (not len(self.inputs) or not len(batches)):
            raise InputError("this site has no training rows")
        net = self.resident
        net.load(model["shared"], state.get("local"))
        torch.default_generator.manual_seed(seed)
        net.train(True)
        rule = _rule(self.task.study.training, net, self.local.proximal, self._correction(model, state))
        if private is None:
            _descend(self.task, net, rule, self._batches(batches))
        else:
            descend(self.task, net, rule, self.inputs, self.targets, batches, private)
        trained = net.arrays["shared"]
        vectors: dict[str, Vector] = {
            "shared": np.subtract(trained, model["shared"], trained if net.lends else None)
        }
        after: dict[str, Vector] = {}
        if net.first.size:
            after["local"] = net.vector("local")
        if self.local.control_variates:
            change = self._variate_change(model, vectors["shared"], len(batches))
            vectors["control"] = change
            after["control"] = self._variate(state) + change
        counted = len(self.inputs) if self.task.study.privacy.mechanism == "none" else 1
        weight = min(float(counted), self.task.study.cohort.max_weight)
        return Update(vectors, weight), after

    def evaluate(self, model: Mapping[str, Vector], state: SiteState) -> Statistics:
        if not len(self.test_inputs):
            return {}
        net = self.resident
        net.load(model["shared"], state.get("local"))
        net.train(False)
        tables = []
        with torch.inference_mode():
            for i in range(0, len(self.test_inputs), EVALUATION_BATCH):
                piece = slice(i, i + EVALUATION_BATCH)
                tables.append(
                    self.task.metrics(net.module(self.test_inputs[piece]), self.test_targets[piece])
                )
        return pool(tables)

    def query(self) -> Statistics:
        return self.sums

    def _batches(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of each batch; many batches are gathered at once, as one gather costs much less than many."""
        at_once = max(1, _GATHER // max(map(len, batches)))
        for first in range(0, len(batches), at_once):
            pending = batches[first : first + at_once]
            order = torch.from_numpy(np.concatenate(pending))
            lengths = [batch.size for batch in pending]
            inputs, targets = self.inputs.index_select(0, order), self.targets.index_select(0, order)
            # not `split`, whose checks in Python cost as much again
            yield from zip(inputs.split_with_sizes(lengths), targets.split_with_sizes(lengths), strict=True)

    def _variate(self, state: SiteState) -> Vector:
        segment = self.resident.layout["control"]
        return state["control"] if "control" in state else np.zeros(segment.size, segment.numpy_dtype)

    def _correction(self, model: Mapping[str, Vector], state: SiteState) -> Tensor | None:
        """SCAFFOLD's c - c_i, added to every gradient (arXiv 1910.06378, alg. 1 line 10); None without it."""
        if not self.local.control_variates:
            return None
        return torch.from_numpy(np.subtract(model["control"], self._variate(state)))

    def _variate_change(self, model: Mapping[str, Vector], update: Vector, steps: int) -> Vector:
        """c_i+ - c_i = -c + (x - y_i) / (K * lr), option II of alg. 1 line 12."""
        moved = -update[self.resident.trainable.start :]
        change: Vector = moved / moved.dtype.type(steps * self.task.study.training.lr) - model["control"]
        return change


Rule = Callable[[Sequence[Tensor | None]], object]
"""Moves the model's weights, given the gradient of each trainable parameter (None where the loss has none)."""


def _descend(task: Task, net: Resident, rule: Rule, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """One local step a batch."""
    module, loss, parameters = net.module, task.loss, tuple(net.parameters)
    for inputs, targets in batches:
        rule(gradients(loss(module(inputs), targets), parameters))


def gradients(loss: Tensor, parameters: tuple[nn.Parameter, ...]) -> Sequence[Tensor | None]:
    """d loss / d parameters; None where the loss does not depend on one.

    What torch.autograd.grad(loss, parameters, allow_unused=True) gives, by the call of torch's engine that it ends in:
    for a small model its checks, the same at every step, cost as much as the backward pass.

    Raises:
        RuntimeError: the loss is not one number, or does not depend on any parameter.
    """
    if loss.numel() != 1:
        raise RuntimeError(f"the loss has shape {tuple(loss.shape)}; one number would be right")
    one = _ONE.get(loss.dtype) if loss.dim() == 0 else None
    found: Sequence[Tensor | None] = torch.autograd.Variable._execution_engine.run_backward(
        (loss,),
        (torch.ones_like(loss) if one is None else one,),
        False,  # the graph is not kept,
        False,  # nor is one made of the gradients
        parameters,
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


def _rule(training: Training, net: Resident, proximal: float, shift: Tensor | None) -> Rule:
    """How a gradient moves the weights: plain SGD array by array, by hand; all else flat, by torch.optim.

    Both are elementwise, so flat and array by array give the same numbers. The weights are now the global ones.
    """
    by_hand = training.optimizer == "sgd" and not training.momentum and not training.weight_decay
    if by_hand and not proximal and shift is None:
        return lambda gradients: _plain_step(net.weights, gradients, training.lr)
    weights = net.flat[net.trainable]
    gradient = torch.empty_like(weights)
    pieces = gradient.split([weight.numel() for weight in net.weights])
    shared = net.arrays["shared"].size - net.trainable.start
    start = weights[:shared].clone() if proximal else None
    step = _plain_flat(weights, gradient, training.lr) if by_hand else _stepper(training, weights, gradient)

    def rule(gradients: Sequence[Tensor | None]) -> None:
        for piece, one in zip(pieces, gradients, strict=True):
            piece.zero_() if one is None else piece.copy_(one.reshape(-1))
        if start is not None:
            gradient[:shared].add_(weights[:shared] - start, alpha=proximal)
        if shift is not None:
            gradient[:shared].add_(shift)
        step()

    return rule


def _plain_step(weights: Sequence[Tensor], gradients: Sequence[Tensor | None], lr: float) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            weight.add_(gradient, alpha=-lr)


def _plain_flat(weights: Tensor, gradient: Tensor, lr: float) -> Callable[[], object]:
    return lambda: weights.add_(gradient, alpha=-lr)


def _stepper(training: Training, weights: Tensor, gradient: Tensor) -> Callable[[], object]:
    """One step of the study's optimizer on the flat weights."""
    flat = nn.Parameter(weights)
    flat.grad = gradient
    lr, decay = training.lr, training.weight_decay
    if training.optimizer == "sgd":
        return torch.optim.SGD([flat], lr, training.momentum, weight_decay=decay).step
    of = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    return of([flat], lr, weight_decay=decay).step
