"""The server's ledger of what it noised and published, by study: entries of its audit log, which only grows.

A round of central-gaussian is released by the server: by the next instruction, or by the exported model. So its entry
is durable before the round is committed, and nothing of it leaves before that. A round whose process died in between is
noised anew, and then stands there twice: more than what left, never less.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from consortium.privacy.accounting import Release, spent
from consortium.privacy.mechanisms import mechanism_of
from consortium.protocol.audit import Audit
from consortium.protocol.study import Study

RELEASED = "released"
"""The kind of its entries."""


class StudyLedger:
    """Over the log of a running server. For any number of threads."""

    def __init__(self, log: Audit) -> None:
        self._log, self._lock = log, threading.Lock()
        self._read = 0
        self._found: dict[str, list[dict[str, Any]]] = {}

    def note(self, run: str, study: Study, event: Mapping[str, Any]) -> None:
        """Note what a round is about to publish, durably. event: of the round, as it is shown.

        Raises:
            ConsortiumError: it cannot be written; then the round must not be committed.
        """
        mechanism = mechanism_of(study) if study.privacy.mechanism == "central-gaussian" else None
        if mechanism is None or event.get("void") or not event.get("round"):
            return
        one = mechanism.release()
        self._log.note(RELEASED, {
            "study": study.name, "digest": study.digest, "run": run, "round": event["round"],
            "attempt": event["attempt"], "model": event["model"], "mechanism": mechanism.name,
            "unit": mechanism.unit, "delta": mechanism.delta, "noise_multiplier": one.noise_multiplier,
            "rate": one.rate, "count": one.count,
        })  # fmt: skip

    def spent(self, study: str) -> dict[str, Any] | None:
        """What all runs of the studies of that name have published: how many, the last one's head, and what they
        promise together to a site that was in all of them. None where there is none."""
        with self._lock:
            for entry in self._log.entries(self._read):
                self._read = entry.sequence
                if entry.kind == RELEASED:
                    body = {**entry.body, "head": entry.head.text}
                    self._found.setdefault(str(entry.body["study"]), []).append(body)
            made = list(self._found.get(study, ()))
        if not made:
            return None
        releases = [Release(one["noise_multiplier"], one["rate"], one["count"]) for one in made]
        delta = max(float(one["delta"]) for one in made)
        promised = spent(releases, delta, "site", "zero out one").document()
        return {"releases": len(made), "head": made[-1]["head"], **promised}
