"""A federation of real processes on this machine: what `simulate` computes is what it computes, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leftovers import living
from live import counted

from consortium.simulations.deployment import federation
from consortium.simulations.hospitals import study_of, write_hospitals
from consortium.simulations.programs import Programs
from consortium.simulations.simulation import simulate
from consortium.simulations.sites import gather


def same(folder: Path, strategy: str, sites: int, rounds: int, **sections: Any) -> None:
    """Run a study live and in simulation over the same folders, and compare the models' bytes. sections: of the study,
    in place of its own."""
    study = study_of(rounds, f'name = "{strategy}"').with_(**sections)
    hospitals = write_hospitals(folder / "sites", sites)
    with Programs() as programs, federation(programs, folder) as live:
        for name, place in hospitals.items():
            live.join(name, place)
        live.gather(hospitals)
        live.start(study)
        events = list(live.events(study))
        shown = live.admin.get(f"/v1/studies/{study.name}")
    assert living(str(folder)) == []
    results = Path(shown["model"]).parent
    result = json.loads((results / "result.json").read_text())
    model = np.load(results / "model.npy", allow_pickle=False)
    outcome = simulate(study, sites=gather(study, list(hospitals.values())).sources, processes=0).outcome
    assert model.tobytes() == outcome.model.tobytes()
    assert result["model"] == outcome.digest
    assert json.loads((results / "model" / "contract.json").read_text())["model"] == outcome.digest
    assert counted(shown) == dict.fromkeys(hospitals, (rounds, None))
    asked = [event for event in events if event["kind"] == "round"]
    assert [event["round"] for event in asked] == list(range(rounds + 1))
    assert all(not event["left_out"] and not event["void"] for event in asked)
    assert [e["round"] for e in events if e["kind"] == "evaluation"] == list(range(rounds + 1))


def test_fedavg_live_is_fedavg_in_simulation(tmp_path: Path) -> None:
    """Two sites, two rounds, over TLS with certificates and signatures: the same bytes, and nothing is left running."""
    same(tmp_path, "fedavg", 2, 2)


@pytest.mark.slow
def test_scaffold_live_is_scaffold_in_simulation(tmp_path: Path) -> None:
    """Three sites, whose control variates stay there from round to round: the same bytes."""
    same(tmp_path, "scaffold", 3, 3)


@pytest.mark.slow
def test_a_large_model_live_is_the_same_in_simulation(tmp_path: Path) -> None:
    """68 MB, beyond what is on its way in memory: contents lie in files that later rounds write over, and nothing of a
    round before is in the model."""
    same(
        tmp_path,
        "fedavg",
        2,
        3,
        model={"hidden": [4200, 4000]},
        training={"lr": 0.01, "local_steps": 1, "local_epochs": None},
    )
