"""A study over Flower's stock processes: the SuperLink with our ServerApp, SuperNodes with our ClientApp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from consortium.simulations.hospitals import study_of, write_hospitals
from consortium.simulations.programs import Programs
from consortium.simulations.simulation import simulate
from consortium.simulations.sites import gather

flower = pytest.importorskip(
    "contenders.flower_processes", reason="benchmarks/ is not part of the installed package"
)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_over_stock_processes_and_in_simulation_the_model_has_the_same_bytes(tmp_path: Path) -> None:
    """Two hospitals, two rounds of SCAFFOLD, whose variates stay at the sites, over flower-superlink and
    flower-supernode with TLS and node authentication: the model is that of `simulate` over the same folders."""
    study = study_of(2, 'name = "scaffold"')
    hospitals = write_hospitals(tmp_path / "sites", 2)
    results = tmp_path / "results"
    environment = {"CONSORTIUM_RESULTS": str(results)}
    with (
        Programs() as programs,
        flower.flower_federation(programs, tmp_path / "server", environment) as federation,
    ):
        for site, folder in hospitals.items():
            federation.join(site, tmp_path / "nodes" / site, {"site": site, "folder": str(folder)})
        federation.run(flower.study_app(study, "r", 2, 60.0), 300.0)
    result = json.loads((results / "r" / "result.json").read_text())
    outcome = simulate(study, sites=gather(study, list(hospitals.values())).sources, processes=0).outcome
    assert [one["left_out"] for one in result["rounds"]] == [{}] * 3
    assert result["model"] == outcome.digest
