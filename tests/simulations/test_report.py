"""The results folder, and the numbers of its table."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from breast_cancer import study_text, table
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from consortium.protocol.errors import InputError
from consortium.protocol.study import Study
from consortium.simulations import report
from consortium.simulations.experiment import Experiment, experiment
from consortium.simulations.faults import Fault
from consortium.simulations.simulation import simulate
from consortium.simulations.sites import gather
from consortium.simulations.table import rows, spread, t_quantile, text

EVIL = '<script>alert(1)</script> & "Sons" $x$'


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Three seeds of two strategies over the values of a column, one of which is hostile; one site drops out once."""
    folder = tmp_path_factory.mktemp("data")
    frame = table(4)
    frame["clinic"] = np.where(np.arange(len(frame)) % 3 == 0, EVIL, "north")
    frame.to_csv(folder / "all.csv", index=False)
    study = Study.parse(study_text(4, cohort={"min_sites": 1}))
    sites = gather(study, [folder / "all.csv"], None, "column:clinic")
    faults = [Fault("north", "drop", {2})]
    return experiment(study, sites, compare=["fedavg", "fedprox"], seeds=3, processes=0, faults=faults)


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 29, 30, 200])
def test_the_interval_is_that_of_students_t(freedom: int) -> None:
    """The closed form gives scipy's quantile."""
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=12))
def test_a_spread_leaves_out_what_is_no_number(values: list[float]) -> None:
    """Mean and interval are those of the numbers alone, as scipy has them, and it says how many there were."""
    kept = [value for value in values if not math.isnan(value)]
    found = spread(values)
    assert found.seeds == len(kept)
    assert math.isnan(found.mean) == (not kept)
    assert math.isnan(found.low) == (len(kept) < 2)
    if len(kept) >= 2:
        error = stats.sem(kept)
        assert found.mean == pytest.approx(np.mean(kept), abs=1e-6)
        assert found.high - found.mean == pytest.approx(
            stats.t.ppf(0.975, len(kept) - 1) * error, rel=1e-6, abs=1e-6
        )


def test_the_table_is_the_mean_over_seeds_of_the_trials(done: Experiment) -> None:
    """Local-only first, then each strategy, then pooled; the study's metric first."""
    found = {row.name: row.metrics for row in rows(done)}
    assert list(found) == ["local-only", "fedavg", "fedprox", "pooled"]
    assert next(iter(found["fedavg"])) == "auroc"
    for name in ("fedavg", "fedprox"):
        own = [trial.metrics["auroc"] for trial in done.trials if trial.strategy == name]
        assert len(own) == 3
        assert found[name]["auroc"].mean == pytest.approx(np.mean(own))
    local = [np.mean([m["auroc"] for m in one.local.values()]) for one in done.baselines]
    assert found["local-only"]["auroc"].mean == pytest.approx(np.mean(local))
    assert text(rows(done)).splitlines()[1].startswith("local-only")


def test_the_folder_holds_every_round_and_the_table(done: Experiment, tmp_path: Path) -> None:
    """rounds.jsonl has a line an attempt with who was left out and why; table.csv has the table's numbers."""
    report.write(done, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line.get("admitted") and line["round"]]
    assert {(line["strategy"], line["seed"], line["round"]) for line in trained} == {
        (strategy, seed, number)
        for strategy in ("fedavg", "fedprox")
        for seed in (7, 8, 9)
        for number in (1, 2, 3)
    }
    for line in trained:
        assert list(line["left_out"]) == (["north"] if line["round"] == 2 else [])
        assert 0 <= line["metrics"]["auroc"] <= 1
    last = {(line["strategy"], line["seed"]): line["model"] for line in trained}
    assert last == {(t.strategy, t.seed): t.result.outcome.digest for t in done.trials}
    with (tmp_path / "out" / "table.csv").open() as file:
        cells = {(row["model"], row["metric"]): row for row in csv.DictReader(file)}
    for row in rows(done):
        for metric, one in row.metrics.items():
            cell = cells[row.name, metric]
            assert (float(cell["mean"]), float(cell["low"]), float(cell["high"])) == (
                one.mean,
                one.low,
                one.high,
            )
            assert cell["seeds"] == "3"


