"""dp-sgd at a site: each unit's gradient clipped, each batch's sum noised (arXiv 1607.00133, algorithm 1).

Gradients of single rows come from Opacus's hooks. Everything that the guarantee rests on is ours: batches and noise
from `privacy.randomness`, rate and denominator from the study, never from how many rows there are. The loss is taken
row by row, so that no row enters another's gradient, whatever the task's loss divides by.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consortium.privacy.mechanisms import Mechanism, Vector, batches
from consortium.privacy.randomness import Stream
from consortium.protocol.errors import InputError

if TYPE_CHECKING:
    from consortium.client.task import Task
    from consortium.client.trainer import Resident

GRADIENT_BYTES = 1 << 27
"""Bytes of single rows' gradients that are held at a time."""
_COLUMNS = 2048
"""Numbers of each gradient that are looked at together."""
_SHORTER = 1 - 1e-4
"""Norms are summed in float32 over at most `_COLUMNS` numbers, which at worst makes them too short by a share of
`_COLUMNS` x 2^-25 = 6.1e-5, and clipped gradients are rounded; so these are made shorter by more than both can add."""


@dataclass(frozen=True)
class Private:
    """How one round is trained by dp-sgd.

    units: (rows,) which unit each training row belongs to, numbered from 0; None: each row is one.
    """

    mechanism: Mechanism
    draws: Stream
    units: NDArray[np.int64] | None = None

    def batches(self, rows: int) -> list[NDArray[np.int64]]:
        """This round's batches of row numbers: all rows of each unit that was drawn."""
        units = self.units
        if units is None:
            return batches(self.mechanism, rows, lambda chosen: chosen, self.draws)
        count = int(units.max(initial=-1)) + 1
        order = np.argsort(units, kind="stable")
        starts = np.searchsorted(units[order], np.arange(count + 1))

        def rows_of(chosen: NDArray[np.int64]) -> NDArray[np.int64]:
            parts = [order[starts[unit] : starts[unit + 1]] for unit in chosen]
            return np.concatenate(parts) if parts else np.empty(0, np.int64)

        return batches(self.mechanism, count, rows_of, self.draws)


def refuse_unfit(module: nn.Module, name: str) -> None:
    """Refuse a model in which a row's gradient is not its own, or whose buffers would leave the site without noise.

    Raises:
        InputError: naming the layers and what to put in their place.
    """
    bad = [
        f"{path or 'the model'} ({type(part).__name__})"
        for path, part in module.named_modules()
        if any(buffer.is_floating_point() for buffer in part.buffers(recurse=False))
    ]
    if bad:
        raise InputError(
            f"{name}: under differential privacy no layer may keep statistics of rows: {', '.join(bad)}. Put "
            "torch.nn.GroupNorm (or LayerNorm) in place of BatchNorm"
        )


def refuse_unclippable(module: nn.Module, name: str) -> None:
    """As `refuse_unfit`, for dp-sgd: every layer must give gradients row by row.

    Raises:
        InputError: naming the layers.
    """
    from opacus.validators import ModuleValidator

    module.train()  # else it only says that it is not in training mode
    errors = ModuleValidator.validate(module, strict=False)
    module.eval()
    if errors:
        raise InputError(
            f"{name}: dp-sgd cannot clip this model row by row: {'; '.join(str(error) for error in errors)}. "
            "GroupNorm in place of BatchNorm, opacus.layers' DPLSTM, DPGRU and DPMultiheadAttention in place of torch's"
        )


def descend(
    task: Task,
    net: Resident,
    rule: Callable[[Sequence[Tensor | None]], object],
    inputs: Tensor,
    targets: Tensor,
    batches: Sequence[NDArray[np.int64]],
    private: Private,
) -> None:
    """One local step a batch, an empty one too; `rule` moves the weights by the noised gradient."""
    from opacus.grad_sample import GradSampleHooks

    # Inputs have no gradients, and are to have none; torch warns of it at each step.
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    hooks = GradSampleHooks(net.module, loss_reduction="sum", strict=False)
    sizes = [parameter.numel() for parameter in net.parameters]
    try:
        for batch in batches:
            total = clipped_sum(task, net, inputs, targets, batch, private)
            private.draws.add_gaussian(total, private.mechanism.local_deviation)
            total /= private.mechanism.denominator
            flat = torch.from_numpy(total).to(net.flat.dtype)
            rule([part.view(p.shape) for part, p in zip(flat.split(sizes), net.parameters, strict=True)])
    finally:
        hooks.remove_hooks()
        for parameter in net.parameters:
            parameter.grad = None
            for name in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, name):
                    delattr(parameter, name)


