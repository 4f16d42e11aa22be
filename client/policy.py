"""What may run at this site without asking: `policy.toml`, written by the site's operator alone. Default: nothing.

    format = 1

    [[allow]]
    task = "consortium.client.tasks.tabular:Classifier"   # one of Consortium's own tasks
    data = "patients"                                      # a data set of `consortium client data list`
    studies = ["heart-*"]                                  # only studies of such names; all where left out
    rounds = 200                                           # only studies of at most so many rounds
    epsilon = 3.0                                          # the most that one study may spend, all its runs together

A model that is to be promoted is judged on the held-out rows of whatever data its study may use here; `gates = false`
refuses that. Code that a study brings is never allowed here: its operator reviews and approves each such study as it is
(`consortium client review`).
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consortium.protocol.errors import InputError, RefusedError, nearest
from consortium.protocol.files import write_private
from consortium.protocol.sections import TASKS
from consortium.protocol.study import Study

TEMPLATE = """\
# What may run at this site. Nothing, until you allow it here; the agent reads this file before each instruction.
format = 1

# gates = false            # judge no model on this site's data before it is promoted

# [[allow]]
# task = "consortium.client.tasks.tabular:Classifier"
# data = "patients"          # see: consortium client data list
# studies = ["heart-*"]      # names of studies; all where left out
# rounds = 200               # most rounds of one study; any number where left out
# epsilon = 3.0              # most that one study may spend; then only studies with differential privacy
"""


class Rule(BaseModel):
    """[[allow]]: one task over one data set."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    task: str
    data: str
    studies: list[str] | None = None
    rounds: Annotated[int, Field(ge=1)] | None = None
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def names(self, study: Study) -> bool:
        """Whether the study's name is one of the rule's."""
        return self.studies is None or any(fnmatchcase(study.name, pattern) for pattern in self.studies)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: Literal[1]
    gates: bool = True
    allow: list[Rule] = []


@dataclass(frozen=True)
class Policy:
    """The rules, in the file's order; the first that fits decides which data are used. gates: whether models that are
    to be promoted are judged here."""

    rules: tuple[Rule, ...] = ()
    gates: bool = True

    def rule_for(self, study: Study) -> Rule:
        """The rule under which a study may run.

        Raises:
            RefusedError: there is none; the text names the rule that is missing, and no path, column or data set.
        """
        if not study.built_in:
            raise RefusedError(
                f"policy: study '{study.name}' brings code of its own, and the site's operator has not approved it"
            )
        rules = [rule for rule in self.rules if rule.task == study.task]
        if not rules:
            raise RefusedError(f'policy: there is no [[allow]] of task = "{study.task}"')
        named = [rule for rule in rules if rule.names(study)]
        if not named:
            raise RefusedError(
                f"policy: no [[allow]] of task = \"{study.task}\" has the name '{study.name}' among its studies"
            )
        short = [rule for rule in named if rule.rounds is None or study.rounds <= rule.rounds]
        for rule in short:
            if rule.epsilon is None or not beyond(study, rule.epsilon):
                return rule
        if short:
            limit = max(rule.epsilon or 0.0 for rule in short)
            raise RefusedError(
                f"policy: [[allow]] has epsilon = {limit:g}, and study '{study.name}' {beyond(study, limit)}"
            )
        most = max(rule.rounds or 0 for rule in named)
        raise RefusedError(
            f"policy: [[allow]] has rounds = {most}, and study '{study.name}' has {study.rounds}"
        )


def beyond(study: Study, epsilon: float) -> str:
    """Why a study does not fit a limit of epsilon; empty where one run of it does."""
    asked = study.privacy.epsilon
    if study.privacy.mechanism == "none" or asked is None:
        return "asks for no differential privacy, so that nothing bounds what it spends"
    if not 0 < epsilon < math.inf:
        return f"asks for {asked:g}, where a number above 0 would be right"
    return f"asks for {asked:g}" if asked > epsilon else ""


def load(path: Path) -> Policy:
    """The policy in a file; where there is none, nothing is allowed.

    Raises:
        InputError: it cannot be read, is not TOML, or has mistakes (all of them).
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Policy()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read; correct its permissions, or write it again") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is not valid TOML: {error}; correct that line") from error
    problems: list[str] = []
    rules: list[Rule] = []
    gates = True
    try:
        found = _File.model_validate(document)
        rules, gates = found.allow, found.gates
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in one['loc'])}: {one['msg'][0].lower()}{one['msg'][1:]}"
            for one in error.errors(include_input=False, include_url=False)
        ]
    problems += [
        f"allow.{number}.task: is none of Consortium's own tasks{nearest(rule.task, TASKS) or '; one of them'}: "
        f"{', '.join(TASKS)}"
        for number, rule in enumerate(rules)
        if rule.task not in TASKS
    ]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise InputError(f"{path}: has mistakes, so nothing is allowed\n{lines}\nCorrect the file")
    return Policy(tuple(rules), gates)


def write_template(path: Path) -> None:
    """Put a policy that allows nothing, and says how to allow something, where there is none."""
    if not path.exists():
        write_private(path, TEMPLATE.encode())
