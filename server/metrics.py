"""What a monitoring system is told of the server: Prometheus series of runs, rounds and sites, at the admin door.

They are read off the database and the table of who is connected when they are asked for, so they have the words of
`server/states.py`, agree with `study show`, and go on where they were after a restart. Shown are the latest run of
each study, and all that are under way.

    consortium_run_state{study,run,state}             1 for the state that the run is in, 0 for the others
    consortium_run_since_seconds{study,run}           when that state began, seconds since the epoch
    consortium_run_round{study,run}                   rounds committed
    consortium_run_planned_rounds{study,run}          of the study
    consortium_run_void_rounds_total{study,run}       attempts that moved nothing
    consortium_run_answers_total{study,run,outcome}   of the sites asked: admitted, or why left out (`OUTCOMES`)
    consortium_run_round_seconds{study,run}           histogram: from asking a cohort to the commit
    consortium_sites{status}                          on the roster: invited, joined, left, revoked
    consortium_site_connected{site}, consortium_site_paused{site}
    consortium_server_info{federation,version}
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from consortium.server.archive import Archive
from consortium.server.exchange import Exchange
from consortium.server.roster import Roster
from consortium.server.runs import MOST_EVENTS, Runs
from consortium.server.standing import NOT_NEEDED
from consortium.server.states import OVER, STATES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21600.0)
"""Upper bounds of the histogram."""
ADMITTED, DECLINED, SILENT, SPARED, GONE, INVALID, LATE, ASIDE = OUTCOMES = (
    "admitted", "declined", "no answer", "not needed", "left or revoked", "invalid", "late", "set aside",
)  # fmt: skip
"""What became of a site in an attempt at a round. Late answers are among those of whom there was none in time, or who
were not needed, too; who is set aside is not asked."""


def outcome(reason: str) -> str:
    """The word for a reason why a site was left out."""
    if reason.startswith("declined:"):
        return DECLINED
    if reason == NOT_NEEDED:
        return SPARED
    if reason == "no answer before the deadline":
        return SILENT
    return GONE if "was revoked" in reason or "the federation" in reason else INVALID


@dataclass
class Sums:
    """Of one run's events, up to the event `last`. buckets: how many rounds took no longer than each of `SECONDS`."""

    last: int = 0
    void: int = 0
    rounds: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    buckets: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))

    def add(self, event: Mapping[str, Any]) -> None:
        """Take the next event."""
        self.last = int(event["id"])
        if event["kind"] == "late":
            self.outcomes[LATE] += 1
        if event["kind"] != "round":
            return
        self.void += bool(event["void"])
        self.outcomes[ADMITTED] += len(event["admitted"])
        self.outcomes[ASIDE] += len(event.get("aside", {}))
        self.outcomes.update(outcome(str(why)) for why in event["left_out"].values())
        self.rounds += 1
        self.seconds += float(event["seconds"])
        self.buckets[bisect_left(SECONDS, float(event["seconds"]))] += 1


class Metrics:
    """For any number of threads. federation: its name."""

    def __init__(
        self, federation: str, roster: Roster, archive: Archive, exchange: Exchange, runs: Runs
    ) -> None:
        self._federation, self._roster, self._archive = federation, roster, archive
        self._exchange, self._runs = exchange, runs
        self._lock = threading.Lock()
        self._sums: dict[str, Sums] = {}

    def text(self) -> bytes:
        """All series as they are now, in Prometheus' text format."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        with self._lock:
            registry.register(self)
            return generate_latest(registry)

    def collect(self) -> Iterator[Any]:
        """The families, as `prometheus_client` asks for them."""
        yield from self._of_runs()
        yield from self._of_sites()

    def _of_runs(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        names = ["study", "run"]
        state = GaugeMetricFamily("consortium_run_state", "1 for a run's state.", labels=[*names, "state"])
        since = GaugeMetricFamily("consortium_run_since_seconds", "When its state began.", labels=names)
        done = GaugeMetricFamily("consortium_run_round", "Rounds committed.", labels=names)
        planned = GaugeMetricFamily("consortium_run_planned_rounds", "Rounds of the study.", labels=names)
        void = CounterMetricFamily("consortium_run_void_rounds", "Attempts that moved nothing.", labels=names)
        answers = CounterMetricFamily(
            "consortium_run_answers", "What became of the sites.", labels=[*names, "outcome"]
        )
        seconds = HistogramMetricFamily(
            "consortium_run_round_seconds", "From asking a cohort to the commit.", labels=names
        )
        for one in self._shown():
            of, sums = [one["study"], one["run"]], self._summed(one["run"])
            for word in STATES:
                state.add_metric([*of, word], float(one["state"] == word))
            since.add_metric(of, one["since"])
            done.add_metric(of, one["round"])
            planned.add_metric(of, one["rounds"])
            void.add_metric(of, sums.void)
            for word in OUTCOMES:
                answers.add_metric([*of, word], sums.outcomes[word])
            counts = [sum(sums.buckets[: place + 1]) for place in range(len(sums.buckets))]
            bounds = [*(str(bound) for bound in SECONDS), "+Inf"]
            seconds.add_metric(of, list(zip(bounds, counts, strict=True)), sums.seconds)
        yield from (state, since, done, planned, void, answers, seconds)

    def _of_sites(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        sites = self._roster.sites()
        on_roster = GaugeMetricFamily("consortium_sites", "Sites on the roster.", labels=["status"])
        for status, count in sorted(Counter(str(one["status"]) for one in sites).items()):
            on_roster.add_metric([status], count)
        connected = GaugeMetricFamily("consortium_site_connected", "1 while it is at hand.", labels=["site"])
        paused = GaugeMetricFamily(
            "consortium_site_paused", "1 while its operator has paused it.", labels=["site"]
        )
        for name in self._roster.joined():
            presence = self._exchange.presence(name)
            connected.add_metric([name], float(presence.connected))
            paused.add_metric([name], float(presence.paused))
        about = GaugeMetricFamily(
            "consortium_server_info",
            "The federation, and the server's version.",
            labels=["federation", "version"],
        )
        about.add_metric([self._federation, version("consortium")], 1.0)
        yield from (on_roster, connected, paused, about)

    def _shown(self) -> list[dict[str, Any]]:
        """The latest run of each study, and all that are under way."""
        latest, found = set[str](), []
        for one in self._runs.list():  # the newest first
            if one["study"] not in latest or one["state"] not in OVER:
                found.append(one)
            latest.add(one["study"])
        for run in self._sums.keys() - {one["run"] for one in found}:
            del self._sums[run]
        return found

    def _summed(self, run: str) -> Sums:
        sums = self._sums.setdefault(run, Sums())
        while found := self._archive.events(run, sums.last, MOST_EVENTS):
            for event in found:
                sums.add(event)
        return sums
