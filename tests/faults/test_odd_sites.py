"""Sites that do not do as they should, beside two that do: each costs itself its place, and no more."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from live import COMMAND, counted, live, simulated, study

from consortium.simulations.hospitals import write_hospitals

GOOD = ("hospital-1", "hospital-2")
ODD = {"hospital-3": "dead", "hospital-4": "slow", "hospital-5": "lying"}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_dead_a_slow_and_a_lying_site_are_named_and_the_run_ends(tmp_path: Path) -> None:
    """One never answers, one after the deadline, one sends NaN under its own signature: the run is finished by the
    other two; after three failures each is set aside, so that the fourth round waits for nobody; `study show --json`
    names each with its reason, and counts what came late."""
    one = study("odd", 2, rounds=4, epochs=2, deadline="10s")
    with live(tmp_path) as federation:
        for site, place in write_hospitals(tmp_path / "sites", 5).items():
            federation.join(site, place, ODD.get(site, ""))
        federation.gather()
        federation.start(one)
        federation.over(one.name)
        done = subprocess.run(
            [*COMMAND, "study", "show", one.name, "--json", "--dir", tmp_path / "server"],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        shown = json.loads(done.stdout)
        assert (shown["state"], shown["round"]) == ("finished", 4)
        sites = counted(shown)
        assert {site: sites[site] for site in GOOD} == dict.fromkeys(GOOD, (4, None))
        late = (0, "no answer before the deadline")
        assert (sites["hospital-3"], sites["hospital-4"]) == (late, late)
        assert sites["hospital-5"][0] == 0
        assert sites["hospital-5"][1] == "the shared update is not finite"
        rounds = [event for event in federation.events(one.name) if event["round"]]
        assert [sorted(event["left_out"]) for event in rounds] == [*[sorted(ODD)] * 3, []]
        assert [sorted(event["aside"]) for event in rounds] == [[], [], [], sorted(ODD)]
        for site in ODD:
            assert shown["sites"][site]["set_aside"].startswith("set aside after 3 failures in a row"), shown
        assert shown["sites"]["hospital-4"]["late"] >= 2
        assert shown["sites"]["hospital-3"]["late"] == 0
        model = federation.model(one.name)
    assert model  # and what the two sites alone would give is another: all five gave statistics
    assert model != simulated(one, [tmp_path / "sites" / site for site in GOOD])
