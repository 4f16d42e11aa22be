"""Studies with differential privacy, from the study file to the exported model, by the loop that runs them live."""

import json
from pathlib import Path

import pandas as pd
import pytest
from private_studies import private_study, table
from typer.testing import CliRunner

from consortium.protocol.errors import InputError
from consortium.server.export import export
from consortium.server.model import verified
from consortium.server.records import Plan
from consortium.simulations import simulate
from consortium.simulations.simulation import Result
from consortium.strategies.chosen import strategy_of

SITE = 'unit = "site"\nmechanism = '
MECHANISMS = {
    "record": 'mechanism = "dp-sgd"',
    "person": 'mechanism = "dp-sgd"\nunit = "person"',
    "central": f'{SITE}"central-gaussian"',
    "adaptive": f'{SITE}"central-gaussian"\nclip_quantile = 0.5',
    "local": f'{SITE}"local-gaussian"',
}
SITES = {f"site-{number}": table(60 + 40 * number, number, people=20) for number in range(1, 4)}


def ran(name: str, processes: int = 0, **settings: str) -> Result:
    data = 'person = "who"' if name == "person" else ""
    study = private_study(MECHANISMS[name], data=data, **settings)  # type: ignore[arg-type]
    return simulate(study, sites=SITES, processes=processes)


@pytest.mark.parametrize("name", list(MECHANISMS))
def test_each_mechanism_trains_and_repeats_itself_whatever_the_processes(name: str) -> None:
    """A simulation is seeded: the same bits again, in one process or two; noise moves the model from the plain one,
    and no statistic is asked for before round 1."""
    one, two = ran(name), ran(name, processes=2)
    assert one.outcome.status == "finished"
    assert one.outcome.digest == two.outcome.digest
    assert (
        one.outcome.digest
        != simulate(private_study('mechanism = "none"'), sites=SITES, processes=0).outcome.digest
    )
    assert all(record.round for record in one.outcome.state.rounds)
    assert all(set(record.admitted.values()) == {1.0} for record in one.outcome.state.rounds)


def test_the_bound_adapts_and_is_kept_with_the_state() -> None:
    """It moves from the study's clip norm, and the next round's instruction brings it."""
    bound = float(ran("adaptive").outcome.state.statistics["privacy.bound"])
    assert bound > 0
    assert bound != 1.0


@pytest.mark.slow
def test_an_exported_model_says_what_each_site_spent(tmp_path: Path) -> None:
    """privacy.json lists epsilon with all that it means, and every release, covered or not; the manifest covers it."""
    result = ran("record")
    study = result.study
    plan = Plan(study, strategy_of(study), result.layout, result.outcome.model)
    export(plan, result.outcome, tmp_path / "model")
    said = json.loads(verified(tmp_path / "model")["privacy.json"])
    assert set(said["sites"]) == set(SITES)
    for one in said["sites"].values():
        assert 2.97 <= one["epsilon"] <= 3.0
        assert one["delta"] == 1e-5
        assert (one["unit"], one["relation"]) == ("record", "add or remove one")
        assert one["sampling"] == "Poisson sampling, rate 0.1"
        assert one["accountant"] in ("PLD", "RDP")
    assert said["accounted"] == ["updates of shared weights, each round"]
    assert any("evaluation" in line for line in said["not_covered"])


def test_a_round_that_is_tried_again_is_released_once() -> None:
    """Where the site adds the noise, it sends the same bytes in the next attempt, and a round that stays void counts;
    what the server noises is released only where the model moved."""
    from consortium.server.tally import releases
    from consortium.simulations.faults import Fault

    faults = [Fault("site-1", "drop", frozenset({2})), Fault("site-2", "drop", frozenset({2}))]
    for name in ("record", "central"):
        study = private_study(MECHANISMS[name])
        outcome = simulate(study, sites=SITES, processes=0, faults=faults).outcome
        mechanism = Plan(study, strategy_of(study), ran("record").layout, outcome.model).mechanism
        voids = sum(bool(record.void) for record in outcome.state.rounds)
        counted = releases(outcome.state.rounds, mechanism)
        assert voids
        assert outcome.state.round == 1
        assert counted["site-3"] == outcome.state.round + (name == "record")


def test_study_check_prints_what_each_site_will_have_spent(tmp_path: Path) -> None:
    """After each round and at the end, at other noise levels, with unit, relation, sampling and delta beside it."""
    from consortium.server.study_cli import study as command

    path = tmp_path / "study.toml"
    path.write_text(private_study(MECHANISMS["record"]).text)
    shown = CliRunner().invoke(command, ["check", str(path)])
    assert shown.exit_code == 0, shown.output
    for word in (
        "delta 1e-05 per record, after all rounds",
        "with other noise multipliers, epsilon at delta 1e-05 per record",
        "add or remove one",
        "Poisson sampling, rate 0.1",
        "PLD",
        "6: 2.99",
        "not covered",
    ):
        assert word in shown.output
    said = json.loads(CliRunner().invoke(command, ["check", str(path), "--json"]).output)["privacy"]
    spent = [one["epsilon"] for one in said["after_rounds"]]
    assert spent == sorted(spent)
    assert len(spent) == 6
    assert spent[-1] == said["epsilon"]
    noise = [one["epsilon"] for one in said["other_noise"]]
    assert noise == sorted(noise, reverse=True)


def test_a_model_with_batch_norm_is_refused(tmp_path: Path) -> None:
    """Under any mechanism, before anything runs, with GroupNorm named."""
    (tmp_path / "task.py").write_text(
        "import torch\nfrom torch import nn\nfrom consortium.client import Examples, Task\n"
        "class T(Task):\n"
        "    def model(self): return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))\n"
        "    def loss(self, outputs, targets): return ((outputs - targets) ** 2).mean()\n"
        "    def data(self, source): return Examples(torch.zeros(20, 2), torch.zeros(20, 1))\n"
    )
    for name in ("record", "central", "local"):
        study = private_study(MECHANISMS[name])
        text = study.text.replace("consortium.client.tasks.tabular:Classifier", "task:T")
        text = "\n".join(
            line for line in text.splitlines() if not line.startswith(("target", "features", "hidden"))
        )
        (tmp_path / "study.toml").write_text(text)
        with pytest.raises(InputError, match="GroupNorm"):
            simulate(tmp_path / "study.toml", sites={"a": pd.DataFrame(), "b": pd.DataFrame()}, processes=0)