def test_the_page_is_self_contained_and_escapes_names(done: Experiment, tmp_path: Path) -> None:
    """No script, link or address; images inline; a hostile site name is text."""
    path = report.write(done, tmp_path / "out")
    page = Page(path.read_text(encoding="utf-8"))
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    attributes = [
        (name, value or "") for tag, own in page.tags if tag != "img" for name, value in own.items()
    ]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "href")]
    assert EVIL in page.text
    assert "http" not in page.text.replace("Content-Security-Policy", "")
    for said in (
        "column 'clinic'",
        "exact",
        "binned",
        "numpy",
        "Student",
        "scripted fault",
        done.study.digest,
    ):
        assert said in page.text, said
    for trial in done.trials:
        assert trial.result.outcome.digest in page.text


def test_the_page_says_that_a_partition_is_artificial(done: Experiment, tmp_path: Path) -> None:
    """Where a table was split at random the page says so first; where a column splits it, it does not."""
    (tmp_path / "all.csv").write_text(table(4).to_csv(index=False))
    sites = gather(done.study, [tmp_path / "all.csv"], 3, "dirichlet:0.5")
    page = Page(report.write(replace(done, sites=sites), tmp_path / "one").read_text(encoding="utf-8"))
    assert "The partition is artificial: dirichlet:0.5 over 3 sites" in page.text
    page = Page(report.write(done, tmp_path / "two").read_text(encoding="utf-8"))
    assert "artificial" not in page.text


def test_plots_are_png_files_of_a_sensible_size(done: Experiment, tmp_path: Path) -> None:
    """Each is a PNG with something drawn on it."""
    from PIL import Image

    report.write(done, tmp_path / "out")
    for name in ("rounds.png", "sites.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.format == "PNG"
            assert image.width >= 800
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20


def test_a_result_reports_itself(tmp_path: Path) -> None:
    """`Result.report(folder)` writes the same folder for one run from Python, without baselines."""
    sites: dict[str, pd.DataFrame] = {"a": table(4).iloc[:300], "b": table(4).iloc[300:]}
    result = simulate(Study.parse(study_text(4)), sites=sites, processes=0)
    path = result.report(tmp_path / "new" / "out")
    assert path == tmp_path / "new" / "out" / "report.html"
    facts = json.loads((path.parent / "run.json").read_text())
    assert facts["strategies"]["fedavg"]["models"] == {"7": result.outcome.digest}
    assert facts["baselines"] == {}
    assert Study.load(path.parent / "study.toml").digest == result.study.digest
    assert result.outcome.evaluation is not None
    assert (
        facts["strategies"]["fedavg"]["metrics"]["auroc"]["mean"] == result.outcome.evaluation.pooled["auroc"]
    )


def test_a_failed_run_is_reported_too(tmp_path: Path) -> None:
    """No model ever moved: the page says why, and the table has a dash."""
    study = Study.parse(study_text(4))
    sites = {"a": table(4).iloc[:300], "b": table(4).iloc[300:]}
    result = simulate(study, sites=sites, processes=0, faults=[Fault("b", "decline", {1})])
    assert result.status == "failed"
    page = Page(result.report(tmp_path / "out").read_text(encoding="utf-8"))
    assert "failed: round 1: 1 of 2 sites gave a valid answer; at least 2 are needed" in page.text
    assert "scripted fault" in page.text  # the reason by site
    assert result.report(tmp_path / "again").exists()
    assert (tmp_path / "out" / "table.csv").read_text().splitlines()[0] == "model,metric,mean,low,high,seeds"


def test_results_are_never_overwritten(done: Experiment, tmp_path: Path) -> None:
    """A folder that is not empty is refused, and nothing in it changes."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        report.write(done, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
