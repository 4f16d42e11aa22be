"""dp-sgd on the code that ships: what one unit can change, what noise is added, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from private_studies import private_study, table
from torch import Tensor, nn

from consortium.client import Task
from consortium.client.private_training import (
    Private,
    _add_clipped,
    clipped_sum,
    refuse_unclippable,
    refuse_unfit,
)
from consortium.client.site import Rows, open_site, rows, start
from consortium.client.task import Source, task_of
from consortium.client.trainer import Resident
from consortium.privacy.mechanisms import Mechanism, mechanism_of
from consortium.privacy.randomness import Stream, Vector
from consortium.protocol.errors import InputError
from consortium.protocol.messages import Instruction, Payload
from consortium.protocol.study import Study
from consortium.strategies.base import Local

PERSON = {"privacy": 'mechanism = "dp-sgd"\nunit = "person"', "data": 'person = "who"\nholdout = 0.0'}
RECORD = {"privacy": 'mechanism = "dp-sgd"', "data": "holdout = 0.0"}


def made(settings: dict[str, str], frame: object) -> tuple[Study, Task, Resident, Rows, Mechanism]:
    study = private_study(**settings)  # type: ignore[arg-type]
    task, mechanism = task_of(study), mechanism_of(study)
    assert mechanism is not None
    return study, task, start(study, task, Local()), rows(task, Source("a", table=frame)), mechanism


def total(task: Task, net: Resident, inputs: Tensor, targets: Tensor, private: Private) -> Vector:
    from opacus.grad_sample import GradSampleHooks

    net.train(True)
    hooks = GradSampleHooks(net.module, loss_reduction="sum", strict=False)
    try:
        return clipped_sum(task, net, inputs, targets, np.arange(len(inputs)), private)
    finally:
        hooks.remove_hooks()


def hard(inputs: Tensor) -> Tensor:
    """Rows that are hard to clip: huge, zero, not finite."""
    inputs = inputs.clone()
    inputs[0] *= 1e12
    inputs[1] = 0
    inputs[2, 0] = torch.nan
    inputs[3, 1] = torch.inf
    return inputs


@pytest.mark.parametrize("settings", [RECORD, PERSON], ids=["record", "person"])
def test_no_unit_moves_the_sum_by_more_than_the_bound(settings: dict[str, str]) -> None:
    """Taking any record, or all rows of any person, out of a batch changes the clipped sum by at most C; rows are huge,
    zero and not finite, and people have one to many rows."""
    frame = table(40, 1, people=7)
    _, task, net, data, mechanism = made(settings, frame)
    mechanism = replace(mechanism, clip_norm=0.3)
    units = data.people if mechanism.unit == "person" else np.arange(40)
    assert units is not None
    inputs, targets = hard(data.inputs), data.targets
    whole = total(task, net, inputs, targets, Private(mechanism, Stream.system(), units))
    assert np.isfinite(whole).all()
    moved = []
    for unit in np.unique(units):
        kept = units != unit
        without = Private(mechanism, Stream.system(), units[kept])
        left = total(task, net, inputs[torch.from_numpy(kept)], targets[torch.from_numpy(kept)], without)
        moved.append(float(np.linalg.norm(whole - left)))
    assert max(moved) <= 0.3
    assert max(moved) > 0.29


@pytest.mark.parametrize("strided", [False, True])
def test_a_gradient_whose_small_numbers_are_lost_in_a_sum_is_no_longer_than_the_bound(strided: bool) -> None:
    """One large number first, and 2,047 whose squares float32 rounds away beside it, one after the other."""
    numbers = torch.full((1, 2048), 2.0**-12 * 0.999)
    numbers[0, 0] = 1.0
    part = numbers.expand(64, -1)
    part = part.t().contiguous().t() if strided else part.contiguous()
    total = np.zeros(2048)
    _add_clipped(total, [part], 0.5)
    assert 0.499 < np.linalg.norm(total) / 64 <= 0.5


def test_gradients_are_those_of_torch_row_by_row() -> None:
    """Below the bound the sum is the plain sum of each row's own gradient, also where rows do not fit at once."""
    _, task, net, data, mechanism = made(RECORD, table(30, 2))
    mechanism = replace(mechanism, clip_norm=1e6)
    expected = np.zeros(sum(p.numel() for p in net.parameters))
    for row in range(30):
        loss = task.loss(net.module(data.inputs[row : row + 1]), data.targets[row : row + 1])
        gradients = torch.autograd.grad(loss, list(net.parameters))
        expected += torch.cat([one.reshape(-1) for one in gradients]).double().numpy()
    private = Private(mechanism, Stream.system())
    np.testing.assert_allclose(total(task, net, data.inputs, data.targets, private), expected, rtol=1e-4)


def test_a_loss_that_looks_at_its_numbers_is_clipped_row_by_row_all_the_same() -> None:
    """`if loss.item() ...` cannot be taken for many rows at once; the sum has the same numbers."""
    _, task, net, data, mechanism = made(RECORD, table(30, 2))
    private = Private(replace(mechanism, clip_norm=0.3), Stream.system())
    expected = total(task, net, data.inputs, data.targets, private)
    plain = task.loss

    def looks(outputs: Tensor, targets: Tensor) -> Tensor:
        found = plain(outputs, targets)
        return found if found.item() < 1e9 else found / 2

    task.loss = looks  # type: ignore[method-assign]
    np.testing.assert_allclose(total(task, net, data.inputs, data.targets, private), expected, rtol=1e-5)


