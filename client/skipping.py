"""Records that cannot be read: where a study tolerates a share of them, they are skipped and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

NO_VALUE, NO_NUMBER, NO_CODE = "without a value", "not a finite number", "coded in an unknown way"
OUTSIDE, CELLS, NO_IMAGE = (
    "outside the study's range",
    "of more or fewer cells than the header",
    "not decodable",
)
"""Why a record is skipped, in words that name no column, file or cell: a site's answer carries them."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with a column. text: in words. rows: (n,) True where; None: with the whole column. why: of those
    above."""

    text: str
    rows: NDArray[np.bool_] | None = None
    why: str = ""


@dataclass(frozen=True)
class Skipped:
    """How many of a site's `total` records were skipped, by reason; a record counts for its first one."""

    total: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Records in all."""
        return sum(self.reasons.values())

    def __str__(self) -> str:
        if not self.count:
            return ""
        reasons = ", ".join(f"{count} {why}" for why, count in self.reasons.items())
        return f"skipped {self.count} of {self.total} records: {reasons}"


def skippable(
    faults: Sequence[Fault], rows: int, tolerance: float, before: int = 0
) -> NDArray[np.bool_] | None:
    """Which of the rows (n,) to skip; None where faults are of more than rows, or of more than the tolerated share.

    before: rows that were skipped before, beside these.
    """
    masks = [fault.rows for fault in faults if fault.rows is not None]
    if len(masks) < len(faults):
        return None
    bad = np.zeros(rows, np.bool_)
    for mask in masks:
        bad |= mask
    tolerated = bad.sum() + before <= tolerance * (rows + before) and bad.sum() < rows
    return bad if tolerated else None


def counted(faults: Sequence[Fault], rows: int, before: Mapping[str, int]) -> Skipped:
    """The count of what `skippable` skips. before: rows that were skipped before, by reason."""
    reasons, seen = dict(before), np.zeros(rows, np.bool_)
    for fault in faults:
        assert fault.rows is not None
        new = int((fault.rows & ~seen).sum())
        seen |= fault.rows
        if new:
            reasons[fault.why] = reasons.get(fault.why, 0) + new
    return Skipped(rows + sum(before.values()), reasons)
