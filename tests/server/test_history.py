"""What a run's events add up to, by site, and how they read on one line."""

from __future__ import annotations

from typing import Any

import pytest

from consortium.server.history import History
from consortium.server.standing import NOT_NEEDED
from consortium.server.study_cli import line

ROUND: dict[str, Any] = {
    "kind": "round", "round": 1, "attempt": 0, "asked": ["a", "b", "c"], "admitted": {"a": 1.0}, "left_out": {},
    "model": "m", "seconds": 0.5, "void": "", "unseen": 0, "aside": {}, "notes": {},
}  # fmt: skip


def history(*events: dict[str, Any]) -> History:
    found = History()
    for number, event in enumerate(events):
        found.add({"id": number + 1, **event})
    return found


def test_each_site_is_shown_with_all_that_it_did() -> None:
    """Counted, failed, late, set aside, not needed: each in its own place; what is over leaves no error behind."""
    one = history(
        {
            **ROUND,
            "left_out": {"b": "declined: no", "c": NOT_NEEDED},
            "notes": {"a": "skipped 1 of 9 records"},
        },
        {"kind": "late", "site": "c", "asked": "train", "round": 1, "attempt": 0},
        {**ROUND, "round": 2, "admitted": {"a": 1.0, "c": 1.0}, "aside": {"b": "set aside after 3"}},
    )
    assert one.site("a", "working") == {
        "state": "working", "last_round": 2, "last_error": None, "late": 0, "set_aside": None,
        "note": "skipped 1 of 9 records",
    }  # fmt: skip
    about = one.site("b", "ready")
    assert (about["state"], about["last_error"], about["set_aside"]) == (
        "set aside", "declined: no", "set aside after 3",
    )  # fmt: skip
    about = one.site("c", "not connected")
    assert (about["state"], about["last_round"], about["late"], about["last_error"]) == (
        "not connected", 2, 1, None,
    )  # fmt: skip
    assert one.sites == {"a", "b", "c"}


def test_a_void_round_counts_for_nobody() -> None:
    """A valid answer to it clears the site's error, and moves nothing."""
    one = history(
        {**ROUND, "left_out": {"b": "x"}}, {**ROUND, "round": 2, "admitted": {"b": 1.0}, "void": "1 of 2"}
    )
    assert (one.site("b", "ready")["last_round"], one.site("b", "ready")["last_error"]) == (0, None)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({**ROUND, "left_out": {"b": "silent"}}, "round 1: 1 of 3 answers, 0.50 s; left out: b (silent)"),
        ({**ROUND, "aside": {"c": "set aside after 3 failures"}}, "; c is set aside after 3 failures"),
        ({**ROUND, "notes": {"a": "skipped 1 of 9 records"}}, "; a skipped 1 of 9 records"),
        ({"kind": "late", "site": "c", "round": 7}, "late: c's answer to round 7 came after the round was closed"),
        ({"kind": "state", "state": "round voided", "why": "round 2: 0 of 3"}, "round voided: round 2: 0 of 3"),
    ],
)  # fmt: skip
def test_an_event_is_one_line(event: dict[str, Any], words: str) -> None:
    """Whatever happened to whom is said."""
    assert words in line(event)


def test_the_digests_of_the_last_updates_are_shown() -> None:
    """Of the last round that moved the model, not of one that was void; events of earlier versions have none."""
    moved = {**ROUND, "updates": {"a": "0" * 64}}
    one = history(moved, {**ROUND, "round": 2, "void": "too few", "updates": {"a": "1" * 64}})
    assert one.moved == {"round": 1, "model": "m", "updates": {"a": "0" * 64}}
    assert history(ROUND).moved == {"round": 1, "model": "m", "updates": {}}
    assert history({**moved, "round": 0}).moved is None
