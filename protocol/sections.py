"""The sections of a study file: their keys, types, ranges and defaults. `protocol.study` puts them together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

FORMAT = 1
BUILT_IN = "consortium.client.tasks."
CLASSIFIER = BUILT_IN + "tabular:Classifier"
REGRESSOR = BUILT_IN + "tabular:Regressor"
IMAGES = BUILT_IN + "image:Classifier"
TASKS = (CLASSIFIER, REGRESSOR, IMAGES)
MEASURES = ("accuracy", "auroc", "log_loss", "brier", "rmse")
LOWER_IS_BETTER = ("log_loss", "brier", "rmse", "loss")

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: object) -> float:
    """Seconds of a duration such as "90s", "10m", "2h" or "1d"; a bare number is seconds.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        return float(text)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text) if isinstance(text, str) else None
    if match is None:
        raise ValueError('a duration such as "90s", "10m" or "2h" would be right')
    return float(match[1]) * _SECONDS[match[2]]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class OwnSection(Section):
    model_config = ConfigDict(extra="allow")

    def __getitem__(self, key: str) -> Any:
        """A value that only the study's own task knows."""
        return (self.__pydantic_extra__ or {})[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` where the study does not set it."""
        return (self.__pydantic_extra__ or {}).get(key, default)


Reference = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""module:Name, in Consortium or in the study's own code."""


class About(Section):
    """[study]"""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    task: Reference  # of a Flower app, its clientapp
    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class App(Section):
    """[app]: a Flower app in place of a task. config: its run config; rounds, sites and deadlines are the study's."""

    serverapp: Reference
    clientapp: Reference
    config: Annotated[dict[str, bool | int | float | str], Field(max_length=1000)] = {}


class Numeric(Section):
    """A numeric column: values are clipped to [min, max], in the study's unit."""

    min: float
    max: float


class Categorical(Section):
    """A column of codes: one-hot over `values`, in this order; a value not listed is all zeros."""

    values: Annotated[list[str], Field(min_length=1, max_length=1000)]


def _feature(value: object) -> object:
    if isinstance(value, Mapping):
        return Categorical.model_validate(value) if "values" in value else Numeric.model_validate(value)
    raise ValueError("{ min = ..., max = ... } or { values = [...] } would be right")


Feature = Annotated[Numeric | Categorical, BeforeValidator(_feature)]


class Data(Section):
    """[data], what every task has: a share held out for evaluation, or a column that says `train` or `test`.

    tolerance: the share of a site's records that may be unreadable; they are skipped and counted. Beyond it, and where
        it is 0, the site declines.
    """

    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    split: str | None = None


class TabularData(Data):
    """[data] of the tabular tasks."""

    target: str
    features: Annotated[dict[str, Feature], Field(min_length=1)]
    classes: Annotated[int, Field(ge=2, le=1000)] = 2
    target_range: Numeric | None = None
    missing: Literal["median", "refuse"] = "median"
    person: str | None = None


class ImageData(Data):
    """[data] of the image task: `shape` is height, width, channels."""

    shape: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=3, max_length=3)]
    classes: Annotated[int, Field(ge=2, le=100_000)]


class OwnData(OwnSection, Data):
    """[data] of a study's own task: anything beside the common keys."""

    model_config = ConfigDict(extra="allow")


class TabularModel(Section):
    """[model] of the tabular tasks: widths of the hidden layers; none is a linear model."""

    hidden: list[Annotated[int, Field(ge=1, le=65536)]] = []
    dtype: Literal["float32", "float64"] = "float32"


class ImageModel(Section):
    """[model] of the image task: channels of the convolutions, width of the layer before the last."""

    channels: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=6)] = [
        16,
        32,
    ]
    hidden: Annotated[int, Field(ge=1, le=65536)] = 64
    dtype: Literal["float32", "float64"] = "float32"


class OwnModel(OwnSection):
    """[model] of a study's own task."""

    dtype: Literal["float32", "float64"] = "float32"


class Training(Section):
    """[training]"""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Annotated[int, Field(ge=1)] = 32
    local_epochs: Annotated[int, Field(ge=1)] | None = None
    local_steps: Annotated[int, Field(ge=1)] | None = None


class StrategyTable(OwnSection):
    """[strategy]: a name and that strategy's parameters (`consortium strategies` lists both)."""

    name: str = "fedavg"

    def table(self) -> dict[str, Any]:
        """Name and parameters as one dict."""
        return self.model_dump()


class Cohort(Section):
    """[cohort]: who is asked, for how long, and how few answers still move the model.

    spare: sites that a live run asks beyond `size`; the first `size` valid answers count, and the others are left out.
    sampling_rate: central-gaussian alone: each site is in a round with this probability, by itself (a Poisson sample),
        and sums are divided by `size`, however many answer.
    """

    min_sites: Annotated[int, Field(ge=1)] = 2
    size: Annotated[int, Field(ge=1)] | None = None
    spare: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    sampling_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    deadline: Annotated[float, BeforeValidator(seconds), Field(gt=0, le=30 * 86400.0)] = 600.0
    max_weight: Annotated[float, Field(gt=0, le=1e15)] = 10_000.0
    approvals: Annotated[int, Field(ge=1)] = 1


class Evaluation(Section):
    """[evaluation]: the metric that the run is judged by. AUROC from 512 bins of the logit, or exact where the
    sites agree to send every held-out score (then `auroc = "exact"`). groups: categorical features by whose values an
    exported model is compared before it is promoted."""

    metric: str = ""
    select: Literal["last", "best"] = "last"
    auroc: Literal["binned", "exact"] = "binned"
    groups: Annotated[list[str], Field(max_length=8)] = []


SAMPLING_RATE = 0.1
"""Of dp-sgd where the study says nothing. A number of the study: nothing depends on how many rows a site has."""


class Privacy(Section):
    """[privacy]: whom it protects, by which mechanism, and how well (docs/privacy.md).

    clip_quantile: central-gaussian alone: clip_norm is then the first bound, and moves until this share of the sites'
    updates lies within it. sampling_rate: dp-sgd alone.
    """

    unit: Literal["record", "person", "site"] = "record"
    mechanism: Literal["none", "dp-sgd", "central-gaussian", "local-gaussian", "distributed-skellam"] = "none"
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] | None = None
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    sampling_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    secure_aggregation: bool = False

    @property
    def rate(self) -> float:
        """The share of a site's units that is in a batch of dp-sgd, on average."""
        return SAMPLING_RATE if self.sampling_rate is None else self.sampling_rate


class Export(Section):
    """[export]: what a model bundle holds. approvals: how many sites must have signed it before it is used."""

    formats: list[Literal["onnx", "safetensors"]] = ["onnx", "safetensors"]
    approvals: Annotated[int, Field(ge=0, le=10_000)] = 0


def allowed_metrics(task: str, data: Data) -> tuple[str, ...]:
    """The metrics that a built-in task can compute; the first is its default."""
    if task == REGRESSOR:
        return ("rmse",)
    binary = getattr(data, "classes", 2) == 2
    return ("auroc", "accuracy", "log_loss", "brier") if binary else ("accuracy", "log_loss", "brier")
