"""The mechanisms' self-test, over modules that are given: the shipped ones pass, copies with a fault in them do not.

`checks` names what is looked at. Each check draws what privacy rests on from the modules' own streams, and its random
bounds are at least six standard errors wide, so that a sound mechanism fails one in less than a billion runs.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from private_studies import private_study, table

from consortium.client import private_training, trainer
from consortium.client.site import rows, start
from consortium.client.task import Source, task_of
from consortium.privacy import mechanisms, randomness
from consortium.protocol.errors import InputError
from consortium.protocol.messages import Answer, Payload
from consortium.server import noise
from consortium.server.admission import Admitted
from consortium.server.tally import Ballot
from consortium.strategies import means
from consortium.strategies.base import Contribution, Local

Vector = mechanisms.Vector
NUMBERS = 200_000
"""Numbers whose deviation is measured: its standard error is 0.16 %, and 2 % are allowed."""
BOUND = 0.7


@dataclass(frozen=True)
class Shipped:
    """The modules that a mechanism is made of."""

    mechanisms: ModuleType = mechanisms
    randomness: ModuleType = randomness
    means: ModuleType = means
    noise: ModuleType = noise
    training: ModuleType = private_training

    def central(self, quantile: float | None = None) -> Any:
        return self.mechanisms.Mechanism(
            "central-gaussian", "site", 4.0, 1e-5, BOUND, 2.5, 20, quantile=quantile
        )

    def stream(self) -> Any:
        return self.randomness.Stream.system()


def with_fault(module: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of a module in whose text `old`, which stands there, is replaced by `new`."""
    text = inspect.getsource(module)
    assert old in text, f"{module.__name__} has no longer: {old}"
    copy = ModuleType(f"{module.__name__}_with_a_fault")
    copy.__file__ = module.__file__
    sys.modules[copy.__name__] = copy  # dataclasses look there for what annotations mean
    try:
        exec(compile(text.replace(old, new), copy.__name__, "exec"), copy.__dict__)  # noqa: S102 - our own text
    finally:
        del sys.modules[copy.__name__]
    return copy


def length(vector: Vector) -> float:
    return float(np.linalg.norm(np.asarray(vector, np.float64).reshape(-1)))


def reduced(
    reducer: Any, updates: Sequence[Vector], weights: Sequence[float], slots: Sequence[int]
) -> Vector:
    state = reducer.init(updates[0].size, updates[0].dtype)
    for slot, update, weight in zip(slots, updates, weights, strict=True):
        state = reducer.add(state, Contribution(slot, update, weight, length(update)))
    return np.asarray(reducer.finish(state))


def no_site_moves_the_mean_by_more_than_is_claimed(shipped: Shipped) -> None:
    """Sites of unequal weights, some of which did not answer: any one replaced by a zero update, at 1 to 17 answers."""
    rng = np.random.default_rng(2)
    reducer = shipped.means.mean()
    for asked, missing in ((1, ()), (2, ()), (5, (1, 3)), (17, (0, 16)), (20, (4, 5, 19))):
        slots = [slot for slot in range(asked) if slot not in missing]
        raw = [rng.standard_normal(50).astype(np.float32) * scale for scale in (9, 1e-3, 1e9, 0, 3)]
        updates = [shipped.mechanisms.clip(raw[slot % len(raw)], BOUND)[0] for slot in slots]
        weights = [1e4 if number == 0 else 1e-3 for number in range(len(slots))]
        whole = reduced(reducer, updates, weights, slots)
        claimed = BOUND * reducer.sensitivity(len(slots))
        for taken in range(len(slots)):
            others = [np.zeros_like(one) if number == taken else one for number, one in enumerate(updates)]
            assert length(whole - reduced(reducer, others, weights, slots)) <= claimed * (1 + 1e-5)


