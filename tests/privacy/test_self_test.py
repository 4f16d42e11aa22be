"""The mechanisms' self-test on the code that ships; and each fault that it is for, put in by hand, turns it red."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import mechanism_checks as checks
import pytest
from mechanism_checks import Shipped, with_fault

from consortium.client import private_training
from consortium.privacy import mechanisms, randomness
from consortium.protocol.errors import InputError
from consortium.server import noise
from consortium.strategies import means

Check = Callable[[Shipped], None]


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_the_shipped_mechanisms_hold(check: Check) -> None:
    """Each check, on the modules as they are."""
    check(Shipped())


FAULTS: dict[str, tuple[ModuleType, str, str, str, Check]] = {
    "a weighted mean under a uniform bound": (
        means, "means", "scale=lambda _: 1.0, weight=lambda _: 1.0",
        "scale=lambda c: c.weight, weight=lambda c: c.weight",
        checks.no_site_moves_the_mean_by_more_than_is_claimed,
    ),
    "noise for all that were asked, not for the fewer that came": (
        noise, "noise", "count = len(ballot.admitted)", "count = len(ballot.asked)",
        checks.the_noise_on_a_mean_is_what_is_accounted,
    ),
    "noise that does not follow the number of sites": (
        noise, "noise", "sensitivity = reducer.sensitivity(count)", "sensitivity = reducer.sensitivity(10)",
        checks.the_noise_on_a_mean_is_what_is_accounted,
    ),
    "a seeded generator": (
        randomness, "randomness", "Stream(secrets.token_bytes(32), secret=True)", "Stream(bytes(32), secret=True)",
        checks.noise_never_repeats,
    ),
    "numpy's generator": (
        randomness, "randomness", "Stream(secrets.token_bytes(32), secret=True)",
        "Stream(np.random.bytes(32), secret=True)", checks.noise_never_repeats,
    ),
    "an inverted adaptive clip": (
        mechanisms, "mechanisms", "math.exp(-ADAPTATION", "math.exp(ADAPTATION", checks.the_bound_finds_its_quantile,
    ),
    "the bit's noise left out": (
        mechanisms, "mechanisms", "mechanism.bit_deviation(count) * float(", "0.0 * float(",
        checks.bits_and_update_cost_what_is_claimed,
    ),
    "the bit's cost left out": (
        mechanisms, "mechanisms", "left = self.noise_multiplier**-2 - (", "left = self.noise_multiplier**-2 - 0 * (",
        checks.bits_and_update_cost_what_is_claimed,
    ),
    "the denominator from the data's length": (
        private_training, "training", "total /= private.mechanism.denominator", "total /= max(1, len(inputs))",
        checks.one_unit_more_moves_a_step_by_at_most_the_bound,
    ),
    "the denominator from the data's length, by its noise": (
        private_training, "training", "total /= private.mechanism.denominator", "total /= max(1, len(inputs))",
        checks.the_noise_of_a_step_is_what_is_accounted,
    ),
    "a person's rows clipped one by one": (
        private_training, "training", "_groups(batch, private.units, most)", "_groups(batch, None, most)",
        checks.one_unit_more_moves_a_step_by_at_most_the_bound,
    ),
    "no clip of a batch's gradients": (
        private_training, "training", "norms > bound * _SHORTER", "norms > 1e9",
        checks.one_unit_more_moves_a_step_by_at_most_the_bound,
    ),
    "no noise on an empty batch": (
        private_training, "training", "private.draws.add_gaussian(total,",
        "len(batch) and private.draws.add_gaussian(total,",
        checks.the_noise_of_a_step_is_what_is_accounted,
    ),
    "local noise for one bound and not two": (
        mechanisms, "mechanisms", '"local-gaussian": 2.0', '"local-gaussian": 1.0',
        checks.local_noise_is_what_is_accounted,
    ),
    "what is not finite let through": (
        mechanisms, "mechanisms", "if not math.isfinite(length):", "if False:", checks.odd_updates_have_a_rule_each,
    ),
    "integers let through": (
        mechanisms, "mechanisms", "if update.dtype not in (np.float32, np.float64):", "if False:",
        checks.odd_updates_have_a_rule_each,
    ),
    "float16 without a rule": (
        mechanisms, "mechanisms", "update = update.astype(np.float32)", "pass", checks.odd_updates_have_a_rule_each,
    ),
    "batches of a fixed size": (
        mechanisms, "mechanisms", "stream.chosen(units, mechanism.rate)", "np.arange(min(units, 4))",
        checks.batches_have_the_studys_rate,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_put_in_by_hand_turns_it_red(name: str) -> None:
    """The same check fails, on a copy of the module with that fault."""
    module, part, old, new, check = FAULTS[name]
    faulty = Shipped(**{part: with_fault(module, old, new)})
    with pytest.raises((AssertionError, pytest.fail.Exception, InputError, ValueError)):
        check(faulty)