def clipped_sum(
    task: Task, net: Resident, inputs: Tensor, targets: Tensor, batch: NDArray[np.int64], private: Private
) -> Vector:
    """The sum over the batch's units of their gradients, each clipped to the bound; (trainable,) float64.

    A unit's gradient is the mean over its rows. One that is not finite counts as zero: to refuse it would itself tell
    of one unit.
    """
    width = sum(parameter.numel() for parameter in net.parameters)
    total = np.zeros(width)
    most = max(1, GRADIENT_BYTES // (8 * width))
    for rows, places, count in _groups(batch, private.units, most):
        parts: list[Tensor] = []
        for start in range(0, len(rows), most):
            piece = torch.from_numpy(rows[start : start + most])
            found = _row_gradients(task, net, inputs[piece], targets[piece])
            if private.units is not None:
                where = torch.from_numpy(places[start : start + most])
                parts = parts or [one.new_zeros((count, one.shape[1])) for one in found]
                for part, one in zip(parts, found, strict=True):
                    part.index_add_(0, where, one)
            else:
                parts = found  # a group holds no more rows than a piece
        if private.units is not None:
            times = torch.from_numpy(np.bincount(places, minlength=count)).unsqueeze(1)
            parts = [part / times for part in parts]
        _add_clipped(total, parts, private.mechanism.clip_norm)
    return total


def _add_clipped(total: Vector, parts: Sequence[Tensor], bound: float) -> None:
    """total += the sum of some units' gradients, each first scaled down to `bound`.

    parts: of each parameter, (units, numbers). The work goes by pieces of columns that fit a core's second-level cache.
    """
    columns = [
        (start + part_start, part[:, part_start : part_start + _COLUMNS])
        for start, part in zip(np.cumsum([0, *(p.shape[1] for p in parts)]), parts, strict=False)
        for part_start in range(0, part.shape[1], _COLUMNS)
    ]
    squares = sum(
        (torch.linalg.vector_norm(piece, dim=1).double() ** 2 for _, piece in columns), torch.zeros(())
    )
    norms = squares.double().sqrt()
    sound = torch.isfinite(norms)
    factors = torch.where(norms > bound * _SHORTER, bound * _SHORTER / norms, torch.ones_like(norms))
    factors[~sound] = 0.0
    if not bool(sound.all()):
        for _, piece in columns:
            piece[~sound] = 0.0
    for start, piece in columns:
        total[start : start + piece.shape[1]] += (factors @ piece.double()).numpy()


def _groups(
    batch: NDArray[np.int64], units: NDArray[np.int64] | None, most: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
    """The batch in groups of at most `most` units: rows, each row's place in the group, how many units."""
    if units is None:
        for start in range(0, len(batch), most):
            rows = batch[start : start + most]
            yield rows, np.arange(len(rows)), len(rows)
        return
    _, places = np.unique(units[batch], return_inverse=True)
    for start in range(0, int(places.max(initial=-1)) + 1, most):
        inside = (places >= start) & (places < start + most)
        own = places[inside] - start
        yield batch[inside], own, int(own.max()) + 1


def _row_gradients(task: Task, net: Resident, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Each row's gradient of its own loss, of each parameter: (rows, numbers)."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return task.loss(output.unsqueeze(0), target.unsqueeze(0))

    outputs = net.module(inputs)
    losses: Any
    try:
        losses = torch.func.vmap(loss)(outputs, targets)
    except RuntimeError:  # a loss that looks at its numbers (`if`, `.item()`) goes row by row alone
        losses = torch.stack([loss(*pair) for pair in zip(outputs, targets, strict=True)] or [outputs.sum()])
    losses.sum().backward()
    found = []
    for parameter in net.parameters:
        sample = getattr(parameter, "grad_sample", None)
        if sample is None:
            found.append(torch.zeros((len(inputs), parameter.numel()), dtype=parameter.dtype))
        else:
            found.append(sample.reshape(len(inputs), -1))
        parameter.grad = None
        parameter.grad_sample = None  # type: ignore[attr-defined] # where Opacus's hooks put it
    return found
