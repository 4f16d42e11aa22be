"""The replay that runs are held against: it follows the records, and only true ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from replay import replay

from consortium.simulations import simulate
from consortium.simulations.faults import Fault
from consortium.simulations.hospitals import study_of, write_hospitals
from consortium.simulations.sites import gather


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "scaffold"])
def test_a_replay_of_the_recorded_survivors_has_the_bits_of_the_run(strategy: str, tmp_path: Path) -> None:
    """Sites drop out of some rounds; the replay by the others comes to each round's model. With one survivor less in
    one record, it does not."""
    study = study_of(4, f'name = "{strategy}"').with_(export={"formats": ["safetensors"]})
    places = write_hospitals(tmp_path, 3)
    faults = [Fault("hospital-2", "drop", rounds=(2,)), Fault("hospital-3", "drop", rounds=(1, 3))]
    sources = gather(study, list(places.values())).sources
    outcome = simulate(study, sites=sources, processes=0, faults=faults).outcome
    rounds = outcome.state.rounds
    assert {site: one.round for one in rounds for site in one.left_out} == {"hospital-2": 2, "hospital-3": 3}
    found = replay(study, "run", places, rounds)
    assert found.model.tobytes() == outcome.model.tobytes()
    assert (found.states["hospital-2"] != {}) == (strategy == "scaffold")
    assert [asked[0] for asked in found.answers["hospital-3"]] == [0, 2, 4]
    fewer = {site: weight for site, weight in rounds[2].admitted.items() if site != "hospital-1"}
    with pytest.raises(AssertionError, match="round 2 came to another model"):
        replay(study, "run", places, [*rounds[:2], replace(rounds[2], admitted=fewer), *rounds[3:]])
