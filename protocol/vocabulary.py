"""The strategies that a study can name, as plain data: parameters, defaults, ranges.

The study's schema checks a [strategy] table with it without importing `consortium.strategies`, which adds the
functions themselves, papers and costs (`consortium.strategies.catalogue`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from consortium.protocol.errors import MOST_SHOWN, Problem, nearest


@dataclass(frozen=True)
class Parameter:
    """One parameter of a strategy.

    type: "float" takes whole numbers too; "int" and "float" take no booleans.
    default: used where the study leaves it out; None, which a study cannot write, is what `meaning` says.
    minimum, maximum: the range, None where open; with `above` (`below`) the bound itself is outside.
    """

    name: str
    type: Literal["bool", "int", "float"]
    default: bool | int | float | None
    meaning: str
    minimum: float | None = None
    maximum: float | None = None
    above: bool = False
    below: bool = False

    @property
    def range(self) -> str:
        """What is right, in words: "a number above 0"."""
        if self.type == "bool":
            return "true or false"
        bounds = []
        if self.minimum is not None:
            bounds.append(f"{'above' if self.above else 'at least'} {self.minimum:g}")
        if self.maximum is not None:
            bounds.append(f"{'below' if self.below else 'at most'} {self.maximum:g}")
        kind = "a whole number" if self.type == "int" else "a number"
        return f"{kind} {' and '.join(bounds)}".rstrip()

    def allows(self, value: object) -> bool:
        """Whether `value` has the type and lies in the range; None is allowed where it is the default."""
        if value is None:
            return self.default is None
        if self.type == "bool" or isinstance(value, bool):
            return self.type == "bool" and isinstance(value, bool)
        if not isinstance(value, int if self.type == "int" else int | float):
            return False
        if not abs(value) <= sys.float_info.max:  # NaN, infinity, and whole numbers that no float holds
            return False
        low, high = self.minimum, self.maximum
        return (low is None or value > low or (value == low and not self.above)) and (
            high is None or value < high or (value == high and not self.below)
        )


@dataclass(frozen=True)
class StrategySpec:
    """A strategy's name and parameters."""

    name: str
    parameters: tuple[Parameter, ...]

    def problems(self, values: Mapping[str, object]) -> list[Problem]:
        """What is wrong with parameters by name; keys of the problems are `strategy.<parameter>`."""
        known = {parameter.name: parameter for parameter in self.parameters}
        found: list[Problem] = []
        for name, value in values.items():
            if name not in known:
                hint = (nearest(name, known) if len(found) < MOST_SHOWN else "") or "."
                right = f"'{self.name}' has no such parameter{hint} It takes {', '.join(known)}"
                found.append(Problem(f"strategy.{name}", repr(value), right))
            elif not known[name].allows(value):
                found.append(Problem(f"strategy.{name}", repr(value), f"{known[name].range} would be right"))
        return found


def _server_lr(default: float) -> Parameter:
    return Parameter("server_lr", "float", default, "the server's learning rate", 0.0, above=True)


def _weighted(default: bool) -> Parameter:
    meaning = "whether a site counts by its weight (examples, capped by the study), or all sites alike"
    return Parameter("weighted", "bool", default, meaning)


_MU = Parameter("mu", "float", 0.01, "weight of the proximal term mu/2 * ||w - w_global||^2", 0.0)
_MOMENTUM = Parameter("momentum", "float", 0.9, "decay of the server's momentum (beta)", 0.0, 1.0, below=True)
_BETA1 = Parameter("beta1", "float", 0.9, "decay of the first moment", 0.0, 1.0, below=True)
_BETA2 = Parameter(
    "beta2", "float", 0.999, "decay of the second moment (the paper: 0.99)", 0.0, 1.0, below=True
)
_TAU = Parameter("tau", "float", 1e-8, "added to the root of the second moment (the paper: 1e-3)", 1e-12)
_TRIM = Parameter("trim", "int", 1, "how many values are cut at each end, for each coordinate by itself", 0)
_BYZANTINE = Parameter("byzantine", "int", 1, "how many sites may lie (f); at least 2f + 3 must answer", 0)
_KEEP = Parameter("keep", "int", None, "how many updates are averaged; left out: answers - byzantine - 2", 1)

STRATEGIES: tuple[StrategySpec, ...] = (
    StrategySpec("fedavg", (_server_lr(1.0), _weighted(True))),
    StrategySpec("fedavgm", (_server_lr(1.0), _MOMENTUM, _weighted(True))),
    StrategySpec("fedprox", (_MU, _server_lr(1.0), _weighted(True))),
    StrategySpec("fedadam", (_server_lr(0.01), _BETA1, _BETA2, _TAU, _weighted(True))),
    StrategySpec("fedadagrad", (_server_lr(0.01), _BETA1, _TAU, _weighted(True))),
    StrategySpec("fedyogi", (_server_lr(0.01), _BETA1, _BETA2, _TAU, _weighted(True))),
    StrategySpec("scaffold", (_server_lr(1.0), _weighted(False))),
    StrategySpec("fedmedian", (_server_lr(1.0),)),
    StrategySpec("fedtrimmedmean", (_TRIM, _server_lr(1.0))),
    StrategySpec("krum", (_BYZANTINE, _server_lr(1.0))),
    StrategySpec("multikrum", (_BYZANTINE, _KEEP, _server_lr(1.0))),
)


def check_strategy(table: Mapping[str, Any]) -> list[Problem]:
    """Every mistake in a study's [strategy] table: `name` and parameters by name.

    A strategy of the study's own code, `name = "module:function"`, takes what parameters it likes.
    """
    specs = {spec.name: spec for spec in STRATEGIES}
    name = table.get("name")
    if not isinstance(name, str):
        right = f'one of {", ".join(specs)}, or "module:function" of your own would be right'
        return [Problem("strategy.name", "nothing" if name is None else repr(name), right)]
    if ":" in name:
        module, _, function = name.partition(":")
        if all(part.isidentifier() for part in (*module.split("."), function)):
            return []
        right = '"module:function" of the study\'s own code would be right'
        return [Problem("strategy.name", repr(name), right)]
    if name not in specs:
        right = f"no such strategy{nearest(name, specs) or '.'} One of {', '.join(specs)}"
        return [Problem("strategy.name", repr(name), right)]
    return specs[name].problems({key: value for key, value in table.items() if key != "name"})