def odd_updates_have_a_rule_each(shipped: Shipped) -> None:
    """0-d and float16 are clipped to the bound, a zero update passes, integers and what is not finite are refused."""
    clip = shipped.mechanisms.clip
    for update in (np.array(-5.0, np.float32), np.full(1000, 6e4, np.float16), np.full(3, 1e30, np.float64)):
        clipped, within = clip(update, BOUND)
        assert not within
        assert clipped.shape == update.shape
        assert BOUND * (1 - 1e-3) <= length(clipped) <= BOUND
    zero, within = clip(np.zeros(4, np.float32), BOUND)
    assert within
    assert not zero.any()
    for bad in (np.ones(3, np.int64), np.ones(3, np.bool_), np.array([1, np.nan]), np.array([np.inf, 0])):
        with pytest.raises(InputError):
            clip(bad, BOUND)


def ballot(asked: int, admitted: Sequence[int], size: int) -> Ballot:
    """An exchange in which only some of the asked sites count, each with a zero update within the bound."""
    votes = {}
    for slot in admitted:
        site = f"s{slot:02}"
        payload = Payload({"shared": np.zeros(size, np.float32)}, {mechanisms.WITHIN: np.array(1.0)})
        votes[site] = Admitted(
            Answer("r", 1, 0, "train", site, "", "", weight=1e-3 + slot, payload=payload), 0.0
        )
    return Ballot(tuple(f"s{slot:02}" for slot in range(asked)), votes, {}, ())


def the_noise_on_a_mean_is_what_is_accounted(shipped: Shipped) -> None:
    """Measured within 2 % of multiplier x bound / answers, by the loop's own step, where sites are missing too."""
    one = shipped.central()
    for asked, admitted in ((2, (0, 1)), (5, (1, 2, 4)), (31, tuple(range(20)))):
        zeros = np.zeros(NUMBERS, np.float32)
        exchange = ballot(asked, admitted, 1)
        noisy, _ = shipped.noise.noised(one, shipped.means.mean(), exchange, zeros, {}, shipped.stream())
        accounted = one.release().noise_multiplier * BOUND / len(admitted)
        assert float(noisy.std()) == pytest.approx(accounted, rel=0.02)


def local_noise_is_what_is_accounted(shipped: Shipped) -> None:
    """Twice multiplier x bound, as two updates within it may lie twice the bound apart; 0-d shapes do not occur."""
    one = replace(shipped.central(), name="local-gaussian")
    noisy = shipped.mechanisms.add_noise(np.zeros(NUMBERS, np.float32), one.local_deviation, shipped.stream())
    assert float(noisy.std()) == pytest.approx(2 * one.release().noise_multiplier * BOUND, rel=0.02)


def noise_never_repeats(shipped: Shipped) -> None:
    """Two streams differ, also where all other generators are seeded alike before each; they call themselves secret."""
    drawn = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002 - that it has no effect is the point
        stream = shipped.stream()
        drawn.append(stream.gaussians(8))
        assert stream.secret
    assert not np.array_equal(*drawn)


def the_bound_finds_its_quantile(shipped: Shipped) -> None:
    """From a tenth and from ten times the true one, within 10 %."""
    one = shipped.central(0.5)
    norms = np.random.default_rng(3).lognormal(0.0, 0.5, 500)
    true = float(np.quantile(norms, 0.5))
    for begin in (0.1, 10.0):
        bound, last = true * begin, []
        stream = shipped.randomness.Stream.seeded("quantile", begin)
        for number in range(200):
            bound = shipped.mechanisms.next_bound(one, bound, float((norms <= bound).sum()), 500, stream)
            last += [bound] if number >= 120 else []
        assert np.mean(last) == pytest.approx(true, rel=0.1)


def bits_and_update_cost_what_is_claimed(shipped: Shipped) -> None:
    """Their inverse squared multipliers add up to the study's; the bit's measured noise is the accounted one."""
    one, repeats = shipped.central(0.5), 8000
    for count in (3, 20, 1000):
        both = one.update_multiplier(count) ** -2 + (2 * one.bit_deviation(count)) ** -2
        assert both == pytest.approx(one.release().noise_multiplier ** -2, rel=1e-9)
    stream, count = shipped.stream(), 100
    moved = [
        math.log(shipped.mechanisms.next_bound(one, 1.0, count / 2, count, stream)) for _ in range(repeats)
    ]
    deviation = float(np.std(moved)) / mechanisms.ADAPTATION * count
    assert deviation == pytest.approx(one.bit_deviation(count), rel=6 / math.sqrt(2 * repeats))


