"""The strategy that a study chooses: a named one, or a function of the study's own code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from consortium.protocol.code import load
from consortium.protocol.errors import InputError
from consortium.protocol.study import Study
from consortium.strategies.base import Strategy, everyone, fixed_size, poisson
from consortium.strategies.catalogue import build


def strategy_of(study: Study) -> Strategy:
    """The study's strategy, with [cohort] size applied where it chooses no cohort itself.

    Raises:
        InputError: the study's code has no such function, or it returns no `Strategy`.
    """
    table = study.strategy.table()
    name = table["name"]
    if ":" in name:
        parameters = {key: value for key, value in table.items() if key != "name"}
        strategy = _called(name, load(name, study.folder), parameters)
        if not isinstance(strategy, Strategy):
            raise InputError(
                f"{name}: returned {type(strategy).__name__}, not a consortium.strategies.Strategy"
            )
    else:
        strategy = build(table, study.name)
    if study.privacy.mechanism == "central-gaussian" and strategy.reducer.sensitivity(2) is None:
        raise InputError(
            f"{name}: its reducer states no sensitivity, so noise at the server would protect nobody; give it one, or "
            'use privacy.mechanism = "dp-sgd" or "local-gaussian"'
        )
    if study.privacy.mechanism in ("central-gaussian", "local-gaussian") and strategy.local.control_variates:
        raise InputError(f'{name}: control variates would need noise of their own; use mechanism = "dp-sgd"')
    if study.cohort.sampling_rate is not None:
        if strategy.selector is not everyone:
            raise InputError(
                f"{name}: chooses cohorts of its own; leave out cohort.sampling_rate, or let it ask all"
            )
        if not _sums(strategy):
            raise InputError(
                f"{name}: its reducer is no plain mean of bounded updates, so one that is not drawn would not count as "
                "zero; with cohort.sampling_rate use fedavg with weighted = false, or another mean"
            )
        return replace(strategy, selector=poisson(study.cohort.sampling_rate))
    if study.cohort.size is not None and strategy.selector is everyone:
        strategy = replace(strategy, selector=fixed_size(study.cohort.size))
    return strategy


def _sums(strategy: Strategy) -> bool:
    """Whether the reducer is a sum over the number of updates, each at most as long as it was."""
    reducer = strategy.reducer
    return reducer.scale is not None and all(reducer.sensitivity(n) == 1 / n for n in (1, 2, 7))


def _called(name: str, function: Any, parameters: Mapping[str, Any]) -> Any:
    if not callable(function):
        raise InputError(f"{name}: is no function; write one that returns a consortium.strategies.Strategy")
    try:
        inspect.signature(function).bind(**parameters)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}; correct [strategy] in the study, or the function") from error
    try:
        return function(**parameters)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name}: the study's code fails: {type(error).__name__}: {error}") from error
