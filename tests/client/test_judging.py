"""A site judges an exported model on its held-out rows, and shows no cell of few persons."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from consortium.client import judging
from consortium.client.judging import check_graph, judged, shown
from consortium.client.task import task_of
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.messages import Instruction, Payload
from consortium.protocol.metrics import cells, values
from consortium.protocol.study import Study

STUDY = """
format = 1
[study]
name = "toy"
task = "consortium.client.tasks.tabular:Classifier"
rounds = 1
[data]
target = "ill"
person = "id"
[data.features]
x = { min = -3.0, max = 3.0 }
sex = { values = ["F", "M"] }
[evaluation]
metric = "accuracy"
groups = ["sex"]
"""


def graph(column: str = "x", last: str = "Softmax") -> bytes:
    """A model by which whoever has a positive x is ill. last: the operator that gives its answers."""
    takes = [
        helper.make_tensor_value_info(column, TensorProto.FLOAT, ["batch", 1]),
        helper.make_tensor_value_info("sex", TensorProto.STRING, ["batch", 1]),
    ]
    gives = [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["batch", 2])]
    nodes = [
        helper.make_node("Neg", [column], ["minus"]),
        helper.make_node("Concat", ["minus", column], ["both"], axis=1),
        helper.make_node(last, ["both"], ["probability"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "toy", takes, gives), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def rows(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (n, 2) and targets (n, 1): every fourth row is not as x says; three of four are women."""
    rng = np.random.default_rng(3)
    x = rng.uniform(0.1, 3, n) * np.where(np.arange(n) % 2, 1, -1)
    ill = (x > 0) ^ (np.arange(n) % 4 == 0)
    inputs = np.stack([x, np.arange(n) % 4 == 3], axis=1).astype(np.float32)
    return torch.from_numpy(inputs), torch.from_numpy(ill[:, None].astype(np.float32))


def judge(study: Study, n: int, people: np.ndarray | None, model: bytes | None = None) -> dict[str, float]:
    """The metric by cell."""
    task = task_of(study)
    found = judged(task, task.model(), graph() if model is None else model, *rows(n), people)
    return {cell: values(counts)[study.metric] for cell, counts in cells(found).items()}


def test_counts_are_those_of_the_bytes_that_would_be_served() -> None:
    """By hand: a quarter of 120 rows is wrong, all of them women's, who are three quarters."""
    found = judge(Study.parse(STUDY), 120, None)
    assert found == {"": 0.75, "0.0": pytest.approx(2 / 3), "0.1": 1.0}


def test_a_cell_of_few_persons_is_not_shown_nor_one_that_tells_it() -> None:
    """Many rows of few persons are few; where one of two groups is hidden the other would tell it."""
    study = Study.parse(STUDY)
    assert set(judge(study, 32, None)) == {""}  # 8 men; the women are the rest
    assert set(judge(study, 120, np.arange(120) // 4)) == {"", "0.0", "0.1"}
    assert set(judge(study, 120, np.arange(120) // 12)) == {"", "0.0", "0.1"}
    with pytest.raises(InputError, match="fewer than 10 persons"):
        judge(study, 120, np.arange(120) // 13 % 9)


@pytest.mark.parametrize(
    ("persons", "rest", "right"),
    [
        ({0: 10, 1: 10}, 0, [0, 1]),
        ({0: 9, 1: 10, 2: 30}, 0, [2]),
        ({0: 4, 1: 5, 2: 30, 3: 12}, 0, [2]),
        ({0: 5, 1: 5, 2: 30}, 0, [2]),
        ({0: 20, 1: 30}, 3, [1]),
        ({0: 20, 1: 30}, 0, [0, 1]),
        ({0: 2}, 3, []),
    ],
)
def test_which_cells_are_shown(persons: dict[int, int], rest: int, right: list[int]) -> None:
    """All that is hidden together is ten persons or more, or nobody."""
    assert shown(persons, rest) == right


def test_what_is_no_model_of_this_study_is_declined() -> None:
    """Other columns, no graph at all, or answers that are none."""
    study = Study.parse(STUDY)
    with pytest.raises(InputError, match="does not take this study's inputs"):
        judge(study, 120, None, graph("y"))
    with pytest.raises(InputError, match="cannot be run"):
        judge(study, 120, None, b"no graph")
    with pytest.raises(InputError, match="does not answer each row"):
        judge(study, 120, None, graph(last="Transpose"))


def test_a_fault_of_ours_is_not_laid_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails before the model runs keeps its own name."""

    def broken(takes: object, rows: object) -> object:
        raise KeyError("ours")

    monkeypatch.setattr(judging, "_fed", broken)
    with pytest.raises(KeyError, match="ours"):
        judge(Study.parse(STUDY), 120, None)


def test_other_bytes_than_the_instruction_names_are_refused() -> None:
    """The digest is checked before anything is parsed."""
    one = Instruction(
        "f", "gate/x", 1, 0, "judge", "0" * 64, "1" * 64, "", "n", 0.0, Payload(opaque=b"bytes")
    )
    with pytest.raises(IntegrityError, match="not the one"):
        check_graph(one)
