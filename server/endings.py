"""Which of the runs that a site keeps something of have ended, and in what way (`protocol/endings.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from consortium.protocol.endings import FAILED as MAY_GO_ON
from consortium.protocol.endings import OVER as FOR_GOOD
from consortium.server.archive import Archive
from consortium.server.states import FAILED, OVER


def word(archive: Archive, run: str) -> str:
    """What a site is told of a run; "" where it is under way, or unknown here: then everything of it stays there."""
    found = archive.run(run)
    if found is None or found.state not in OVER:
        return ""
    return MAY_GO_ON if resumable(archive, run) else FOR_GOOD


def resumable(archive: Archive, run: str) -> bool:
    """Whether a run has failed and can go on: something was committed, and its study has no newer run."""
    found = archive.run(run)
    if found is None or found.state != FAILED or archive.committed(run) is None:
        return False
    latest = archive.latest(found.study)
    return latest is not None and latest.name == run


def news(archive: Archive, kept: Mapping[str, str]) -> dict[str, str]:
    """The words for runs of which the site was told another. kept: what it was told, by run, "" for nothing."""
    words = {run: word(archive, run) for run in kept}
    return {run: now for run, now in words.items() if now and now != kept[run]}
