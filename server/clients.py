"""The only way out of the round loop: what the coordinator knows of the sites.

`server/grid.py` implements it over Flower, `consortium.simulations` by function call and by processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from consortium.protocol.messages import Answer, Instruction
from consortium.server.admission import Admitted
from consortium.strategies.base import BlockSum


@dataclass(frozen=True)
class Block:
    """Answers that were gated, and perhaps summed, where they were made (`consortium.simulations`).

    Only our own processes make these, through the same `Gate`; nothing that a site sends becomes one.

    admitted: the members' answers, without vectors where they are summed. left_out: reasons by site.
    shared: a sum of updates: the members', or, without members, that over several blocks, folded in block order. None
        where all were left out, each brings its own, or their sum comes in another. control: the same for SCAFFOLD.
    """

    admitted: Sequence[Admitted]
    left_out: Mapping[str, str]
    shared: BlockSum | None
    control: BlockSum | None = None


class Clients(Protocol):
    """The sites, as the round loop sees them."""

    def sites(self) -> Sequence[str]:
        """Names of the sites at hand, sorted."""

    def ask(self, sites: Sequence[str], instruction: Instruction) -> None:
        """Send `instruction.to(site)` to each; returns at once. The vectors may be reused after the answers."""

    def answers(self, deadline: float) -> Iterator[Answer | Block]:
        """What comes back, in any order, until all have answered or the clock passes `deadline` (seconds since
        the epoch). Late, repeated and invalid answers may be among them."""

    def wait(self, sites: Sequence[str]) -> bool:
        """Wait until more of the named sites are at hand, where none is named until any other is; False where that
        can never be (then the run ends)."""
