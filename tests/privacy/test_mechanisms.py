"""The mechanisms' self-test on the code that ships: worst cases against the claimed sensitivity, noise as accounted.

Neighbours differ as the mechanism's relation says. Where a docstring names a fault, that fault turns the test red.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from private_studies import private_study

from consortium.privacy import mechanisms
from consortium.privacy.accounting import Release, calibrate, spent
from consortium.privacy.mechanisms import (
    Mechanism,
    add_noise,
    clip,
    mechanism_of,
    next_bound,
    norm,
)
from consortium.privacy.randomness import Stream, Vector
from consortium.protocol.errors import InputError
from consortium.strategies.base import Contribution, Reducer
from consortium.strategies.catalogue import CATALOGUE
from consortium.strategies.means import mean, norm_bounded, weighted_mean

CENTRAL = Mechanism("central-gaussian", "site", 4.0, 1e-5, 0.7, 2.5, 20)


def reduced(reducer: Reducer, updates: list[Vector], weights: list[float]) -> Vector:
    state = reducer.init(updates[0].size, updates[0].dtype)
    for slot, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        state = reducer.add(state, Contribution(slot, update, weight, norm(update)))
    return reducer.finish(state)


def worst(size: int, dtype: Any) -> list[Vector]:
    """Updates that are hard to clip: huge, tiny, one spike, equal, zero, nearly at the bound, subnormal."""
    rng = np.random.default_rng(1)
    spike = np.zeros(size)
    spike[size // 2] = -3e8
    raw = [
        rng.standard_normal(size) * 1e12,
        rng.standard_normal(size) * 1e-12,
        spike,
        np.full(size, 0.7 / np.sqrt(size) * (1 + 1e-7)),
        np.zeros(size),
        np.full(size, -1e-40),
        rng.standard_normal(size),
    ]
    return [one.astype(dtype) for one in raw]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 3, 1000, 100_003])
def test_no_clipped_update_is_longer_than_the_bound(size: int, dtype: Any) -> None:
    """To the last bit, whatever its length before; what is within stays as it is, a zero update stays zero."""
    for update in worst(size, dtype):
        for bound in (1e-5, 0.7, 1e4):
            clipped, within = clip(update, bound)
            assert norm(clipped) <= bound
            assert clipped.dtype == dtype
            assert within == (norm(update) <= bound)
            if within:
                np.testing.assert_array_equal(clipped, update)
            else:
                assert norm(clipped) >= bound * (1 - 1e-5)


def test_odd_arrays_have_a_rule_each() -> None:
    """0-d keeps its shape, float16 becomes float32, integers and what is not finite are refused."""
    scalar, within = clip(np.array(-5.0, np.float32), 2.0)
    assert (scalar.shape, within) == ((), False)
    assert scalar == pytest.approx(-2.0, rel=1e-5)
    half, _ = clip(np.full(1000, 60000.0, np.float16), 1.0)
    assert half.dtype == np.float32
    assert norm(half) <= 1.0
    assert clip(np.empty(0, np.float32), 1.0)[1]
    with pytest.raises(InputError, match="int64"):
        clip(np.ones(3, np.int64), 1.0)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(InputError, match="not finite"):
            clip(np.array([1.0, bad, 0.0], np.float32), 1.0)
    for bound in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="clip_norm"):
            clip(np.ones(3, np.float32), bound)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 40])
def test_the_claimed_sensitivity_is_not_exceeded(count: int) -> None:
    """Any one of n sites replaced by zero moves the mean by at most bound x sensitivity(n), weights or not, missing
    answers or not. Red with a weighted mean under the uniform bound."""
    rng = np.random.default_rng(2)
    reducer = mean()
    updates = [
        clip(rng.standard_normal(50).astype(np.float32) * scale, 0.7)[0] for scale in rng.uniform(0, 9, count)
    ]
    weights = list(rng.uniform(1e-3, 1e4, count))
    claimed = reducer.sensitivity(count)
    assert claimed is not None
    whole = reduced(reducer, updates, weights)
    for site in range(count):
        neighbour = [np.zeros_like(one) if slot == site else one for slot, one in enumerate(updates)]
        assert norm(whole - reduced(reducer, neighbour, weights)) <= 0.7 * claimed * (1 + 1e-5)
    heavy = [1e4, *[1e-3] * (count - 1)]
    if count > 1:  # and this is why a weighted mean claims nothing
        far = reduced(weighted_mean(), updates, heavy) - reduced(
            weighted_mean(), [0 * updates[0], *updates[1:]], heavy
        )
        assert norm(far) > 0.7 * claimed or norm(updates[0]) < 0.3
        assert weighted_mean().sensitivity(count) is None


@pytest.mark.parametrize("clip_norm", [0.3, 0.7, 5.0])
def test_a_bounded_means_sensitivity_holds_below_its_bound_too(clip_norm: float) -> None:
    """One update of norm C, replaced by zero, moves it by at most C x sensitivity, for C below and above the bound."""
    reducer = norm_bounded(0.7, weighted=False)
    update, other = np.array([clip_norm, 0.0]), np.array([0.0, 0.1])
    moved = norm(
        reduced(reducer, [update, other], [1.0, 1.0]) - reduced(reducer, [0 * update, other], [1.0, 1.0])
    )
    claimed = reducer.sensitivity(2)
    assert claimed is not None
    assert moved <= clip_norm * claimed * (1 + 1e-9)


def test_local_noise_hides_any_update_behind_any_other() -> None:
    """Two updates of norm C lie up to 2C apart, so the deviation is twice multiplier x C."""
    one = replace(CENTRAL, name="local-gaussian")
    noisy = add_noise(np.zeros(200_000, np.float32), one.local_deviation, Stream.system())
    assert float(noisy.std()) == pytest.approx(2 * one.noise_multiplier * one.clip_norm, rel=0.02)
    assert one.relation == "replace one"
    assert replace(CENTRAL, name="dp-sgd").local_deviation == pytest.approx(2.5 * 0.7)
    assert CENTRAL.local_deviation == 0


def test_a_study_is_calibrated_to_what_it_promises() -> None:
    """All rounds together spend the study's epsilon, to 1 %, and not more; half of them spend less."""
    for text in (
        'mechanism = "dp-sgd"',
        'mechanism = "central-gaussian"\nunit = "site"',
        'mechanism = "local-gaussian"\nunit = "site"',
    ):
        one = mechanism_of(private_study(text))
        assert one is not None
        assert 0.99 * 3.0 <= one.guarantee().epsilon <= 3.0
        assert one.guarantee(one.rounds // 2).epsilon < one.guarantee().epsilon
        assert one.guarantee().delta == 1e-5
    assert mechanism_of(private_study('mechanism = "none"')) is None


def test_rate_and_denominator_are_the_studys_and_amplify_only_dp_sgd() -> None:
    """dp-sgd: sampling_rate and batch_size as written; a mechanism on whole updates is not amplified, nor is it with a
    cohort that is drawn in another way than Poisson's."""
    sgd = mechanism_of(private_study('mechanism = "dp-sgd"\nsampling_rate = 0.05'))
    assert sgd is not None
    assert (sgd.rate, sgd.denominator, sgd.steps) == (0.05, 32.0, 20)
    central = mechanism_of(private_study('mechanism = "central-gaussian"\nunit = "site"', cohort="size = 3"))
    assert central is not None
    assert central.release() == Release(central.noise_multiplier, 1.0, 1)
    exact = calibrate(3.0, 1e-5, central.rounds)
    assert central.noise_multiplier == exact


def test_adaptive_clipping_accounts_for_its_bits() -> None:
    """Update and bits together cost what one release of the study's multiplier costs (arXiv 1905.03871, theorem 1)."""
    adaptive = replace(CENTRAL, quantile=0.5)
    for count in (2, 4, 20, 100, 1000):
        update, bit = adaptive.update_multiplier(count), 2 * adaptive.bit_deviation(count)
        both = spent([Release(update), Release(bit)], 1e-5, "site", "zero out one").epsilon
        assert both == pytest.approx(
            spent([CENTRAL.release()], 1e-5, "site", "zero out one").epsilon, rel=1e-6
        )
        assert update > CENTRAL.noise_multiplier


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
def test_adaptive_clipping_finds_its_quantile(start: float, quantile: float) -> None:
    """From a tenth and from ten times the true one, within 10 %. Red with an inverted step."""
    rng, stream = np.random.default_rng(3), Stream.seeded("adaptive", start, quantile)
    norms = rng.lognormal(0.0, 0.5, 500)
    true = float(np.quantile(norms, quantile))
    adaptive, bound = replace(CENTRAL, quantile=quantile), true * start
    last = []
    for number in range(300):
        bound = next_bound(adaptive, bound, float((norms <= bound).sum()), 500, stream)
        last += [bound] if number >= 200 else []
    assert np.mean(last) == pytest.approx(true, rel=0.1)


def test_a_bound_cannot_be_carried_off() -> None:
    """It stays a number to clip by, whatever the noise says."""
    adaptive = replace(CENTRAL, quantile=0.5, noise_multiplier=1e5)
    bound = 1.0
    for _ in range(50):
        bound = next_bound(adaptive, bound, 1.0, 1, Stream.seeded(4))
    assert mechanisms.LOWEST <= bound <= mechanisms.HIGHEST


def test_which_strategies_allow_noise_at_the_server_is_said_once() -> None:
    """The names that a study may use with central-gaussian are those whose reducer has a sensitivity."""
    from consortium.protocol.privacy_checks import MEANS

    able = []
    for entry in CATALOGUE:
        weighted = any(parameter.name == "weighted" for parameter in entry.parameters)
        made = entry.make(weighted=False) if weighted else entry.make()
        if made.reducer.sensitivity(5) is not None and not made.local.control_variates:
            able.append(entry.name)
    assert tuple(able) == MEANS
