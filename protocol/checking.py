"""Every mistake of a study document at once: keys, types and ranges by pydantic, then combinations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from consortium.protocol import privacy_checks
from consortium.protocol.errors import MOST_SHOWN, Problem, nearest
from consortium.protocol.sections import (
    FORMAT,
    MEASURES,
    REGRESSOR,
    TASKS,
    About,
    App,
    Categorical,
    Cohort,
    Data,
    Evaluation,
    Export,
    ImageData,
    ImageModel,
    Numeric,
    OwnData,
    OwnModel,
    Privacy,
    Section,
    StrategyTable,
    TabularData,
    TabularModel,
    Training,
    allowed_metrics,
)
from consortium.protocol.vocabulary import check_strategy

MOST_GROUPS = 32
"""Groups over which an exported model is compared, of all features together."""


def _models(task: object) -> tuple[dict[str, type[Section]], list[Problem]]:
    """The section models that go with a task, and what is wrong with the task's name."""
    data: type[Section] = OwnData
    model: type[Section] = OwnModel
    problems: list[Problem] = []
    if isinstance(task, str) and task.startswith("consortium."):
        if task not in TASKS:
            hint = nearest(task, TASKS)
            right = f"no such built-in task{hint} One of {', '.join(TASKS)}"
            problems.append(Problem("study.task", repr(task), right))
        data, model = (ImageData, ImageModel) if ".image:" in task else (TabularData, TabularModel)
    sections: dict[str, type[Section]] = {
        "study": About, "data": data, "model": model, "training": Training, "strategy": StrategyTable,
        "cohort": Cohort, "evaluation": Evaluation, "privacy": Privacy, "export": Export,
    }  # fmt: skip
    return sections, problems


APART = ("data", "model", "training", "strategy", "evaluation", "privacy", "export")
"""Sections that a Flower app decides by itself."""


def _of_app(document: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Problem]]:
    """The document of a study of a Flower app as one of a task, its clientapp; and what does not go with an app."""
    app, about = document.get("app"), document.get("study", {})
    if not isinstance(app, Mapping) or not isinstance(about, Mapping):
        return document, []
    right = "not with [app]: a Flower app decides that itself; its own settings stand in app.config"
    problems = [Problem(name, _short(document[name]), right) for name in APART if name in document]
    if "task" in about:
        problems.append(Problem("study.task", _short(about["task"]), "not with [app], whose clientapp it is"))
    for key in ("serverapp", "clientapp"):
        if str(app.get(key, "")).startswith("consortium."):
            problems.append(Problem(f"app.{key}", _short(app[key]), "module:name in the study's own code"))
    kept = {name: section for name, section in document.items() if name not in APART}
    return {**kept, "study": {**about, "task": app.get("clientapp", "")}}, problems


def check(document: Mapping[str, Any]) -> tuple[list[Problem], dict[str, Section]]:
    """Every problem of a study document, and its sections: complete and valid where there is no problem."""
    document, found = _of_app(document)
    about = document.get("study")
    models, problems = _models(about.get("task") if isinstance(about, Mapping) else None)
    problems += found
    known = ("format", *models, "app")
    if document.get("format") != FORMAT:
        got = repr(document.get("format", "nothing"))
        problems.insert(0, Problem("format", got, f"format = {FORMAT} would be right"))
    strange = [key for key in document if key not in known]
    for key in strange[:MOST_SHOWN]:
        right = f"no such section{nearest(key, known)} Sections: {', '.join(models)}"
        problems.append(Problem(key, _short(document[key]), right))
    problems += [Problem(key, "", "no such section") for key in strange[MOST_SHOWN:]]
    sections: dict[str, Section] = {}
    if "app" in document:
        models = {**models, "app": App}
    for name, model in models.items():
        section, found = _section(name, model, document.get(name, {}))
        problems += found
        if section is not None:
            sections[name] = section
    wrong = {problem.key for problem in problems}
    task = about.get("task") if isinstance(about, Mapping) else None
    parts: dict[str, Any] = {**sections, "task": task} if isinstance(task, str) else {**sections}
    problems += [p for p in _combinations(parts) if p.key not in wrong]
    return problems, sections


def _section(name: str, model: type[Section], table: object) -> tuple[Section | None, list[Problem]]:
    """One section as far as it is valid: keys with mistakes are reported and fall back to their defaults."""
    if not isinstance(table, Mapping):
        return None, [Problem(name, _short(table), f"a table [{name}] would be right")]
    try:
        return model.model_validate(dict(table)), []
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        problems = [_problem(name, model, detail) for detail in details[:MOST_SHOWN]]
        problems += [Problem(_key(name, detail), "", detail["msg"]) for detail in details[MOST_SHOWN:]]
        bad = {str(detail["loc"][0]) for detail in details if detail["loc"]}
        try:
            return model.model_validate({k: v for k, v in table.items() if k not in bad}), problems
        except ValidationError:
            return None, problems


def _problem(section: str, model: type[BaseModel], detail: ErrorDetails) -> Problem:
    key = _key(section, detail)
    loc = [str(part) for part in detail["loc"] if "[" not in str(part)]
    right = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        known = [k for k in model.model_fields if len(loc) == 1]
        right = f"no such key{nearest(loc[-1], known)}" + (
            f" Keys of [{section}]: {', '.join(known)}" if known else ""
        )
    elif detail["type"] == "missing":
        return Problem(key, "nothing", "this key is needed")
    elif detail["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", right)
        right += nearest(str(detail["input"]), choices)
    elif detail["type"] == "string_pattern_mismatch" and key == "study.name":
        right = "lower-case letters, digits, '.', '_' and '-', at most 64, would be right"
    elif detail["type"] == "string_pattern_mismatch":
        right = f"module:Name would be right, a built-in ({', '.join(TASKS)}) or in the study's own code"
    return Problem(key, _short(detail["input"]), right[0].lower() + right[1:])


