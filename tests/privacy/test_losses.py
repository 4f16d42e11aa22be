"""The losses that are found at once are those that dp-accounting finds one at a time."""

from __future__ import annotations

import pytest

from consortium.privacy.losses import composed

DELTAS = (1e-3, 1e-5, 1e-8)
EPSILONS = (-0.5, 0.0, 0.3, 2.0)


@pytest.mark.parametrize(
    ("multiplier", "rate", "count"),
    [(1.5, 0.3, 6), (0.4, 0.1, 50), (0.7, 0.999, 3), (20.0, 0.5, 100), (1.1, 1e-6, 10_000), (3.0, 1.0, 7)],
)
def test_they_are_those_of_the_library(multiplier: float, rate: float, count: int) -> None:
    """Both ways round, by removing and by adding a unit, up to rounding."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, pld

    one = GaussianDpEvent(multiplier)
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, one) if rate < 1 else one, count))
    ours = composed(multiplier, rate, count, 1e-3)
    for delta in DELTAS:
        assert ours.get_epsilon_for_delta(delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-6)
    for epsilon in EPSILONS:
        assert ours.get_delta_for_epsilon(epsilon) == pytest.approx(
            accountant._pld.get_delta_for_epsilon(epsilon), rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize("rate", [0.02, 0.4, 0.97])
def test_so_is_each_relation_by_itself(rate: float) -> None:
    """Also at the edge, where a unit's absence from the sample alone reaches the loss."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    ours = composed(0.6, rate, 1, 1e-3)
    theirs = from_gaussian_mechanism(0.6, value_discretization_interval=1e-3, sampling_prob=rate)
    for name in ("_pmf_remove", "_pmf_add"):
        one, other = getattr(ours, name).to_dense_pmf(), getattr(theirs, name).to_dense_pmf()
        assert one._lower_loss == other._lower_loss
        assert one._probs == pytest.approx(other._probs, rel=1e-6, abs=2e-11)
