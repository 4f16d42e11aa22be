"""A clock that was set back: what an operator limited by days would hold longer, so it does not hold at all.

What is compared is the latest time that the site has acted at, by its own clock: in instructions that it accepted
(`client/seen.py`), and in the entries of its logs. Charges do not depend on any clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Annotated

import typer

from consortium.client.home import Home
from consortium.client.seen import Seen
from consortium.protocol.chain import Entry
from consortium.protocol.errors import RefusedError

BACK = 3600.0
"""Seconds that a clock may go back: it was a little fast, or in another zone."""

WasAhead = Annotated[
    bool,
    typer.Option(
        "--clock-was-ahead",
        help="The clock is right now, and was ahead when the site last acted; else a clock set back is refused.",
    ),
]


def why_not(now: float, latest: float) -> str:
    """What is wrong with a clock that says `now` where the site has acted at `latest`, seconds since the epoch; "" for
    nothing."""
    if now >= latest - BACK:
        return ""
    return (
        f"this machine's clock says {_said(now)}, and this site has acted at {_said(latest)}: it was set back"
    )


def check(now: float, latest: float, was_ahead: bool, what: str) -> None:
    """Refuse a command whose effect depends on the time.

    Raises:
        RefusedError: the clock was set back, and the operator does not say that it was ahead before.
    """
    why = why_not(now, latest)
    if why and not was_ahead:
        raise RefusedError(
            f"{what}: {why}. Set the clock right and type this again; if it is right now, and was ahead then, add "
            "--clock-was-ahead"
        )


def latest_of(home: Home, *logs: Iterable[Entry]) -> float:
    """The latest time at which a site has acted, as its folder tells; 0 where it never has.

    logs: entries of its own logs.
    """
    times = [entry.at for log in logs for entry in log]
    return max([*times, Seen(home.seen_file).latest], default=0.0)


def _said(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
