"""The benchmarks' common output and measurement."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

REPORT = Path(__file__).resolve().parents[2] / "benchmarks" / "report.py"
pytestmark = pytest.mark.skipif(
    not REPORT.exists(), reason="benchmarks/ is not part of the installed package"
)


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", REPORT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["report"] = module
    spec.loader.exec_module(module)
    return module


def test_json_is_one_document_with_the_agreed_keys(
    report: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `as_json` standard output is one JSON document: machine, rows in their own units, targets."""
    rows = [report.Row.of("ours", [0.003, 0.001, 0.002], "ms", peak_mb=12.5)]
    report.emit(rows, [report.Target("ours / plain", 1.2, "<=", 1.25)], as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"machine", "rows", "targets"}
    assert document["rows"] == [
        {"name": "ours", "median": 2.0, "min": 1.0, "max": 3.0, "unit": "ms", "peak_mb": 12.5}
    ]
    assert document["targets"] == [{"name": "ours / plain", "value": 1.2, "reach": "<= 1.25", "ok": True}]


def test_table_names_rows_ratios_and_missed_targets(
    report: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table shows each row's ratio to the first and says which target was missed."""
    rows = [report.Row.of("plain", [1.0], "s"), report.Row.of("ours", [1.5], "s")]
    report.emit(rows, [report.Target("ours / plain", 1.5, "<=", 1.25)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:1] == ["ours"] and "1.50" in line for line in lines)
    assert lines[-1].endswith("NOT reached")


@pytest.mark.parametrize(
    ("value", "sense", "bound", "ok"),
    [
        (1.25, "<=", 1.25, True),
        (1.26, "<=", 1.25, False),
        (45.0, ">=", 45.0, True),
        (44.9, ">=", 45.0, False),
    ],
)
def test_target_bound_is_inclusive(
    report: ModuleType, value: float, sense: str, bound: float, ok: bool
) -> None:
    """A target holds on its bound and fails just past it; NaN fails either way."""
    assert report.Target("t", value, sense, bound).ok is ok
    assert not report.Target("t", float("nan"), sense, bound).ok


def test_measure_times_each_call_after_the_warmup(report: ModuleType) -> None:
    """`measure` calls warm-up plus repeats and returns one wall time a counted call."""
    calls = []

    def work() -> None:
        calls.append(1)
        time.sleep(0.01)

    seconds = report.measure(work, repeats=3, warmup=2)
    assert len(calls) == 5
    assert len(seconds) == 3
    assert min(seconds) >= 0.01


def test_peak_memory_sees_an_allocation_that_is_freed_again(report: ModuleType) -> None:
    """The peak counts memory that was held only in the middle of the block."""
    with report.PeakMemory() as peak:
        block = np.ones(8_000_000)
        time.sleep(0.05)
        del block
    assert 50 < peak.mb < 100  # 64 MB, less what the collector freed of other things meanwhile


def test_peak_memory_sees_child_processes(report: ModuleType) -> None:
    """Memory of a process below this one counts."""
    code = "import time; b = bytearray(b'x') * 64_000_000; time.sleep(0.3)"
    with report.PeakMemory() as peak:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert 60 < peak.mb < 120
