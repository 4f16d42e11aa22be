"""What a monitoring system reads: the states and counts of the events themselves, over TLS, with a token."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
from founded import found
from prometheus_client.parser import text_string_to_metric_families

from consortium.protocol.study import Study
from consortium.server.metrics import OUTCOMES, Metrics, Sums, outcome
from consortium.server.serve import Server
from consortium.server.standing import NOT_NEEDED
from consortium.server.states import RUNNING, STATES, VOIDED

ROUND: dict[str, Any] = {
    "kind": "round", "round": 1, "attempt": 0, "admitted": {"a": 1.0, "b": 1.0}, "left_out": {}, "aside": {},
    "seconds": 0.4, "void": "",
}  # fmt: skip
RUN = {"study": "s", "run": "s.1"}


def study() -> Study:
    from breast_cancer import study_text

    return Study.parse(study_text(4, study={"name": "s"}))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One whose doors are open; a run of it has one committed round and a void one."""
    folder = tmp_path_factory.mktemp("metrics") / "fed"
    one = Server(found(folder))
    one.admin_door.start()
    one.archive.submit(study())
    one.archive.propose("s")
    one.archive.move("s.1", RUNNING)
    one.archive.note("s.1", ROUND)
    left_out = {
        "b": "declined: no", "c": "no answer before the deadline", "d": NOT_NEEDED, "e": "was revoked",
        "f": "the shared update is not finite",
    }  # fmt: skip
    void = {**ROUND, "round": 2, "admitted": {"a": 1.0}, "left_out": left_out, "aside": {"g": "set aside"}}
    one.archive.note("s.1", {**void, "void": "too few", "seconds": 4.0})
    one.archive.note("s.1", {"kind": "late", "site": "c", "asked": "train", "round": 2, "attempt": 0})
    one.archive.move("s.1", VOIDED, "too few")
    yield one
    one.stop()


def scraped(server: Server, token: str) -> tuple[int, str, str]:
    """As Prometheus asks: over TLS by the federation's root, with a bearer token; status, type, text."""
    context = ssl.create_default_context(cafile=str(server.federation.folder / "root.pem"))
    line = http.client.HTTPSConnection("127.0.0.1", server.admin_door.port, context=context, timeout=30)
    try:
        headers = {"Authorization": f"Bearer {token}", "Accept": "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"}
        line.request("GET", "/metrics", headers=headers)
        reply = line.getresponse()
        return reply.status, str(reply.getheader("content-type")), reply.read().decode()
    finally:
        line.close()


def values(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_a_viewer_scrapes_the_states_and_counts_of_the_events(server: Server) -> None:
    """Each state in its word, one of them 1; rounds, void ones, and what became of the sites, by outcome."""
    status, kind, text = scraped(server, server.roster.new_token("prometheus", "viewer"))
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = values(text)

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset({**RUN, **labels}.items())]

    assert {word for word in STATES if value("consortium_run_state", state=word)} == {VOIDED}
    assert value("consortium_run_void_rounds_total") == 1
    assert value("consortium_run_planned_rounds") == study().rounds
    counted = {word: value("consortium_run_answers_total", outcome=word) for word in OUTCOMES}
    assert counted == {**dict.fromkeys(OUTCOMES, 1.0), "admitted": 3.0}
    assert value("consortium_run_round_seconds_bucket", le="0.5") == 1
    assert value("consortium_run_round_seconds_bucket", le="+Inf") == 2
    assert value("consortium_run_round_seconds_sum") == pytest.approx(4.4)
    assert "consortium_server_info{federation=" in text


def test_nobody_else_does(server: Server) -> None:
    """Without a token that is known nothing is said."""
    assert scraped(server, "wrong")[0] == 401


def test_a_restart_sets_nothing_back(server: Server) -> None:
    """What is counted comes from the database; asked again, it is the same, and new events are added."""
    once, others = Metrics("x", server.roster, server.archive, server.exchange, server.runs), []
    assert isinstance(server, Server)
    others.append(values(once.text().decode()))
    others.append(values(once.text().decode()))
    again = Metrics("x", server.roster, server.archive, server.exchange, server.runs)
    others.append(values(again.text().decode()))
    assert others[0] == others[1] == others[2]


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("declined: policy: there is no [[allow]]", "declined"), ("has left the federation", "left or revoked"),
        ("does not belong to the federation any more", "left or revoked"), (NOT_NEEDED, "not needed"),
        ("weight 1e9 is above the study's cohort.max_weight, 100", "invalid"),
    ],
)  # fmt: skip
def test_reasons_have_few_words(reason: str, word: str) -> None:
    """A label's values are few, whatever sites write."""
    assert outcome(reason) == word


def test_rounds_are_counted_in_the_bucket_that_bounds_them() -> None:
    """A bound belongs to its own bucket."""
    sums = Sums()
    for number, seconds in enumerate((0.1, 0.11, 1e9)):
        sums.add({**ROUND, "id": number, "seconds": seconds})
    assert (sums.buckets[0], sums.buckets[1], sums.buckets[-1]) == (1, 1, 1)