def _key(section: str, detail: ErrorDetails) -> str:
    return ".".join([section, *(str(part) for part in detail["loc"] if "[" not in str(part))])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _combinations(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong although each key by itself is right."""
    for names, check in _CHECKS.items():
        if all(name in sections for name in names.split("+")):
            yield from check(*(sections[name] for name in names.split("+")))


def _check_strategy(strategy: StrategyTable) -> Iterator[Problem]:
    yield from check_strategy(strategy.table())


def _check_scaffold(strategy: StrategyTable, training: Training) -> Iterator[Problem]:
    if strategy.name == "scaffold" and (
        training.optimizer != "sgd" or training.momentum or training.weight_decay
    ):
        got = f"{training.optimizer}, momentum {training.momentum}, weight_decay {training.weight_decay}"
        yield Problem(
            "training.optimizer",
            got,
            "scaffold corrects plain sgd; its variates are wrong under any other rule",
        )


def _check_training(training: Training) -> Iterator[Problem]:
    if training.local_epochs is not None and training.local_steps is not None:
        yield Problem(
            "training.local_steps", str(training.local_steps), "either local_epochs or local_steps, not both"
        )
    if training.momentum and training.optimizer != "sgd":
        yield Problem(
            "training.momentum", str(training.momentum), f"momentum goes with sgd, not {training.optimizer}"
        )


def _check_cohort(cohort: Cohort) -> Iterator[Problem]:
    if cohort.spare and cohort.size is None:
        yield Problem("cohort.spare", str(cohort.spare), "cohort.size beside it: how many answers are enough")
    if cohort.sampling_rate is not None:
        if cohort.size is None:
            yield Problem(
                "cohort.size", "nothing", "a number beside cohort.sampling_rate, by which sums are divided"
            )
        if cohort.spare:
            yield Problem(
                "cohort.spare", str(cohort.spare), "0 beside cohort.sampling_rate: no answer is in excess"
            )
    elif cohort.size is not None and cohort.size < cohort.min_sites:
        yield Problem("cohort.size", str(cohort.size), f"at least cohort.min_sites ({cohort.min_sites})")


def _check_data(data: Data) -> Iterator[Problem]:
    if not isinstance(data, TabularData):
        return
    for name, feature in data.features.items():
        if isinstance(feature, Numeric) and not feature.min < feature.max:
            yield Problem(f"data.features.{name}", f"min {feature.min}, max {feature.max}", "min below max")
        if isinstance(feature, Categorical) and len(set(feature.values)) < len(feature.values):
            yield Problem(f"data.features.{name}.values", _short(feature.values), "each value once")
    for key in ("target", "person", "split"):
        column = getattr(data, key)
        if column is not None and column in data.features:
            right = f"a column that is not also a feature: the {key} must not be learnt from"
            yield Problem(f"data.{key}", repr(column), right)
    if "holdout" in data.model_fields_set and data.split is not None:
        yield Problem("data.holdout", str(data.holdout), "either holdout or split, not both")


def _check_target(task: str, data: Data) -> Iterator[Problem]:
    if task == REGRESSOR and isinstance(data, TabularData):
        if data.target_range is None:
            right = "{ min = ..., max = ... } of the target, in its unit, is needed for regression"
            yield Problem("data.target_range", "nothing", right)
        elif not data.target_range.min < data.target_range.max:
            yield Problem("data.target_range", _short(data.target_range), "min below max")


def _check_metric(task: str, data: Data, evaluation: Evaluation) -> Iterator[Problem]:
    metric = evaluation.metric
    if task in TASKS and metric:
        allowed = allowed_metrics(task, data)
        if metric not in allowed:
            hint = nearest(metric, MEASURES) if metric not in MEASURES else ""
            yield Problem(
                "evaluation.metric", repr(metric), f"for this task one of {', '.join(allowed)}{hint}"
            )
    features = getattr(data, "features", {})
    listed = {name: one for name, one in features.items() if isinstance(one, Categorical)}
    for name in evaluation.groups:
        if name not in listed or evaluation.groups.count(name) > 1 or task not in TASKS:
            right = f"categorical features, each once, would be right: {', '.join(listed) or 'this study has none'}"
            yield Problem("evaluation.groups", repr(name), right)
    if sum(len(listed[name].values) for name in evaluation.groups if name in listed) > MOST_GROUPS:
        yield Problem("evaluation.groups", _short(evaluation.groups), f"at most {MOST_GROUPS} groups in all")
    if evaluation.groups and evaluation.auroc == "exact":
        yield Problem(
            "evaluation.groups", _short(evaluation.groups), 'needs auroc = "binned": groups are counted'
        )
    if evaluation.select == "best" and data.holdout == 0 and data.split is None and task in TASKS:
        right = "with data.holdout = 0 there is nothing to choose by; 'last' would be right"
        yield Problem("evaluation.select", "'best'", right)


_CHECKS: dict[str, Any] = {
    "strategy": _check_strategy,
    "strategy+training": _check_scaffold,
    "training": _check_training,
    "cohort": _check_cohort,
    "data": _check_data,
    "task+data": _check_target,
    "task+data+evaluation": _check_metric,
    **privacy_checks.CHECKS,
}
