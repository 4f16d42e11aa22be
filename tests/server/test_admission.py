"""Measuring updates at the gate."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest

from consortium.protocol.layout import Array, Layout, Segment, Vector
from consortium.protocol.messages import Answer, Instruction, Payload
from consortium.server.admission import Admitted, Gate, largest_norm

SIZE = 20_011
MOST = largest_norm(Segment("shared", "float32", ()))


def verdict(update: Vector, norms: bool, dtype: Literal["float32", "float64"] = "float32") -> Admitted | str:
    layout = Layout((Segment("shared", dtype, (Array("w", (SIZE,)),)),))
    asked = Instruction("f", "r", 1, 0, "train", "", "", layout.digest, "", 0.0)
    answer = Answer.to_instruction(asked.to("a"), weight=1.0, payload=Payload({"shared": update}))
    return Gate(asked, layout, 100.0, norms=norms).check(answer)


def of_norm(norm: float) -> Vector:
    """Float32 with this norm, all numbers alike."""
    return np.full(SIZE, norm / math.sqrt(SIZE), np.float32)


def one(number: float) -> Vector:
    """Zeros and this number."""
    vector = np.zeros(SIZE, np.float32)
    vector[-1] = number
    return vector


PASS = {
    "zero": one(0),
    "subnormal": one(1e-42),
    "usual": np.random.default_rng(0).standard_normal(SIZE).astype(np.float32),
    "half of the most": of_norm(MOST / 2),
    "just below the most": of_norm(MOST * 0.999),
}
REFUSED = {
    "just above the most": of_norm(MOST * 1.001),
    "a square that overflows": one(3e38),
    "not a number": one(math.nan),
    "infinite": one(math.inf),
    "infinities of both signs": np.where(np.arange(SIZE) % 2, np.inf, -np.inf).astype(np.float32),
}


@pytest.mark.parametrize("name", PASS)
def test_sound_updates_pass_whether_or_not_norms_are_asked_for(name: str) -> None:
    exact, bounded = verdict(PASS[name], True), verdict(PASS[name], False)
    assert isinstance(exact, Admitted)
    assert isinstance(bounded, Admitted)
    assert exact.norm == pytest.approx(float(np.linalg.norm(PASS[name].astype(np.float64))), rel=1e-12)
    assert math.isnan(bounded.norm) or bounded.norm == exact.norm


@pytest.mark.parametrize("name", REFUSED)
def test_unsound_updates_are_refused_whether_or_not_norms_are_asked_for(name: str) -> None:
    reason = verdict(REFUSED[name], True)
    assert isinstance(reason, str)
    assert verdict(REFUSED[name], False) == reason


def test_a_float64_update_is_bounded_in_float64() -> None:
    assert isinstance(verdict(one(1e30).astype(np.float64), False, "float64"), Admitted)
    wrong = verdict(one(1).astype(np.float64) * 1e150, False, "float64")
    assert isinstance(wrong, str)
    assert "too large to compute with" in wrong
