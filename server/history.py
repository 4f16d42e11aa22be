"""What a run's events add up to: how each site did, and how the model scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from consortium.server.standing import NOT_NEEDED


@dataclass
class History:
    """Of one run, up to the event `last`.

    rounds, errors: by site, the last round in which it counted, and why it was left out since then.
    late: by site, how many of its answers came too late. aside: reasons by site of those set aside in the last round.
    notes: by site, what it said last beside an answer, such as how many records it skipped.
    moved: the last round that moved the model: its number, the model after it, and by site the digest of its update.
    """

    last: int = 0
    rounds: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)
    aside: Mapping[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    moved: dict[str, Any] | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Take the next event."""
        self.last = event["id"]
        if event["kind"] == "evaluation":
            self.evaluation = event
        elif event["kind"] == "late":
            self.late[event["site"]] = self.late.get(event["site"], 0) + 1
        elif event["kind"] == "round":
            self.errors.update({s: why for s, why in event["left_out"].items() if why != NOT_NEEDED})
            self.aside = event.get("aside", {})
            self.notes.update(event.get("notes", {}))
            if event["round"] and not event["void"]:
                about = {"round": event["round"], "model": event["model"]}
                self.moved = {**about, "updates": event.get("updates", {})}
            for site in event["admitted"]:
                self.errors.pop(site, None)
                if not event["void"]:
                    self.rounds[site] = event["round"]

    @property
    def sites(self) -> set[str]:
        """Every site that had a part in it."""
        return {*self.rounds, *self.errors, *self.late, *self.aside}

    def site(self, name: str, state: str) -> dict[str, Any]:
        """How a site did, as a document; its keys stay. state: how it stands now."""
        return {
            "state": "set aside" if state == "ready" and name in self.aside else state,
            "last_round": self.rounds.get(name, 0),
            "last_error": self.errors.get(name),
            "late": self.late.get(name, 0),
            "set_aside": self.aside.get(name),
            "note": self.notes.get(name),
        }
