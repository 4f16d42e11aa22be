"""The server's ledger of what it noised and published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from founded import found
from private_studies import private_study

from consortium.privacy.mechanisms import mechanism_of
from consortium.protocol.audit import FOLDER, segments
from consortium.protocol.errors import IntegrityError
from consortium.protocol.layout import Array, Layout, Segment
from consortium.protocol.study import Study
from consortium.server import audit
from consortium.server.lineage import RESTORED, privacy
from consortium.server.records import Outcome, Plan, Round, RunState
from consortium.server.serve import Server
from consortium.strategies.chosen import strategy_of

BY_SITE = private_study('mechanism = "dp-sgd"')
CENTRAL = private_study('unit = "site"\nmechanism = "central-gaussian"')


def round_of(
    number: int, attempt: int = 0, void: str = "", asked: str = "ab", came: str = "a"
) -> dict[str, Any]:
    """An event of a round, as the run's process reports it."""
    admitted = dict.fromkeys(came, 1.0)
    return {
        "kind": "round", "round": number, "attempt": attempt, "model": "m", "void": void, "asked": list(asked),
        "admitted": admitted, "left_out": {}, "seconds": 1.0,
    }  # fmt: skip


def test_noised_rounds_add_up_over_restarts_and_edits_are_found(tmp_path: Path) -> None:
    """A round that moved the model is one release of its study, a void one is none; a changed figure is found."""
    federation = found(tmp_path / "fed")
    for number in (1, 2):
        server = Server(federation)
        for void in ("too few", ""):
            event = round_of(number, void=void)
            server.archive.released("private.1", CENTRAL, event)
        said = server.archive.published("private")
        assert said is not None
        one = mechanism_of(CENTRAL)
        assert one is not None
        assert (said["releases"], said["epsilon"]) == (number, one.guarantee(number).epsilon)
        assert server.archive.published("other") is None
        server.store.close()
    audit.verify(federation)
    (path,) = segments(tmp_path / "fed" / FOLDER)
    path.write_bytes(path.read_bytes().replace(b'"noise_multiplier":', b'"noise_multiplieR":', 1))
    with pytest.raises(IntegrityError, match="entry"):
        audit.verify(federation)


def test_what_each_site_released_is_read_from_the_ledger_and_never_less_than_from_records(
    tmp_path: Path,
) -> None:
    """A round that was noised anew after a crash stands there twice, and privacy.json counts it twice; a site that adds
    its noise itself sends the same bytes in every attempt, whether or not any counted."""
    server = Server(found(tmp_path / "fed"))
    archive = server.archive
    assert archive.released_by("private.1") is None
    for event in (round_of(1, came="ab"), round_of(1, came="ab"), round_of(2, came="a")):
        archive.released("private.1", CENTRAL, event)
    for event in (round_of(1, void="too few"), round_of(1, 1, came="b"), round_of(2, asked="b", came="b")):
        archive.released("private.2", BY_SITE, event)
    archive.released("private.3", private_study('mechanism = "none"'), round_of(1))
    central, by_site = archive.released_by("private.1"), archive.released_by("private.2")
    assert central is not None
    assert by_site is not None
    assert (central["entries"], central["sites"]) == (3, {"a": 3, "b": 2})
    assert (by_site["entries"], by_site["sites"]) == (3, {"a": 1, "b": 2})
    assert archive.released_by("private.3") is None
    said = privacy(
        plan_of(CENTRAL), records(Round(1, 0, ("a", "b"), {"a": 1.0, "b": 1.0}, {}, "m", 1.0)), central
    )
    assert {site: one["releases"] for site, one in said["sites"].items()} == {"a": 3, "b": 2}
    assert said["ledger"] == {"entries": 3, "head": central["head"], "restored": False}
    assert RESTORED not in said["not_covered"]
    server.note("restored", {"epoch": 5, "event": 0})
    noted = archive.released_by("private.1")
    assert noted is not None
    said = privacy(plan_of(CENTRAL), records(Round(1, 0, ("a",), {"a": 1.0}, {}, "m", 1.0)), noted)
    assert RESTORED in said["not_covered"], "what was published after the backup is not known here"
    lost = {**central, "sites": {}, "entries": 0}
    said = privacy(plan_of(CENTRAL), records(Round(1, 0, ("a",), {"a": 1.0}, {}, "m", 1.0)), lost)
    assert {site: one["releases"] for site, one in said["sites"].items()} == {"a": 1}
    server.store.close()


def test_a_secret_cohort_is_not_noted_and_every_site_is_charged(tmp_path: Path) -> None:
    """Whoever could have been drawn is counted in each round, a round that was noised twice included."""
    sampled = private_study(
        'unit = "site"\nmechanism = "central-gaussian"', cohort="size = 2\nsampling_rate = 0.5"
    )
    server = Server(found(tmp_path / "fed"))
    for number in (1, 1, 2):
        server.archive.released("private.1", sampled, round_of(number, came="a"))
    noted = server.archive.released_by("private.1")
    assert noted is not None
    assert (noted["entries"], noted["any"], noted["sites"]) == (3, 3, {})
    rounds = [Round(n, 0, ("a",), {"a": 1.0}, {}, "m", 1.0, drawn_from=("a", "b", "c")) for n in (1, 2)]
    said = privacy(plan_of(sampled), records(*rounds), noted)
    assert {site: one["releases"] for site, one in said["sites"].items()} == {"a": 3, "b": 3, "c": 3}
    server.store.close()


def plan_of(study: Study) -> Plan:
    layout = Layout((Segment("shared", "float32", (Array("w", (2,)),)),))
    return Plan(study, strategy_of(study), layout, np.zeros(2, np.float32))


def records(*rounds: Round) -> Outcome:
    """The end of a run of these rounds."""
    model = np.zeros(2, np.float32)
    state = RunState(len(rounds), 0, model, "m", None, {}, {}, rounds=rounds)
    return Outcome("finished", "", model, "m", None, state)
