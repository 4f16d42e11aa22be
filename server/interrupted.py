"""One exchange as it is asked, in a form that outlives the run's process: what an interrupted one goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import Ask
from consortium.server.records import RunState
from consortium.server.standing import Cohort

MOST_NONCES = 64
"""How often one exchange is interrupted before answers to its first form count no more."""


@dataclass(frozen=True)
class Asked:
    """Who is asked what.

    round, attempt, kind, model: as in the instruction. nonces: of the cohort, the one of now last; the others were
        asked with before an interruption, and answers to them count.
    """

    round: int
    attempt: int
    kind: Ask
    model: str
    cohort: Cohort
    nonces: tuple[str, ...]

    def is_of(self, state: RunState, kind: Ask) -> bool:
        """Whether this is what follows on `state`: nothing was committed since."""
        model = "" if kind == "query" else state.digest
        right = (state.round + (kind == "train"), state.attempt, kind, model)
        return (self.round, self.attempt, self.kind, self.model) == right

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        found = asdict(self)
        return {**found, "cohort": {**found["cohort"], "sites": list(self.cohort.sites)}}

    @staticmethod
    def parse(document: Mapping[str, Any]) -> Asked:
        """What `document` gave.

        Raises:
            IntegrityError: it is something else.
        """
        try:
            of = document["cohort"]
            cohort = Cohort([str(one) for one in of["sites"]], of["enough"], dict(of["aside"]))
            nonces = tuple(str(one) for one in document["nonces"])[-MOST_NONCES:]
            at = int(document["round"]), int(document["attempt"])
            return Asked(*at, document["kind"], str(document["model"]), cohort, nonces)
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"what was asked last is malformed ({type(error).__name__})") from error


Begins = Callable[[Asked], None]
"""Told of each exchange before it is asked."""
