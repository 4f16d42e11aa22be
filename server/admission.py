"""The gate that every answer passes before it counts.

An answer counts only when it is whole and valid: it answers this very instruction (run, round, attempt, kind, nonce,
model), its arrays are the layout's (names, dtypes, sizes), every number is finite, and its weight lies within the
study's cap. What fails is left out with a reason that the admin and that site can read. Nothing is repaired: a
repaired lie is still a lie. Norms are measured here, once, in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from consortium.privacy.mechanisms import WITHIN, Mechanism, bound_of
from consortium.protocol.layout import Layout, Segment, Vector
from consortium.protocol.messages import Answer, Instruction, nonce_for
from consortium.protocol.metrics import examples, problem

_CHUNK = 1 << 13
"""Numbers; a longer dot product would wake BLAS's threads, and its bits would depend on how many there are."""

_ROUGH_CHUNK = 1 << 22
"""Numbers; where bits do not matter, only that a sum of so many products is about right."""

_MOST_METRICS = 64
_METRIC = re.compile(r"[\w.@%/-]{1,64}", re.ASCII)
"""A metric's name is kept with the round, and shown to people."""

_LEAST_WEIGHT = 2.0**-64
"""Below it a weight may be zero in float32, and a mean of such weights 0 / 0."""


@dataclass(frozen=True)
class Admitted:
    """A valid answer. `norm` is the L2 norm of the shared update, NaN where it was only bounded, 0 where there is no
    update."""

    answer: Answer
    norm: float


def misaddressed(asked: Instruction, answer: Answer, former: tuple[str, ...] = ()) -> str:
    """Why `answer` is not an answer to the instruction `asked`; empty where it is one. former: as in `Gate`."""
    if answer.run != asked.run:
        return f"answers another run ({clip(answer.run)})"
    if (answer.round, answer.attempt) != (asked.round, asked.attempt):
        return f"late: answers round {clip(str(answer.round), 20)}, attempt {clip(str(answer.attempt), 20)}"
    if answer.kind != asked.kind or answer.model != asked.model:
        return f"answers another question ({answer.kind}, model {clip(answer.model)})"
    # Not a secret between these two, so plain comparison: a wrong nonce only loses the sender its own answer.
    nonces = (asked.nonce, *former)
    if answer.nonce not in (nonce_for(nonce, answer.site) for nonce in nonces):
        return "does not carry the nonce that this site was given"
    return ""


