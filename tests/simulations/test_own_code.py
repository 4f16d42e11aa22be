"""`consortium simulate` over a study's own code that is wrong: the place in that code is named, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from consortium.protocol.cli import main

STUDY = """format = 1
[study]
name = "own"
task = "task:Own"
rounds = 2
[evaluation]
metric = "accuracy"
"""
TASK = """import numpy as np, torch
from torch import nn
from consortium.client import Examples, Task

class Own(Task):
    def model(self):
        return nn.Linear(3, 2)

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def data(self, source):
        table = torch.from_numpy(np.load(source.path))
        return Examples(table[:, :3], table[:, 3].long())

    def metrics(self, outputs, targets):
        return {"accuracy": np.array([float((outputs.argmax(1) == targets).sum()), len(targets)])}
"""
DATA = "table = torch.from_numpy(np.load(source.path))"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a sound study and the data of two sites."""
    rng = np.random.default_rng(0)
    for name in ("north", "south"):
        rows = rng.normal(size=(50, 3))
        np.save(tmp_path / f"{name}.npy", np.column_stack([rows, rows.sum(1) > 0]).astype(np.float32))
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    data = ("--data", "north.npy", "south.npy", "--out", "out")
    with pytest.raises(SystemExit) as caught:
        main(["simulate", "study.toml", *data, *arguments])
    captured = capfd.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        (
            DATA,
            'raise ValueError("boom")',
            2,
            ["'north', north.npy", "'south'", "task.py, line 13: ValueError: boom"],
        ),
        (
            DATA,
            'open("/nowhere/x")',
            2,
            ["'north', north.npy", "task.py, line 13: FileNotFoundError", "/nowhere/x"],
        ),
        (DATA, "raise SystemExit(3)", 2, ["'north', north.npy", "task.py, line 13: SystemExit: 3"]),
        (DATA, "return None", 2, ["'north', north.npy", "'data' gave NoneType", "Examples"]),
        (DATA, "return Examples(np.zeros((9, 3)), np.zeros(9))", 2, ["inputs are ndarray", "tensor"]),
        (DATA, "return Examples(torch.zeros(9, 3), torch.zeros(8))", 2, ["9 inputs", "8 targets"]),
        (
            DATA,
            "return Examples(torch.zeros(2, 3), torch.zeros(2), ids=np.zeros(3))",
            2,
            ["2 inputs", "3 ids"],
        ),
        (
            "return nn.Linear(3, 2)",
            "return 1 / 0",
            1,
            ["task.py, line 7: ZeroDivisionError", "correct the code"],
        ),
        (
            "return nn.Linear(3, 2)",
            "nn.Linear(3, 2)",
            2,
            ["task:Own", "'model' gave NoneType", "torch.nn.Module"],
        ),
        ('return {"accuracy"', 'x = {"accuracy"', 2, ["task:Own", "'metrics'", "dict of numpy arrays"]),
        ("np.array([float(", "np.mean([float(", 2, ["task:Own", "'metrics'", "np.array([sum, n])"]),
        ('{"accuracy"', '{"acc"', 2, ["evaluation.metric", "'accuracy'", "counts acc"]),
    ],
)
def test_own_code_that_fails_is_named_with_its_line(
    old: str, new: str, code: int, says: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The site, the file and the line; no traceback, no blame on Consortium, no results folder."""
    assert TASK.count(old) == 1
    (folder / "task.py").write_text(TASK.replace(old, new))
    ended, out, err = run(capfd)
    assert [said for said in says if said not in err] == [], err
    assert (ended, out) == (code, "")
    assert "Traceback" not in err
    assert "a fault in Consortium" not in err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("processes", ["0", "2"])
def test_what_own_code_prints_is_not_among_the_results(
    processes: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`--json` on stdout is one document, whatever the task prints, here or in a worker process."""
    task = TASK.replace("        return nn.f", '        print("from loss")\n        return nn.f')
    (folder / "task.py").write_text(task.replace(DATA, f'print("from data")\n        {DATA}'))
    code, out, err = run(capfd, "--json", "--processes", processes)
    assert code == 0, err
    assert json.loads(out)["status"] == "finished"
    assert "from data" in err
    assert "from loss" in err


def test_a_strategy_that_is_not_there_is_found_before_the_first_run(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With --compare all strategies are looked up first, so that no finished run is lost."""
    (folder / "task.py").write_text(TASK)
    (folder / "mine.py").write_text("from consortium.strategies.means import mean\n")
    code, _, err = run(capfd, "--compare", "fedavg,mine:other")
    assert code == 2
    assert err == "consortium: mine:other: module 'mine' has no 'other'\n"


def test_a_bundle_runs_as_the_study_does_with_the_files_that_its_code_imports(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same model, bit for bit, from the study beside its code and from its bundle in an empty folder."""
    (folder / "layers.py").write_text("from torch import nn\n\ndef head():\n    return nn.Linear(3, 2)\n")
    own = TASK.replace("return nn.Linear(3, 2)", "return head()").replace(
        "import numpy", "from .layers import head\nimport numpy"
    )
    (folder / "task.py").write_text(own)
    outcome = []
    for study in ("study.toml", "elsewhere/own.fab"):
        if study.endswith(".fab"):
            (folder / "elsewhere").mkdir()
            with pytest.raises(SystemExit) as built:
                main(["study", "build", "study.toml", "--out", study])
            assert built.value.code in (0, None)
            (folder / "task.py").unlink()
            (folder / "layers.py").unlink()
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["simulate", study, "--data", "north.npy", "south.npy", "--out", study + ".out", "--json"])
        assert caught.value.code in (0, None)
        rounds = (folder / f"{study}.out" / "rounds.jsonl").read_text().splitlines()
        outcome.append([json.loads(line)["metrics"] for line in rounds])
    assert len(outcome[0]) == 3
    assert outcome[0] == outcome[1]
    assert (
        folder / "elsewhere/own.fab.out/layers.py"
    ).is_file()  # the results hold all that another run needs
