"""Tables of numbers in little memory: dicts to whoever reads them."""

from __future__ import annotations

import copy
import math
import pickle
import tracemalloc
from collections.abc import Mapping

import pytest

from consortium.server.compact import Numbers, Table, table
from consortium.server.records import Evaluation, Round

SITES = {"a": {"auroc": 0.5, "n": 10.0}, "b": {"auroc": math.inf, "n": 3.0}}


@pytest.mark.parametrize("made", [{"b": 0.1, "a": -0.0}, {}])
def test_numbers_are_the_dict_that_they_were_made_of(made: dict[str, float]) -> None:
    """Order, bits, equality both ways, and as a copy or from another process."""
    one = Numbers(made)
    for same in (one, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):  # noqa: S301 - our own
        assert list(same.items()) == list(made.items())
        assert [math.copysign(1, value) for value in same.values()] == [
            math.copysign(1, value) for value in made.values()
        ]
        assert same == made
        assert made == same
        assert repr(same) == repr(made)
    assert one != {"z": 1.0}
    with pytest.raises(KeyError):
        one["z"]


def test_tables_are_the_dicts_of_dicts_that_they_were_made_of() -> None:
    """Where the rows have other names, they stay as they are."""
    one = table(SITES)
    assert isinstance(one, Table)
    assert {site: dict(row) for site, row in one.items()} == SITES
    assert one == SITES
    assert one["b"]["auroc"] == math.inf
    uneven: Mapping[str, Mapping[str, float]] = {**SITES, "c": {"n": 1.0}}
    assert table(uneven) is uneven
    assert table({}) == {}


def test_a_thousand_rounds_of_twenty_sites_take_few_megabytes() -> None:
    """Names come anew with every answer; they are kept once."""
    tracemalloc.start()
    try:
        kept: list[Round | Evaluation] = []
        for number in range(1000):
            names = [f"site-{n:02}".encode().decode() for n in range(20)]
            weights = dict.fromkeys(names, number + 0.5)
            kept.append(Round(number, 0, tuple(names), weights, {}, "0" * 64, 0.5))
            rows = {name: {"auroc": number + 0.25, "n": 10.0} for name in names}
            kept.append(Evaluation(number, "0" * 64, {"auroc": 0.5, "n": 10.0}, rows))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken < 4e6, taken
