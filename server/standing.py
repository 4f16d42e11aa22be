"""Who is set aside: a site that fails again and again is left in peace for a while, and then asked again.

A silent site costs every round its whole deadline. After `failures` in a row (no answer in time, or none that counts) a
site is not asked in the next 2 exchanges; then it is, and where it fails once more it rests for 4, 8 ... at most
`LONGEST` exchanges. One answer that counts, and all is forgotten. Pure, and all of it follows from a run's records: it
is the same after a restart of the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from consortium.server.records import Round

FAILURES = 3
"""In a row, after which a live run sets a site aside."""
LONGEST = 64
NOT_NEEDED = "not needed: enough others answered first"
"""Why a site's answer was not waited for; it is no failure."""


@dataclass(frozen=True)
class Standing:
    """failures: in a row. reason: of the last. rest: exchanges in which the site is not asked from now on."""

    failures: int = 0
    reason: str = ""
    rest: int = 0

    @property
    def why(self) -> str:
        """Why it rests, for people."""
        return f"set aside after {self.failures} failures in a row, asked again in {self.rest} rounds: {self.reason}"


Standings = Mapping[str, Standing]
"""Of the sites that failed lately."""


@dataclass(frozen=True)
class Cohort:
    """Who is asked in one exchange.

    enough: with so many valid answers the others are not waited for; None: all are. aside: reasons by site of those who
        are at hand, but not asked.
    """

    sites: Sequence[str]
    enough: int | None = None
    aside: Mapping[str, str] = field(default_factory=dict)


def standings(rounds: Iterable[Round], failures: int, before: Standings | None = None) -> Standings:
    """How sites stand after `rounds`, which follow on those that led to `before`. failures: 0 sets nobody aside."""
    found = dict(before or {})
    if not failures:
        return found
    for record in rounds:
        for site in record.admitted:
            found.pop(site, None)
        for site, reason in record.left_out.items():
            if reason != NOT_NEEDED:
                count = found.get(site, Standing()).failures + 1
                rest = min(LONGEST, 2 ** min(count - failures + 1, 30)) if count >= failures else 0
                found[site] = Standing(count, reason, rest)
        for site in record.aside:
            if site in found:
                found[site] = replace(found[site], rest=found[site].rest - 1)
    return found


def aside(known: Standings, sites: Sequence[str], least: int) -> dict[str, str]:
    """Which of the sites at hand are not asked now, and why. Nobody is, where fewer than `least` would be left."""
    found = {site: known[site].why for site in sites if site in known and known[site].rest > 0}
    return found if len(sites) - len(found) >= least else {}
