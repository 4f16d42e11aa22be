"""How a run can stand: the words that the database, the commands, JSON, logs and whoever counts them share.

proposed                submitted, and not started
waiting for approvals   of the sites: nothing of it runs before
waiting for sites       too few are at hand; why: which are, and which are away since when
running                 rounds are under way
paused                  by the admin; the exchange under way ended
round voided            the last attempt moved nothing (why), and there is another
finished                all rounds are committed
finished early          some are, and then there was no quorum any more (why)
failed                  no model, or a fault (why); `study resume` goes on from the last commit
stopped                 by the admin; what was committed stays
"""

from __future__ import annotations

PROPOSED, APPROVALS, WAITING = "proposed", "waiting for approvals", "waiting for sites"
RUNNING, PAUSED, VOIDED = "running", "paused", "round voided"
FINISHED, EARLY, FAILED, STOPPED = "finished", "finished early", "failed", "stopped"
STATES = (PROPOSED, APPROVALS, WAITING, RUNNING, PAUSED, VOIDED, FINISHED, EARLY, FAILED, STOPPED)
OVER = (FINISHED, EARLY, FAILED, STOPPED)
"""States in which nothing of a run is under way."""