@pytest.mark.parametrize("limit", [1, 200, 2000])
def test_small_pieces_give_the_same_sum(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """A person's rows are clipped together however few gradients are held at a time."""
    _, task, net, data, mechanism = made(PERSON, table(50, 3, people=4))
    private = Private(replace(mechanism, clip_norm=0.2), Stream.system(), data.people)
    whole = total(task, net, data.inputs, data.targets, private)
    monkeypatch.setattr("consortium.client.private_training.GRADIENT_BYTES", limit)
    np.testing.assert_allclose(total(task, net, data.inputs, data.targets, private), whole, rtol=1e-5)


def test_batches_are_drawn_by_unit_with_the_studys_rate() -> None:
    """All rows of a drawn person, none of another; their number does not depend on the data's length."""
    _, _, _, data, mechanism = made(PERSON, table(60, 5, people=12))
    assert data.people is not None
    private = Private(replace(mechanism, steps=400, rate=0.25), Stream.seeded(1), data.people)
    drawn = []
    for batch in private.batches(60):
        people = np.unique(data.people[batch])
        assert len(batch) == sum(int((data.people == one).sum()) for one in people)
        drawn.append(len(people))
    assert np.mean(drawn) == pytest.approx(3.0, rel=0.08)
    assert len(drawn) == 400


class Normed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(2, 4), layer, nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.norm(self.first(x))))


def test_models_that_break_the_guarantee_are_refused_with_the_fix_named() -> None:
    """BatchNorm, and layers whose gradients are not had row by row; LayerNorm and GroupNorm pass."""
    with pytest.raises(InputError, match=r"norm \(BatchNorm1d\).*GroupNorm"):
        refuse_unfit(Normed(nn.BatchNorm1d(4)), "a task")
    with pytest.raises(InputError, match="GroupNorm"):
        refuse_unclippable(Normed(nn.BatchNorm1d(4, track_running_stats=False)), "a task")
    with pytest.raises(InputError, match="DPLSTM"):
        refuse_unclippable(nn.LSTM(2, 3), "a task")
    for sound in (nn.LayerNorm(4), nn.GroupNorm(2, 4)):
        refuse_unfit(Normed(sound), "a task")
        refuse_unclippable(Normed(sound), "a task")


class Counting(nn.Module):
    """Keeps the number of rows that it has seen in an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.rows: Tensor
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return torch.as_tensor(self.layer(x))


def test_an_integer_buffer_that_counts_rows_stays_at_the_site() -> None:
    """It is no part of the layout, so nothing that leaves holds it; what it counted of one round is not there in the
    next."""
    study, task, _, _, _ = made(RECORD, table(30, 6))
    task.model = Counting  # type: ignore[method-assign]
    net = start(study, task, Local())
    names = [array.name for segment in net.layout.segments for array in segment.arrays]
    assert names == ["layer.weight", "layer.bias"]
    site = open_site(study, task, Local(), net, Source("a", table=table(30, 6)))
    question = Instruction(
        "f", "r", 1, 0, "train", study.digest, "", net.layout.digest, "00", 1e12,
        Payload({"shared": net.vector("shared")}),
    )  # fmt: skip
    answer = site.answer(question.to("a"))
    assert answer.status == "done"
    assert isinstance(net.module, Counting)
    assert int(net.module.rows) > 0, "it counts"
    assert {name: one.shape for name, one in answer.payload.vectors.items()} == {"shared": (3,)}


def test_a_site_draws_from_the_system_unless_it_is_simulated() -> None:
    """Two answers of a live site to the same question differ though seed and data are the same. Red with a seeded
    generator."""
    study, task, net, _, _ = made(RECORD, table(30, 6))
    model = net.vector("shared")
    question = Instruction(
        "f", "r", 1, 0, "train", study.digest, "", net.layout.digest, "00", 1e12, Payload({"shared": model})
    )
    answers = []
    for _ in range(2):
        site = open_site(study, task, Local(), net, Source("a", table=table(30, 6)))
        answers.append(site.answer(question.to("a")))
    assert [one.status for one in answers] == ["done", "done"]
    assert not np.array_equal(answers[0].payload.vectors["shared"], answers[1].payload.vectors["shared"])
    assert {one.weight for one in answers} == {1.0}


def test_a_person_needs_ids() -> None:
    """A task whose data name no person declines, and says what to give."""
    from consortium.client.task import Examples

    study, task, net, _, _ = made(PERSON, table(20, 7, people=4))
    examples = Examples(torch.zeros(8, 2), torch.zeros(8, 1))
    site = open_site(study, task, Local(), net, Source("a", table=examples))
    question = Instruction(
        "f",
        "r",
        1,
        0,
        "train",
        study.digest,
        "",
        net.layout.digest,
        "00",
        1e12,
        Payload({"shared": net.vector("shared")}),
    )
    assert "ids" in site.answer(question.to("a")).reason