@dataclass(frozen=True)
class Trained:
    """A site's trainer of `count` rows, of one person in `people` where they are the unit; its steps take all rows."""

    trainer: trainer.TorchTrainer
    count: int
    mechanism: Any
    units: Any
    most: float
    """lr x C / batch_size, by the study's public numbers: what one unit may move a step by."""
    first: Vector

    def moved(self, shipped: Shipped, draws: Any) -> Vector:
        """The model's change by one private step."""
        private = shipped.training.Private(self.mechanism, draws, self.units)
        with mock.patch.object(trainer, "descend", shipped.training.descend):
            update, _ = self.trainer.train({"shared": self.first}, {}, [np.arange(self.count)], 1, private)
        assert update.weight == 1.0, "the number of rows would tell of every row"
        return update.vectors["shared"].astype(np.float64)


def trained(count: int, hidden: str = "[64]", people: int | None = None) -> Trained:
    unit = "record" if people is None else "person"
    study = private_study(
        f'mechanism = "dp-sgd"\nunit = "{unit}"',
        data="holdout = 0.0" if people is None else 'person = "who"\nholdout = 0.0',
        hidden=hidden,
    )
    task, mechanism = task_of(study), mechanisms.mechanism_of(study)
    assert mechanism is not None
    net = start(study, task, Local())
    data = rows(task, Source("a", table=table(32, 4, people=people)))
    some = trainer.TorchTrainer(
        task, net, Local(), data.inputs[:count] * 50, data.targets[:count],
        data.inputs[:0], data.targets[:0],
    )  # fmt: skip
    units = None if people is None or data.people is None else data.people[:count]
    most = study.training.lr * mechanism.clip_norm / study.training.batch_size
    return Trained(some, count, mechanism, units, most, net.vector("shared").copy())


def one_unit_more_moves_a_step_by_at_most_the_bound(shipped: Shipped) -> None:
    """n against n + 1 rows, and none against all rows of one person, under the same noise."""
    for few, many, people in (
        (0, 1, None),
        (1, 2, None),
        (5, 6, None),
        (30, 31, None),
        (0, 32, 1),
        (31, 32, 4),
    ):
        without, whole = (
            trained(count, people=people).moved(shipped, shipped.randomness.Stream.seeded("same"))
            for count in (few, many)
        )
        most = trained(few).most * (
            2 if (few, people) == (31, 4) else 1
        )  # that person's other rows count less
        assert length(whole - without) <= most * (1 + 1e-4)


def the_noise_of_a_step_is_what_is_accounted(shipped: Shipped) -> None:
    """At a site of no row, and of many: lr x multiplier x C / batch_size, within 2 % (eight standard errors)."""
    for count in (0, 32):
        one = trained(count, hidden="[512]")
        numbers = np.stack([one.moved(shipped, shipped.stream()) for _ in range(40)])
        expected = one.most * one.mechanism.release().noise_multiplier
        found = math.sqrt(float(numbers.var(axis=0, ddof=1).mean()))
        assert found == pytest.approx(expected, rel=0.02)


def batches_have_the_studys_rate(shipped: Shipped) -> None:
    """Each of n units is in a batch with probability `rate`: the mean size is n x rate, whatever n, within 6 errors."""
    one = replace(shipped.central(), name="dp-sgd", rate=0.1, steps=2000)
    for units in (5, 40, 1000):
        made = shipped.mechanisms.batches(one, units, lambda chosen: chosen, shipped.stream())
        sizes = [len(batch) for batch in made]
        error = math.sqrt(units * 0.1 * 0.9 / one.steps)
        assert abs(float(np.mean(sizes)) - units * 0.1) <= 6 * error


CHECKS: tuple[Callable[[Shipped], None], ...] = (
    no_site_moves_the_mean_by_more_than_is_claimed,
    odd_updates_have_a_rule_each,
    the_noise_on_a_mean_is_what_is_accounted,
    local_noise_is_what_is_accounted,
    noise_never_repeats,
    the_bound_finds_its_quantile,
    bits_and_update_cost_what_is_claimed,
    one_unit_more_moves_a_step_by_at_most_the_bound,
    the_noise_of_a_step_is_what_is_accounted,
    batches_have_the_studys_rate,
)
