"""kill -9 of everything at random moments: the short form of `tests/support/kills.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import STRATEGIES, campaign


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whatever_is_killed_each_run_ends_as_its_records_say(tmp_path: Path) -> None:
    """Fifteen kills over a run of twenty rounds each of fedavg, fedadam and scaffold: each finishes, its model and what
    sites keep have the bits of a replay of the recorded survivor sets, and no site answered a question twice."""
    tally = campaign(tmp_path, kills=15, seed=11, epochs=60, most=5, gaps=(0.05, 2.0))
    assert tally.kills.total() == 15
    assert tally.runs >= len(STRATEGIES)
