"""The torch trainer against slow, obvious loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consortium.client import Examples, Source, Task
from consortium.client.site import Memory, check_model, held_out, rows, start
from consortium.client.trainer import Resident, TorchTrainer, gradients, schedule, seed_for
from consortium.protocol import Study
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.layout import Vector, digest_of
from consortium.protocol.messages import Instruction, Payload
from consortium.protocol.sections import Training
from consortium.strategies.base import Local

TEXT = 'format = 1\n[study]\nname = "t"\ntask = "task:T"\nrounds = 1\n[model]\ndtype = "float64"\n'
TEXT += "[training]\nlr = 0.1\n"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.norm(self.body(x))))
        return out


class Toy(Task):
    def model(self) -> nn.Module:
        return Net()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def data(self, source: Source) -> Examples:
        rng = np.random.default_rng(len(source.site))
        return Examples(torch.from_numpy(rng.normal(size=(23, 4))), torch.from_numpy(rng.integers(0, 3, 23)))


class Personal(Toy):
    local = ("head.*", "norm.*")


def trainer(
    task: type[Toy] = Toy, local: Local | None = None, study: Study | None = None
) -> tuple[TorchTrainer, dict[str, Vector]]:
    study = study or Study.parse(TEXT)
    one = task(study)
    net = start(study, one, local or Local())
    data = rows(one, Source("site"))
    model = {"shared": net.vector("shared")}
    made = TorchTrainer(
        one, net, local or Local(), data.inputs, data.targets, data.test_inputs, data.test_targets
    )
    return made, model


def fresh(trainer: TorchTrainer, model: Mapping[str, Vector]) -> Net:
    """A plain module with these shared weights and buffers."""
    net = Net().double()
    named = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    with torch.no_grad():
        for name, values in trainer.layout["shared"].split(model["shared"]).items():
            named[name].copy_(torch.from_numpy(np.array(values)))
    return net


def plain(
    trainer: TorchTrainer, model: Mapping[str, Vector], optimizer: Callable[..., torch.optim.Optimizer]
) -> Net:
    """A fresh model with these weights, trained by torch's own optimizer in a plain loop over one schedule."""
    net = fresh(trainer, model)
    optim = optimizer(net.parameters())
    for batch in BATCHES:
        optim.zero_grad()
        F.cross_entropy(net(trainer.inputs[batch]), trainer.targets[batch]).backward()
        optim.step()
    return net


BATCHES = [np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7]), np.array([1, 3, 5, 7, 9])]


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({}, lambda p: torch.optim.SGD(p, lr=0.1)),
        ({"momentum": 0.9, "weight_decay": 0.01}, lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01)),
        ({"optimizer": "adam"}, lambda p: torch.optim.Adam(p, lr=0.1)),
        (
            {"optimizer": "adamw", "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        ),
    ],
)
def test_training_equals_a_plain_torch_loop(
    settings: dict[str, object], reference: Callable[..., torch.optim.Optimizer]
) -> None:
    """Flat parameters, by-hand SGD and given batches give what torch's optimizers give, BatchNorm's running
    statistics included, to 1e-12 in float64."""
    made, model = trainer(study=Study.parse(TEXT).with_(training=settings))
    update, after = made.train(model, {}, BATCHES, seed=1)
    net = plain(made, model, reference)
    expected = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, values in made.layout["shared"].split(model["shared"] + update.vectors["shared"]).items():
        np.testing.assert_allclose(values, expected[name].detach().numpy(), atol=1e-12, err_msg=name)
    assert after == {}
    assert update.weight == len(made.inputs)


def test_training_again_from_the_same_model_gives_the_same_bytes() -> None:
    """Nothing of one call stays for the next: momentum, gradients, counters and buffers start anew."""
    made, model = trainer(study=Study.parse(TEXT).with_(training={"momentum": 0.9}))
    first, _ = made.train(model, {}, BATCHES, seed=1)
    made.evaluate({"shared": model["shared"] + 1}, {})
    again, _ = made.train(model, {}, BATCHES, seed=1)
    assert first.vectors["shared"].tobytes() == again.vectors["shared"].tobytes()


def test_an_update_in_the_models_own_memory_has_the_same_bytes() -> None:
    """A worker's update takes no memory of its own; variates and what stays at the site are the same, too."""
    for task, local in ((Toy, Local(control_variates=True)), (Personal, Local())):
        made, model = trainer(task, local)
        if local.control_variates:
            model["control"] = np.full(made.layout["control"].size, 0.01, np.float32)
        first, after = made.train(model, {}, BATCHES, seed=1)
        made.resident.lends = True
        lent, then = made.train(model, {}, BATCHES, seed=1)
        assert np.shares_memory(lent.vectors["shared"], made.resident.arrays["shared"])
        for one, two in ((first.vectors, lent.vectors), (after, then)):
            assert one.keys() == two.keys()
            assert all(one[kind].tobytes() == two[kind].tobytes() for kind in one)


