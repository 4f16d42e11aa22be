"""What a monitoring system is told of a served model: Prometheus series, by model and version."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Counters:
    """Counts since the program started. door: rest or grpc."""

    def __init__(self) -> None:
        self._all = CollectorRegistry()
        self._bound: dict[tuple[str, str, str], tuple[Counter, Counter, Histogram]] = {}
        labels = ["model", "version"]
        prefix = "consortium_model"
        self.requests = Counter(
            f"{prefix}_requests", "Answers by status.", [*labels, "door", "status"], registry=self._all
        )
        self.rows = Counter(f"{prefix}_rows", "Rows predicted.", labels, registry=self._all)
        self.seconds = Histogram(
            f"{prefix}_seconds",
            "From a request's body to its answer.",
            labels,
            buckets=_SECONDS,
            registry=self._all,
        )
        self.feedback = Counter(f"{prefix}_feedback", "Labels that came later.", labels, registry=self._all)
        self.denied = Counter(
            f"{prefix}_denied", "Requests without a token or the right.", registry=self._all
        )
        self.live = Gauge(
            f"{prefix}_live", "1 for what is served by default.", [*labels, "digest"], registry=self._all
        )

    def answered(self, model: str, version: str, door: str, rows: int, seconds: float) -> None:
        """Count an answer. Its series are looked up once: that takes longer than counting."""
        key = model, version, door
        if key not in self._bound:
            series = self.rows.labels(model, version), self.seconds.labels(model, version)
            self._bound[key] = (self.requests.labels(*key, 200), *series)
        requests, rows_, seconds_ = self._bound[key]
        requests.inc()
        rows_.inc(rows)
        seconds_.observe(seconds)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._all)
