"""How fast an address may open connections."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from consortium.server import pace as module
from consortium.server.pace import Pace


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0, 3), min_size=1, max_size=200), st.integers(1, 20), st.floats(0.1, 50))
def test_no_more_are_let_in_than_burst_and_rate_allow(waits: list[float], burst: int, rate: float) -> None:
    """Whenever one comes: so many in all as the bucket held and got; and one that finds a token is let in."""
    clock = Clock()
    pace, taken = Pace(rate, burst, clock), 0
    for wait in waits:
        clock.now += wait
        taken += pace.take("a")
    assert taken <= burst + sum(waits) * rate + 1e-6
    assert taken >= min(len(waits), burst)


def test_an_address_costs_no_other_anything() -> None:
    """And what is given back can be taken again, but never more than the bucket holds."""
    pace = Pace(1.0, 2, Clock())
    assert [pace.take("a") for _ in range(3)] == [True, True, False]
    assert pace.take("b")
    pace.give_back("a")
    assert [pace.take("a") for _ in range(2)] == [True, False]
    for _ in range(5):
        pace.give_back("b")
    assert [pace.take("b") for _ in range(3)] == [True, True, False]


def test_addresses_that_are_gone_are_forgotten() -> None:
    """A hundred thousand of them leave what the last seconds brought."""
    clock = Clock()
    pace = Pace(20.0, 200, clock)
    for number in range(100_000):
        clock.now += 1e-3
        assert pace.take(str(number))
    assert len(pace) <= 2 * module._MANY
