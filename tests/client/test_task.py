"""What a study's own task may call its things."""

from __future__ import annotations

from pathlib import Path

import pytest

from consortium.client.task import task_of
from consortium.client.trainer import resident
from consortium.protocol.errors import InputError
from consortium.protocol.study import Study
from consortium.strategies.base import Local

STUDY = 'format = 1\n[study]\nname = "t"\ntask = "task:T"\nrounds = 1\n'
CODE = """
from torch import nn
from consortium.client import Examples, Task
class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.local, self.shared, self.control = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)
    def forward(self, x): return self.control(self.shared(self.local(x)))
class T(Task):
    {line}
    def model(self): return Head()
    def loss(self, outputs, targets): return ((outputs - targets) ** 2).mean()
    def data(self, source): raise NotImplementedError
"""
TAKEN = {
    "def local(self, x): return x": "T: `local` is a method; it stands for patterns",
    'local = "local.*"': "T: `local` is a str; it stands for patterns",
    "local = (1,)": "T: `local` is a tuple; it stands for patterns",
    "def frozen(self): return ()": "T: `frozen` is a method",
    "def prepares(self): return True": "T: `prepares` is a method; True or False",
    "def __init__(self, study, local): super().__init__(study)": "T: its __init__ cannot be called with the study",
    "def __init__(self, study, *, local): super().__init__(study)": "missing a required .*argument: 'local'",
}


def task_with(folder: Path, line: str, code: str = CODE) -> Study:
    (folder / "task.py").write_text(code.format(line=line))
    (folder / "study.toml").write_text(STUDY)
    return Study.load(folder / "study.toml")


@pytest.mark.parametrize("line", TAKEN)
def test_a_name_of_tasks_that_means_something_else_is_refused(line: str, tmp_path: Path) -> None:
    """A method or an argument named as what a task says of its parameters is named in the error, with what to do."""
    with pytest.raises(InputError, match=TAKEN[line]) as found:
        task_of(task_with(tmp_path, line))
    assert found.value.exit_code == 2


def test_a_task_that_leaves_something_out_is_told_what(tmp_path: Path) -> None:
    """Each method that it lacks."""
    code = "from consortium.client import Task\nclass T(Task):\n    {line}\n"
    with pytest.raises(InputError, match="T: defines no data, loss, model"):
        task_of(task_with(tmp_path, "pass", code))


@pytest.mark.parametrize("line", ["pass", "def __init__(self, study, local=1): super().__init__(study)"])
def test_parts_of_a_model_may_have_any_name(line: str, tmp_path: Path) -> None:
    """Layers that are named as segments of the layout, and an argument with a default."""
    task = task_of(task_with(tmp_path, line))
    layout = resident(task, Local(), 1).layout
    assert [array.name for array in layout["shared"].arrays][:2] == ["local.weight", "local.bias"]
