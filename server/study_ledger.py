"""The server's ledger of what each study's runs have released, by site: entries of its audit log, which only grows.

What is noised at the server (central-gaussian) is released by it: by the next instruction, or by the exported model.
What a site noises is released when it answers; every site that was asked may have. So a round's entry is durable before
the round is committed, and nothing of it leaves before that. A round whose process died in between is noised anew, and
then stands there twice: more than what left, never less. Only a site that adds its noise itself sends the same again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from consortium.privacy.accounting import Release, spent
from consortium.privacy.mechanisms import mechanism_of
from consortium.protocol.audit import Audit
from consortium.protocol.study import Study

RELEASED = "released"
"""The kind of its entries."""
_CENTRAL = "central-gaussian"


class StudyLedger:
    """Over the log of a running server. For any number of threads."""

    def __init__(self, log: Audit) -> None:
        self._log, self._lock = log, threading.Lock()
        self._read = 0
        self._found: list[dict[str, Any]] = []
        self._restored: list[int] = []

    def note(self, run: str, study: Study, event: Mapping[str, Any]) -> None:
        """Note what a round is about to publish, or was sent by those who were asked, durably. event: of the round, as
        it is shown. Of a cohort that was drawn in secret it is not noted who was in it.

        Raises:
            ConsortiumError: it cannot be written; then the round must not be committed.
        """
        if study.app is not None or study.privacy.mechanism == "none" or not event.get("round"):
            return
        mechanism = mechanism_of(study)
        assert mechanism is not None
        central = mechanism.name == _CENTRAL
        if central and event.get("void"):
            return
        sites = [] if mechanism.sampled else sorted(event["admitted"] if central else event["asked"])
        one = mechanism.release()
        self._log.note(RELEASED, {
            "study": study.name, "digest": study.digest, "run": run, "round": event["round"],
            "attempt": event["attempt"], "model": event["model"], "mechanism": mechanism.name,
            "unit": mechanism.unit, "delta": mechanism.delta, "noise_multiplier": one.noise_multiplier,
            "rate": one.rate, "count": one.count, "sites": sites,
        })  # fmt: skip

    def spent(self, study: str) -> dict[str, Any] | None:
        """What the server has published of all runs of the studies of that name: how many noised rounds, the last one's
        head, and what they promise together to a site that was in all of them. None where there is none."""
        made = [one for one in self._entries() if one["study"] == study and one["mechanism"] == _CENTRAL]
        if not made:
            return None
        releases = [Release(one["noise_multiplier"], one["rate"], one["count"]) for one in made]
        delta = max(float(one["delta"]) for one in made)
        promised = spent(releases, delta, "site", "zero out one").document()
        return {"releases": len(made), "head": made[-1]["head"], **promised}

    def of_run(self, run: str) -> dict[str, Any] | None:
        """What one run has released: how many entries, the last one's head, how often by site, and in how many a site
        may have been whose name is not noted ("any"); whether the server was restored from a backup meanwhile, so that
        what it published after the backup is not known any more. None where there is nothing."""
        made = [one for one in self._entries() if one["run"] == run]
        if not made:
            return None
        anew = [
            (site, 0, at)
            for at, one in enumerate(made)
            if one["mechanism"] == _CENTRAL
            for site in _sites(one)
        ]
        same = {
            (site, one["round"], -1) for one in made if one["mechanism"] != _CENTRAL for site in _sites(one)
        }
        by_site = Counter(site for site, _, _ in (*anew, *same))
        lost = any(entry > made[0]["entry"] for entry in self._restored)
        secret = sum(not _sites(one) for one in made)
        return {
            "entries": len(made),
            "head": made[-1]["head"],
            "sites": dict(by_site),
            "any": secret,
            "restored": lost,
        }

    def _entries(self) -> list[dict[str, Any]]:
        with self._lock:
            for entry in self._log.entries(self._read):
                self._read = entry.sequence
                if entry.kind == RELEASED:
                    self._found.append({**entry.body, "head": entry.head.text, "entry": entry.sequence})
                elif entry.kind == "restored":
                    self._restored.append(entry.sequence)
            return list(self._found)


def _sites(entry: Mapping[str, Any]) -> list[str]:
    """Whom an entry names; nobody where an earlier version wrote it."""
    return list(entry.get("sites", ()))
