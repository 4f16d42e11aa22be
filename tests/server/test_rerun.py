"""A run anew without a site: as if the site had never joined."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sites import NAMES, Sites, World, first_model, study_of, tables, world

from consortium.protocol.errors import InputError, RefusedError
from consortium.protocol.layout import digest_of
from consortium.protocol.study import Study
from consortium.server import plans, rerun
from consortium.server.running import Running
from consortium.simulations import simulate

SUPPORT = Path(__file__).parents[1] / "support"
QUICK = (sys.executable, "-s", "-P", "-B", str(SUPPORT / "run_quickly.py"))
STUDY = study_of(study={"rounds": 3})
NAME = STUDY.name


def prepared(one: World, run: str) -> None:
    """The run's first model is there already: no worker needs to make it."""
    folder = one.folder / "runs" / run
    folder.mkdir(parents=True)
    plans.keep(one.study, first_model(one.study), folder)


def test_a_run_anew_is_a_run_that_the_site_never_joined(tmp_path: Path) -> None:
    """Bit for bit; the site, though at hand, is asked nothing; and the bundle is that of the run before, even where
    another study has been submitted under its name since."""
    with world(tmp_path, STUDY, QUICK) as one:
        one.sites.join()
        first = one.start()
        assert one.until(first, "finished", "failed")[0] == "finished"
        everybody = one.model(first).tobytes()
        one.archive.submit(study_of(study={"rounds": 1}))
        one.sites.leave()
        one.sites = Sites(one.exchange, STUDY)  # a site's worker is one run's
        one.sites.join()
        prepared(one, f"{NAME}.2")

        said = one.runs.rerun(NAME, ["c"], NAMES)

        assert said == {"run": f"{NAME}.2", "of": first, "without": ["c"], "notes": []}
        assert one.until(said["run"], "finished", "failed")[0] == "finished"
        assert {site for site, *_ in one.sites.asked} == {"a", "b"}
        others = {name: rows for name, rows in tables().items() if name != "c"}
        alone = simulate(STUDY, sites=others, processes=0).outcome
        assert digest_of([one.model(said["run"])]) == alone.digest
        assert one.model(said["run"]).tobytes() == alone.model.tobytes() != everybody
        shown = one.runs.show(said["run"])
        assert (shown["without"], set(shown["sites"])) == (["c"], {"a", "b"})
        assert one.runs.show(first)["without"] == []


def test_a_run_taken_up_again_is_still_without_the_site(tmp_path: Path) -> None:
    """Who is left out is in the database, not in the memory of the server that began the run."""
    with world(tmp_path, STUDY, QUICK) as one:
        first = one.start()
        one.runs.stop(first)
        prepared(one, f"{NAME}.2")
        run = one.runs.rerun(NAME, ["a"], NAMES)["run"]
        one.runs.close()
        again = one.archive.run(run)
        assert again is not None
        over: list[str] = []
        running = Running(
            again,
            one.archive,
            one.exchange,
            one.folder / "runs" / run,
            "fed",
            lambda: over.append(run),
            QUICK,
        )
        one.sites.join("a")
        running.start()
        try:
            why = "0 of at least 2 sites are connected"
            assert one.until(run, "waiting for sites") == ("waiting for sites", why)
            one.sites.join("b", "c")
            assert one.until(run, "finished", "failed")[0] == "finished"
        finally:
            running.halt()
            running.join()
        assert {site for site, *_ in one.sites.asked} == {"b", "c"}


def test_what_cannot_be_run_anew_is_refused(tmp_path: Path) -> None:
    """Nobody named, a name that is nobody's, too few left, no run before."""
    with world(tmp_path, STUDY, QUICK) as one:
        one.archive.submit(STUDY)
        with pytest.raises(InputError, match="has no run"):
            one.runs.rerun(NAME, ["a"], NAMES)
        one.runs.stop(one.start())
        with pytest.raises(InputError, match="name at least one site"):
            one.runs.rerun(NAME, [], NAMES)
        with pytest.raises(InputError, match=r"no site 'hospitl-2'.*did you mean 'hospital-2'"):
            one.runs.rerun(NAME, ["hospitl-2"], ["hospital-1", "hospital-2", "hospital-3"])
        with pytest.raises(RefusedError, match=r"needs 2 sites, and 1 that have joined would be left \(a\)"):
            one.runs.rerun(NAME, ["b", "c"], NAMES)
        assert [run["run"] for run in one.runs.list()] == [f"{NAME}.1"]


def test_who_was_left_out_of_the_run_before_stays_out(tmp_path: Path) -> None:
    """A run anew of a run without a site does not bring it back; one of the run before that does."""
    with world(tmp_path, STUDY, QUICK) as one:
        one.archive.submit(STUDY)
        one.runs.stop(one.start())
        prepared(one, f"{NAME}.2")
        one.runs.stop(one.runs.rerun(NAME, ["a"], NAMES)["run"])
        with pytest.raises(RefusedError, match=r"needs 2 sites, and 1 that have joined would be left \(c\)"):
            one.runs.rerun(NAME, ["b"], NAMES)
        prepared(one, f"{NAME}.3")
        said = one.runs.rerun(NAME, ["d"], [*NAMES, "d"])
        assert said["without"] == ["a", "d"]
        one.runs.stop(said["run"])
        prepared(one, f"{NAME}.4")
        said = one.runs.rerun(f"{NAME}.1", ["b"], NAMES)
        assert said["without"] == ["b"]
        one.runs.stop(said["run"])


def test_a_private_study_and_one_of_cohorts_are_explained() -> None:
    """Their models cannot be the same bit for bit, and a charge is not refunded: the admin is told."""
    assert rerun.notes(STUDY) == []
    assert rerun.notes(study_of(cohort={"size": 2})) == [rerun.COHORTS]
    private = Study.parse(
        STUDY.text
        + '\n[privacy]\nmechanism = "dp-sgd"\nunit = "record"\nepsilon = 3.0\ndelta = 1e-5\nclip_norm = 1.0\n'
    )
    (note,) = rerun.notes(private)
    assert "never given back" in note
