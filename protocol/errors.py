"""The one tree of errors that people see, and the exit code of each.

    ConsortiumError                     1  failed
    ├── InputError                      2  wrong usage or bad input: a file, a table, an option
    │   └── StudyError                  2  every mistake of a study file at once
    ├── RefusedError                    3  a policy, a budget or an approval says no
    └── IntegrityError                  4  a signature, hash or audit check failed

A message says which site, file or key, what was wrong, and what to type next. It never holds a secret or a
record. Anything else that reaches the command line is a fault of ours and is reported as such.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class ConsortiumError(Exception):
    """Something that the person at the terminal can act upon."""

    exit_code = 1


class InputError(ConsortiumError):
    """A file, table, option or value that the user gave is wrong."""

    exit_code = 2


class RefusedError(ConsortiumError):
    """A policy, budget or approval forbids what was asked."""

    exit_code = 3


class IntegrityError(ConsortiumError):
    """A signature, hash or audit check failed: what was received or stored is not what was sent or written."""

    exit_code = 4


MOST_SHOWN = 25
"""Mistakes of one file that are shown, and looked into; of more it is said how many there are."""
_LONGEST = 100
"""Characters of a key that are shown, and for which a similar one is looked for."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a study file: the dotted `key`, the value `got`, and what would be right."""

    key: str
    got: str
    right: str

    def __str__(self) -> str:
        key = self.key if len(self.key) <= _LONGEST else f"{self.key[:_LONGEST]}..."
        return f"{key}: got {self.got}; {self.right}"


class StudyError(InputError):
    """All mistakes of one study file.

    `problems` holds one `Problem` a mistake, in the order of the file's sections; the text has the first `MOST_SHOWN`.
    """

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = f"{len(self.problems)} mistake" + ("s" if len(self.problems) != 1 else "")
        shown = [str(problem) for problem in self.problems[:MOST_SHOWN]]
        if len(self.problems) > MOST_SHOWN:
            shown.append(f"and {len(self.problems) - MOST_SHOWN} more")
        lines = "\n".join(f"  {line}" for line in shown)
        super().__init__(
            f"{source}: {count}\n{lines}\nCorrect the file, then: consortium study check {source}"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint ", did you mean 'x'?" for the known name closest to `name`, or an empty string."""
    if len(name) > _LONGEST:
        return ""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean '{matches[0]}'?" if matches else ""