@dataclass(frozen=True)
class Gate:
    """What one exchange accepts.

    max_weight: the most that one site may count. mechanism: of the study's privacy; where updates are clipped as a
    whole, a longer one is left out: noise was not measured for it.
    former: nonces of the cohort under which the same was asked before an interruption; answers to them count, too.
    norms: whether norms are asked for (`Reducer.norms`); else they are only bounded, which costs a fourth.
    """

    instruction: Instruction
    layout: Layout
    max_weight: float
    mechanism: Mechanism | None = None
    norms: bool = True
    former: tuple[str, ...] = ()

    @cached_property
    def _wanted(self) -> dict[str, Segment]:
        """The segments of an update, by kind."""
        segments = (self.layout["shared"], self.layout["control"])
        return {segment.kind: segment for segment in segments if segment.size}

    @cached_property
    def _most(self) -> dict[str, float]:
        """The largest norm of each segment's update."""
        return {kind: largest_norm(segment) for kind, segment in self._wanted.items()}

    def check(self, answer: Answer) -> Admitted | str:
        """The admitted answer, or the reason why it is left out."""
        return self.misaddressed(answer) or self.content(answer)

    def misaddressed(self, answer: Answer) -> str:
        """As the function of that name."""
        return misaddressed(self.instruction, answer, self.former)

    def content(self, answer: Answer) -> Admitted | str:
        """The verdict on what `answer` holds, once it is known to answer this instruction."""
        if answer.status == "declined":
            return f"declined: {clip(answer.reason) or 'no reason given'}"
        wrong = self._metrics(answer) or self._statistics(answer)
        if wrong:
            return wrong
        if self.instruction.kind == "train":
            return self._update(answer)
        if answer.payload.vectors:
            return "sends a model where none was asked for"
        if self.instruction.kind == "query" and not answer.payload.statistics:
            return "sends no statistics"
        return Admitted(answer, 0.0)

    def _metrics(self, answer: Answer) -> str:
        if len(answer.metrics) > _MOST_METRICS:
            return f"sends {len(answer.metrics)} metrics; at most {_MOST_METRICS} are kept"
        for name, counts in answer.metrics.items():
            if _METRIC.fullmatch(name) is None:
                return f"metric '{clip(name)}' has no name of at most 64 letters and digits"
            if not np.isfinite(counts).all():
                return f"metric '{clip(name)}' is not finite"
            wrong = problem(name, counts)
            if wrong:
                return f"metric '{clip(name)}' {wrong}"
            if examples(name, counts) > self.max_weight:
                return (
                    f"metric '{clip(name)}' counts more examples than cohort.max_weight, {self.max_weight:g}"
                )
        return ""

    def _statistics(self, answer: Answer) -> str:
        """Statistics are sums of numbers between -1 and 1, at most one a row (`Task.statistics`)."""
        for name, values in answer.payload.statistics.items():
            if not np.isfinite(values).all():
                return f"statistic '{clip(name)}' is not finite"
            if np.abs(values).max(initial=0.0) > self.max_weight * (1 + 1e-9):
                return f"statistic '{clip(name)}' counts more than cohort.max_weight, {self.max_weight:g}"
        return ""

    def _update(self, answer: Answer) -> Admitted | str:
        if not (math.isfinite(answer.weight) and answer.weight >= _LEAST_WEIGHT):
            return f"weight {answer.weight} is not a positive number to compute with"
        if answer.weight > self.max_weight:
            return f"weight {answer.weight:g} is above the study's cohort.max_weight, {self.max_weight:g}"
        vectors = answer.payload.vectors
        wrong = shape_problem(vectors, self._wanted)
        if wrong:
            return wrong
        if answer.payload.opaque or answer.payload.statistics.keys() != self._bits:
            return "sends content that the study does not declare"
        if any(bit.shape != () or float(bit) not in (0.0, 1.0) for bit in answer.payload.statistics.values()):
            return "says neither that its update was clipped nor that it was not"
        measured = self._measured(vectors)
        return measured if isinstance(measured, str) else Admitted(answer, measured)

    def _measured(self, vectors: Mapping[str, Vector]) -> float | str:
        """The norm of the shared update, NaN where it was only bounded; or why these vectors are left out."""
        measured, longest = math.nan, self._longest
        exact = self.norms or longest < math.inf
        for kind, most in self._most.items():
            if not exact and _well_below(vectors[kind], most):
                continue
            value = norm(vectors[kind])
            if not math.isfinite(value):
                return f"the {kind} update is not finite"
            if value > most:
                return f"the {kind} update is too large to compute with (norm {value:.3g})"
            if kind == "shared":
                measured = value
        if measured > longest:
            return (
                f"the shared update has norm {measured:.6g}, above the clip bound {longest:.6g}: the "
                "noise would not hide it"
            )
        return measured

    @cached_property
    def _bits(self) -> set[str]:
        return {WITHIN} if self.mechanism is not None and self.mechanism.quantile is not None else set()

    @cached_property
    def _longest(self) -> float:
        if self.mechanism is None or self.mechanism.name != "central-gaussian":
            return math.inf
        return bound_of(self.mechanism, self.instruction.payload.statistics)


def shape_problem(vectors: Mapping[str, Vector], wanted: Mapping[str, Segment]) -> str:
    """Why `vectors` do not have the wanted segments' names, dtypes and sizes; empty where they do."""
    if vectors.keys() != wanted.keys():
        return f"sends the vectors {clip(str(sorted(vectors)))}, {sorted(wanted)} were asked for"
    for kind, segment in wanted.items():
        vector = vectors[kind]
        if vector.dtype != segment.numpy_dtype:
            return f"the {kind} update has dtype {vector.dtype}, the layout says {segment.dtype}"
        if vector.shape != (segment.size,):
            return f"the {kind} update has shape {vector.shape}, the layout says ({segment.size},)"
    return ""


def largest_norm(segment: Segment) -> float:
    """The largest L2 norm that is computed with: 1.8e13 in float32, 1.3e148 in float64.

    Below it neither a weighted sum nor a server optimizer's squares can overflow, so no single answer can turn the
    model into NaN for good.
    """
    return math.sqrt(float(np.finfo(segment.numpy_dtype).max)) * 2.0**-20


def norm(vector: Vector) -> float:
    """L2 norm in float64, chunk by chunk; not finite where any element is not.

    A float32 dot could overflow to infinity for finite elements, so each chunk is widened first.
    """
    total = 0.0
    for start in range(0, vector.size, _CHUNK):
        chunk = vector[start : start + _CHUNK].astype(np.float64)
        total += float(np.dot(chunk, chunk))
    return math.sqrt(total) if total == total else math.nan


def _well_below(vector: Vector, most: float) -> bool:
    """Whether the norm of `vector` is surely finite and below `most`, from products in its own dtype.

    They may be off by 1e-3 or overflow, so half of `most` is asked for; not-finite numbers make a sum that is below
    nothing. Where this says no, only `norm` can tell.
    """
    total = 0.0
    for start in range(0, vector.size, _ROUGH_CHUNK):
        chunk = vector[start : start + _ROUGH_CHUNK]
        total += float(np.vdot(chunk, chunk))  # `dot` would warn where it overflows
    return total < (most / 2) ** 2


def clip(text: str, longest: int = 200) -> str:
    """What a peer wrote, short and on one line, for logs and people."""
    return "".join(c if c.isprintable() else "?" for c in text[:longest])