def test_a_model_that_is_not_the_one_named_is_refused() -> None:
    """Whether its digest is computed here, or came with it from whoever hashed the content."""
    made, model = trainer()
    name = digest_of([model["shared"]])
    asked = Instruction("f", "r", 1, 0, "train", "s", name, made.layout.digest, "n", 0.0, Payload(model))
    for right in ("", name):
        check_model(asked, made.resident, right)
    for one, found in (
        (asked, "0" * 64),
        (replace(asked, model="0" * 64), name),
        (replace(asked, model=""), ""),
    ):
        with pytest.raises(IntegrityError):
            check_model(one, made.resident, found)


def test_gradients_are_those_of_autograd() -> None:
    """The call of torch's engine gives the bits of torch.autograd.grad, and None for what the loss does not touch."""
    net, unused = Net(), nn.Parameter(torch.ones(2))
    parameters = (*net.parameters(), unused)
    inputs, targets = torch.randn(7, 4), torch.randint(0, 3, (7,))
    found = gradients(F.cross_entropy(net(inputs), targets), parameters)
    expected = torch.autograd.grad(F.cross_entropy(net(inputs), targets), parameters, allow_unused=True)
    assert found[-1] is None
    for one, other in zip(found[:-1], expected[:-1], strict=True):
        assert one is not None
        assert torch.equal(one, other)
        assert other.abs().max() > 0
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize(
    ("loss", "wrong"),
    [
        (lambda net, x: net(x).sum(dim=1), r"the loss has shape \(7,\); one number would be right"),
        (lambda net, x: net(x).sum().detach(), "does not require grad"),
    ],
)
def test_a_loss_that_is_no_number_of_the_model_is_refused(
    loss: Callable[[nn.Module, Tensor], Tensor], wrong: str
) -> None:
    net = Net()
    with pytest.raises(RuntimeError, match=wrong):
        gradients(loss(net, torch.randn(7, 4)), tuple(net.parameters()))


def test_fedprox_adds_its_gradient() -> None:
    """One more plain loop, with mu * (w - w_global) added by hand before each step."""
    made, model = trainer(local=Local(proximal=0.5))
    update, _ = made.train(model, {}, BATCHES, seed=1)
    net = fresh(made, model)
    anchor = {n: p.detach().clone() for n, p in net.named_parameters()}
    for batch in BATCHES:
        net.zero_grad()
        F.cross_entropy(net(made.inputs[batch]), made.targets[batch]).backward()
        with torch.no_grad():
            for name, p in net.named_parameters():
                assert p.grad is not None
                p.sub_(0.1 * (p.grad + 0.5 * (p - anchor[name])))
    expected = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, values in made.layout["shared"].split(model["shared"] + update.vectors["shared"]).items():
        np.testing.assert_allclose(values, expected[name].detach().numpy(), atol=1e-12, err_msg=name)


def test_scaffold_corrects_each_gradient_and_moves_its_variate() -> None:
    """y -= lr * (g - c_i + c) each step; c_i+ = c_i - c + (x - y) / (K lr) (arXiv 1910.06378, alg. 1)."""
    made, model = trainer(local=Local(control_variates=True))
    size = made.layout["control"].size
    rng = np.random.default_rng(0)
    model["control"] = rng.normal(size=size) * 0.1
    own = rng.normal(size=size) * 0.1
    update, after = made.train(model, {"control": own}, BATCHES, seed=1)
    control = made.layout["control"]
    shift = control.split(model["control"] - own)
    net = fresh(made, model)
    begin = {n: p.detach().clone() for n, p in net.named_parameters()}
    for batch in BATCHES:
        net.zero_grad()
        F.cross_entropy(net(made.inputs[batch]), made.targets[batch]).backward()
        with torch.no_grad():
            for name, p in net.named_parameters():
                assert p.grad is not None
                p.sub_(0.1 * (p.grad + torch.from_numpy(np.array(shift[name]))))
    own_after, change = control.split(after["control"]), control.split(update.vectors["control"])
    for name, p in net.named_parameters():
        moved = (begin[name] - p.detach()).numpy() / (3 * 0.1)
        expected = control.split(own)[name] - control.split(model["control"])[name] + moved
        np.testing.assert_allclose(own_after[name], expected, atol=1e-12)
        np.testing.assert_allclose(change[name], expected - control.split(own)[name], atol=1e-12)


