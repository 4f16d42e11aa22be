"""What a monitoring system is told of a served model: Prometheus series, by model and version."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Counters:
    """Counts since the program started. door: rest or grpc."""

    def __init__(self) -> None:
        self._all = CollectorRegistry()
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

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._all)