def test_local_arrays_stay_at_the_site() -> None:
    """A personal head and norm are not in the update; they go on from the site's own state."""
    made, model = trainer(Personal)
    names = [array.name for array in made.layout["shared"].arrays]
    assert names == ["body.weight", "body.bias"]
    _, first = made.train(model, {}, BATCHES, seed=1)
    _, second = made.train(model, first, BATCHES, seed=1)
    assert set(first) == {"local"}
    assert not np.array_equal(first["local"], second["local"])
    _, again = made.train(model, first, BATCHES, seed=1)
    assert second["local"].tobytes() == again["local"].tobytes()


def test_every_process_starts_from_the_same_model_and_another_seed_from_another() -> None:
    """The initial model is decided by the study's seed."""
    _, one = trainer()
    _, two = trainer()
    _, other = trainer(study=Study.parse(TEXT).with_(study={"seed": 1}))
    assert one["shared"].tobytes() == two["shared"].tobytes() != other["shared"].tobytes()


def test_frozen_parameters_are_neither_trained_nor_sent() -> None:
    """What the task freezes is no part of any segment and keeps its values."""

    class Frozen(Toy):
        frozen = ("body.*",)

    made, model = trainer(Frozen)
    before = dict(made.resident.module.named_parameters())["body.weight"].clone()
    made.train(model, {}, BATCHES, seed=1)
    assert not any("body" in a.name for s in made.layout.segments for a in s.arrays)
    torch.testing.assert_close(dict(made.resident.module.named_parameters())["body.weight"], before)


def test_a_site_without_rows_says_so() -> None:
    """No training rows: an input error, not a division by zero."""
    made, model = trainer()
    with pytest.raises(InputError, match="no training rows"):
        made.train(model, {}, [], seed=1)


def test_epochs_visit_every_row_and_steps_go_on_where_the_round_before_stopped() -> None:
    """local_epochs: each pass is a permutation. local_steps: rounds cut one endless stream of passes."""
    epochs = schedule(Training(batch_size=4, local_epochs=2), 10, 7, "a", 3)
    assert [len(b) for b in epochs] == [4, 4, 2, 4, 4, 2]
    assert sorted(np.concatenate(epochs[:3])) == list(range(10))
    short = [
        b.tolist()
        for r in (1, 2, 3, 4)
        for b in schedule(Training(batch_size=4, local_steps=2), 10, 7, "a", r)
    ]
    long = [b.tolist() for b in schedule(Training(batch_size=4, local_steps=8), 10, 7, "a", 1)]
    assert short == long
    assert sorted(row for batch in long[3:6] for row in batch) == list(range(10))
    assert schedule(Training(), 10, 7, "a", 1)[0].tolist() != schedule(Training(), 10, 7, "b", 1)[0].tolist()
    assert seed_for(7, "a", 1) != seed_for(7, "a", 2)
    assert 0 <= seed_for(7, "a", 1) < 2**63


def test_holdout_depends_on_key_and_person_alone() -> None:
    """Rows of one person stay on one side; adding rows moves nobody; another key is another split."""
    ids = np.array([f"p{i // 3}" for i in range(600)])
    examples = Examples(torch.zeros(600, 1), torch.zeros(600), ids)
    test = held_out(examples, 0.2, b"key")
    assert all(len(set(test[ids == one])) == 1 for one in set(ids))
    assert 0.1 < test.mean() < 0.3
    fewer = held_out(Examples(torch.zeros(300, 1), torch.zeros(300), ids[300:]), 0.2, b"key")
    np.testing.assert_array_equal(fewer, test[300:])
    assert not np.array_equal(held_out(examples, 0.2, b"other"), test)
    assert not held_out(examples, 0.0, b"key").any()


def test_pending_state_becomes_the_state_only_when_its_answer_counted() -> None:
    """A site's memory: counted in that very round, it advances; not counted or another round, it is dropped."""
    old, new = {"local": np.zeros(1)}, {"local": np.ones(1)}
    memory = Memory(old, new, 4)
    assert memory.settled(4) == Memory(new)
    assert memory.settled(3) == Memory(old)
    assert memory.settled(0) == Memory(old)


def test_resident_is_one_flat_vector() -> None:
    """Every parameter and float buffer is a view: loading is one copy."""
    made, _ = trainer()
    net: Resident = made.resident
    for tensor in [*net.module.parameters(), *(b for b in net.module.buffers() if b.is_floating_point())]:
        assert tensor.untyped_storage().data_ptr() == net.flat.untyped_storage().data_ptr()
