"""The tabular tasks: one preprocessing for all sites, metrics from counts, and data at their edges."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from consortium.client.site import held_out, open_site, rows, start
from consortium.client.task import Examples, Source
from consortium.client.tasks import classification
from consortium.client.tasks.tabular import BINS, Classifier, Regressor
from consortium.protocol.errors import InputError
from consortium.protocol.messages import Answer, Instruction, Payload, Statistics, sum_statistics
from consortium.protocol.metrics import pool, values
from consortium.protocol.study import Study
from consortium.strategies.base import Local

STUDY = """
format = 1
[study]
name = "ward"
task = "consortium.client.tasks.tabular:{task}"
rounds = 2
[data]
target = "y"
{data}
features.age = {{ min = 0.0, max = 100.0 }}
features.dose = {{ min = -5.0, max = 5.0 }}
features.sex = {{ values = ["female", "male"] }}
[training]
lr = 0.1
{more}
"""


def study(task: str = "Classifier", data: str = "", more: str = "") -> Study:
    return Study.parse(STUDY.format(task=task, data=data, more=more))


def table(n: int, seed: int = 0) -> pd.DataFrame:
    """Rows with every difficulty: missing numbers and categories, values out of range, unseen categories."""
    rng = np.random.default_rng(seed)
    age = rng.normal(50, 30, n)
    age[rng.random(n) < 0.2] = np.nan
    return pd.DataFrame(
        {
            "age": age,
            "dose": rng.normal(0, 2, n),
            "sex": rng.choice(["female", "male", "x", None], n),  # type: ignore[arg-type]
            "y": rng.integers(0, 2, n),
        }
    )


def data(task: Any, frame: pd.DataFrame) -> Examples:
    examples: Examples = task.data(Source("a", table=frame))
    return examples


def parts(examples: Examples, cuts: Sequence[int]) -> list[Examples]:
    """The examples as several sites' own."""
    edges = [0, *sorted(cuts), len(examples.inputs)]
    return [Examples(examples.inputs[a:b], examples.targets[a:b]) for a, b in pairwise(edges)]


@given(st.integers(1, 60), st.lists(st.integers(0, 60), max_size=4), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_sums_of_sites_are_the_sums_of_the_union(n: int, cuts: list[int], seed: int) -> None:
    """However rows lie over sites, also over sites without rows, the sums are the union's and so is the step."""
    task = Classifier(study())
    union = data(task, table(n, seed))
    total = sum_statistics([task.statistics(part) for part in parts(union, [min(c, n) for c in cuts])])
    whole = task.statistics(union)
    np.testing.assert_array_equal(total["histogram"], whole["histogram"])
    np.testing.assert_array_equal(total["count"], whole["count"])
    for name in ("sum", "squares"):
        np.testing.assert_allclose(total[name], whole[name], rtol=1e-12)
    step, expected = task.preprocessing(total), task.preprocessing(whole)
    torch.testing.assert_close(step(union.inputs), expected(union.inputs), rtol=1e-5, atol=1e-6)


@given(st.lists(st.floats(-20, 120), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_the_federated_median_is_right_within_one_bin(ages: list[float]) -> None:
    """Missing numbers become the median of what is observed, clipped to the range, at most one bin off."""
    task = Classifier(study())
    frame = table(len(ages)).assign(age=ages)
    step = task.preprocessing(task.statistics(data(task, frame)))
    assert abs(float(step.median[0]) - np.median(np.clip(ages, 0, 100))) <= 100 / BINS + 1e-4


def test_numbers_are_clipped_and_standardised_and_categories_one_hot() -> None:
    """By hand: mean and deviation of the clipped, observed values; missing numbers as the median."""
    task = Classifier(study(more='[model]\ndtype = "float64"'))
    frame = table(500)
    examples = data(task, frame)
    assert examples.inputs.dtype == torch.float64
    out = task.preprocessing(task.statistics(examples))(examples.inputs).numpy()
    age = np.clip(frame["age"], 0, 100)
    known = age.notna()
    np.testing.assert_allclose(out[known, 0], ((age - age.mean()) / age.std(ddof=0))[known], rtol=1e-9)
    np.testing.assert_allclose(out[~known, 0] * age.std(ddof=0) + age.mean(), age.median(), atol=100 / BINS)
    dose = np.clip(frame["dose"], -5, 5)
    np.testing.assert_allclose(out[:, 1], (dose - dose.mean()) / dose.std(ddof=0), rtol=1e-9)
    np.testing.assert_array_equal(out[:, 2], frame["sex"] == "female")
    np.testing.assert_array_equal(out[:, 3], frame["sex"] == "male")


@pytest.mark.parametrize("constant", [0.0, 41.7, 99.9, 1e9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_constant_or_empty_column_becomes_zeros(constant: float, dtype: str) -> None:
    """No weight was learnt on it, so it stays zero for a new row with another value, too."""
    task = Classifier(study(more=f'[model]\ndtype = "{dtype}"'))
    frame = table(1000).assign(age=constant, dose=np.nan)
    step = task.preprocessing(task.statistics(data(task, frame)))
    out = step(data(task, table(1000, 1)).inputs)
    assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
    assert float(out[:, 2:].sum()) > 0


def test_a_study_may_refuse_missing_values() -> None:
    """`missing = "refuse"`: every column with missing values is named with how many rows; a NaN is not imputed."""
    task = Classifier(study(data='missing = "refuse"'))
    frame = pd.DataFrame(
        {"age": [1, None, 3], "dose": [None, None, 1.0], "sex": ["male", None, "x"], "y": [0, 1, 1]}
    )
    with pytest.raises(InputError) as caught:
        data(task, frame)
    assert "column 'age': 1 of 3 rows (row 2) is without a value" in str(caught.value)
    assert "column 'dose': 2 of 3 rows (rows 1, 2) are without a value" in str(caught.value)
    assert "column 'sex': 1 of 3 rows (row 2) is without a value" in str(caught.value)
    whole = data(task, table(50).assign(age=3.0, sex="male"))
    out = task.preprocessing(task.statistics(whole))(torch.full((1, 3), torch.nan))
    assert out[0, :2].isnan().all()


@pytest.mark.parametrize("name", ["histogram", "count", "sum", "squares"])
@pytest.mark.parametrize("lie", [-1e3, -1e140, 1e6, 1e140])
def test_sums_that_no_data_have_stay_harmless(name: str, lie: float) -> None:
    """Whatever one site added to the sums, every row's inputs are finite, and what is missing becomes a number of the
    declared range: no site can make the others' training impossible."""
    task = Classifier(study())
    examples = data(task, table(200))
    sums = task.statistics(examples)
    for place in (slice(None), (..., 0), (..., -1)):
        spoiled = np.array(sums[name])
        spoiled[place] += lie
        step = task.preprocessing({**sums, name: spoiled})
        assert torch.isfinite(step(examples.inputs)).all()
        assert ((step.median >= step.low) & (step.median <= step.high)).all()


def test_sums_of_another_study_are_refused() -> None:
    """Sums with other names, shapes or no numbers never become a preprocessing."""
    task = Classifier(study())
    sums = dict(task.statistics(data(task, table(9))))
    for wrong in ({"histogram": sums["histogram"][:1]}, {"sum": np.array([np.nan, 1.0])}):
        with pytest.raises(InputError, match="statistics"):
            task.preprocessing({**sums, **wrong})
    with pytest.raises(InputError, match="histogram"):
        task.preprocessing({})


def logits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    z = rng.normal(y - 0.5, 2)
    return torch.from_numpy(z).unsqueeze(1), torch.from_numpy(y.astype(np.float64)).unsqueeze(1)


def pooled(outputs: Tensor, targets: Tensor, cuts: Sequence[int], exact: bool = False) -> Statistics:
    edges = [0, *cuts, len(outputs)]
    pieces = [slice(a, b) for a, b in pairwise(edges)]
    return pool([classification.counts(outputs[piece], targets[piece], exact) for piece in pieces])


@given(st.integers(2, 200), st.lists(st.integers(0, 200), max_size=3), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_pooled_metrics_are_the_unions_and_scikit_learns(n: int, cuts: list[int], seed: int) -> None:
    """Counts of sites, some empty or of one class, add up to the union's metrics, which are scikit-learn's."""
    outputs, targets = logits(n, seed)
    targets[0], targets[1] = 0, 1
    y, z = targets[:, 0].numpy(), outputs[:, 0].numpy()
    counts = pooled(outputs, targets, sorted(min(c, n) for c in cuts))
    got = values(counts)
    p = 1 / (1 + np.exp(-z))
    assert got["n"] == n
    assert got["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(y, z > 0))
    assert got["log_loss"] == pytest.approx(sklearn.metrics.log_loss(y, p))
    assert got["brier"] == pytest.approx(sklearn.metrics.brier_score_loss(y, p))
    binned = np.floor(np.clip(z, -16, 16) * 16)
    assert got["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(y, binned), abs=1e-12)
    np.testing.assert_array_equal(
        counts["confusion"], sklearn.metrics.confusion_matrix(y, z > 0, labels=[0, 1])
    )
    exact = values(pooled(outputs, targets, sorted(min(c, n) for c in cuts), exact=True))
    assert exact["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(y, z), abs=1e-12)


def test_binned_auroc_is_close_where_there_are_many_scores() -> None:
    """20,000 scores: the binned AUROC is scikit-learn's within 1e-4."""
    outputs, targets = logits(20_000, 3)
    got = values(classification.counts(outputs, targets, exact=False))["auroc"]
    assert got == pytest.approx(sklearn.metrics.roc_auc_score(targets[:, 0], outputs[:, 0]), abs=1e-4)


def test_metrics_of_more_classes_are_scikit_learns() -> None:
    """Three classes: accuracy, log-loss, Brier summed over classes, confusion; no AUROC."""
    rng = np.random.default_rng(0)
    outputs, y = torch.from_numpy(rng.normal(0, 2, (300, 3))), rng.integers(0, 3, 300)
    counts = classification.counts(outputs, torch.from_numpy(y), exact=False)
    p = torch.softmax(outputs, 1).numpy()
    got = values(counts)
    assert set(got) == {"accuracy", "log_loss", "brier", "n"}
    assert got["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(y, p.argmax(1)))
    assert got["log_loss"] == pytest.approx(sklearn.metrics.log_loss(y, p))
    assert got["brier"] == pytest.approx(((p - np.eye(3)[y]) ** 2).sum(1).mean())
    np.testing.assert_array_equal(counts["confusion"], sklearn.metrics.confusion_matrix(y, p.argmax(1)))


def test_counts_of_extreme_outputs_are_finite_and_of_no_numbers_refused() -> None:
    """Logits of 1e30 give finite counts in float32; NaN or infinite outputs are an error, not a count."""
    for outputs in (torch.tensor([[1e30], [-1e30]]), torch.tensor([[1e30, 0, -1e30], [-1e30, 1, 0]])):
        targets = classification.targets_for(
            np.array([0, 1]), 3 if outputs.shape[1] == 3 else 2, torch.float32
        )
        counts = classification.counts(outputs, targets, exact=False)
        assert all(np.isfinite(table).all() for table in counts.values())
        assert torch.isfinite(classification.loss(outputs, targets))
        with pytest.raises(InputError, match="diverged"):
            classification.counts(outputs * torch.inf, targets, exact=False)


def ask(kind: Any, payload: Payload, round: int = 1) -> Instruction:
    return Instruction("f", "r", round, 0, kind, "s", "m", "l", "00", 2e9, payload, "a")


def run(s: Study, task: Any, frame: pd.DataFrame, rounds: int = 1) -> tuple[list[Answer], Any]:
    """What one site answers to the query and to rounds of training, each round from where the last one ended."""
    local = Local()
    net = start(s, task, local)
    site = open_site(s, task, local, net, Source("a", table=frame))
    shared = net.vector("shared")
    sums = site.answer(ask("query", Payload())).payload.statistics
    answers = []
    for number in range(1, rounds + 1):
        answers.append(site.answer(ask("train", Payload({"shared": shared}, sums), number)))
        assert answers[-1].status == "done", answers[-1].reason
        shared = shared + answers[-1].payload.vectors["shared"]
    return answers, shared


def test_a_site_says_how_many_persons_it_holds_out() -> None:
    """With each count of examples, where the study names persons; nothing else does."""
    frame = table(200).assign(id=[f"p{row // 4}" for row in range(200)])
    s = study(data='person = "id"\nholdout = 0.5')
    answers, _ = run(s, Classifier(s), frame)
    found = values(answers[0].metrics)
    assert found["n"] == 4 * found["persons"]
    assert 0 < found["persons"] < 50
    plain = study(data="holdout = 0.5")
    assert "persons" not in run(plain, Classifier(plain), frame)[0][0].metrics


@pytest.mark.parametrize("hidden", ["[]", "[8, 4]"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_site_with_every_difficulty_trains(hidden: str, dtype: str, classes: int) -> None:
    """One class, a constant column, an empty one and only unseen categories: the update is finite and not zero."""
    s = study(data=f"classes = {classes}", more=f'[model]\nhidden = {hidden}\ndtype = "{dtype}"')
    frame = table(40).assign(y=1, age=7.0, dose=np.nan, sex="x")
    answers, _ = run(s, Classifier(s), frame)
    update = answers[0].payload.vectors["shared"]
    assert update.dtype == dtype
    assert np.isfinite(update).all()
    assert np.abs(update).max() > 0
    assert all(np.isfinite(counts).all() for counts in answers[0].metrics.values())
    assert np.isnan(values(answers[0].metrics).get("auroc", np.nan))


def test_training_learns_what_can_be_learnt() -> None:
    """Thirty rounds at one site: a rule over number and category is found, with an MLP and with a linear model."""
    frame = table(600)
    frame["y"] = ((frame["dose"] > 0) | (frame["sex"] == "male")).astype(int)
    for hidden in ("[]", "[16]"):
        s = study(more=f"[model]\nhidden = {hidden}")
        answers, _ = run(s, Classifier(s), frame, rounds=30)
        assert values(answers[0].metrics)["auroc"] < 0.9 < values(answers[-1].metrics)["auroc"]


def test_a_federation_of_one_class_is_refused() -> None:
    """One site may have one class; all of them together may not. A regression has no classes."""
    one, other = torch.ones(3, 1), torch.zeros(2, 1)
    task = Classifier(study())
    task.check({"a": one, "b": other})
    task.check({"a": one[:0]})
    with pytest.raises(InputError, match=r"'y': every training row of every site \(2\) has the same class"):
        task.check({"a": one, "b": one})
    with pytest.raises(InputError, match="same class"):
        Classifier(study(data="classes = 3")).check({"a": torch.tensor([2, 2])})
    Regressor(study("Regressor", "target_range = { min = 0, max = 1 }")).check({"a": one})


def test_rows_of_one_person_stay_together() -> None:
    """The holdout goes by person, is what the share says, and stays when rows are added or the study changes."""
    task = Classifier(study(data='person = "who"'))
    frame = table(4000).assign(who=[f"{i % 1000:04}" for i in range(4000)])
    examples = data(task, frame)
    assert examples.ids is not None
    assert examples.ids[0] == "0000"
    out = held_out(examples, 0.2, b"key")
    by_person = pd.Series(out).groupby(frame["who"]).nunique()
    assert (by_person == 1).all()
    assert 0.15 < out.mean() < 0.25
    more = data(task, pd.concat([table(50, 9).assign(who="new"), frame]))
    np.testing.assert_array_equal(held_out(more, 0.2, b"key")[50:], out)
    split = rows(task, Source("a", table=frame, key=b"key"))
    assert len(split.test_inputs) == out.sum()
    with pytest.raises(InputError, match=r"'who': 1 of 2 rows \(row 2\) is without a value"):
        data(task, table(2).assign(who=pd.Series(["a", None])))


def test_a_split_column_decides() -> None:
    """`split` says train or test, row by row; anything else, or nothing, is an error that names the column."""
    task = Classifier(study(data='split = "part"'))
    examples = data(task, table(3).assign(part=["train", "test", "train"]))
    assert examples.test is not None
    assert examples.test.tolist() == [False, True, False]
    for wrong in ("validation", None):
        with pytest.raises(InputError, match=r"'part': 1 of 3 rows \(row 3\) is"):
            data(task, table(3).assign(part=pd.Series(["train", "test", wrong])))


@pytest.mark.parametrize(
    ("y", "words"),
    [
        ([0, 2, 1], r"'y': 1 of 3 rows \(row 2\) is not a value that the study knows"),
        ([0, None, 1], r"'y': 1 of 3 rows \(row 2\) is without a value"),
        ([0, 0.5, 1], r"'y': 1 of 3 rows \(row 2\) is not a value"),
        (["benign", "malignant", "benign"], r"'y': 3 of 3 rows.*one of 0, 1"),
    ],
)
def test_unknown_target_codes_are_refused(y: list[Any], words: str) -> None:
    """A code that is none of 0 to classes - 1, or none at all."""
    with pytest.raises(InputError, match=words):
        data(Classifier(study()), table(3).assign(y=y))


def test_a_regression_is_in_the_targets_unit() -> None:
    """Learnt as a share of the range, judged and served in the unit; a target out of the range is refused."""
    s = study("Regressor", "target_range = { min = 100.0, max = 300.0 }")
    task = Regressor(s)
    frame = table(400)
    frame["y"] = 200 + 20 * frame["dose"].clip(-5, 5)
    examples = data(task, frame)
    np.testing.assert_allclose(examples.targets[:, 0], (frame["y"] - 100) / 200, rtol=1e-6)
    np.testing.assert_allclose(task.output()(examples.targets)[:, 0], frame["y"], rtol=1e-6)
    outputs = examples.targets + 0.05
    assert values(task.metrics(outputs, examples.targets))["rmse"] == pytest.approx(10, rel=1e-5)
    answers, _ = run(s, task, frame, rounds=30)
    assert values(answers[-1].metrics)["rmse"] < 4 < values(answers[0].metrics)["rmse"]
    assert task.signature()["outputs"] == [{"name": "prediction"}]
    with pytest.raises(
        InputError, match=r"'y': 1 of 2 rows \(row 2\) is outside the study's range \[100, 300\]"
    ):
        data(task, table(2).assign(y=[100.0, 300.1]))


def test_exact_scores_are_sent_only_where_the_study_says_so() -> None:
    """Binned by default; with `auroc = "exact"` every score and label, and no bins."""
    outputs, targets = torch.zeros(4, 1), torch.ones(4, 1)
    assert "auroc_exact" not in Classifier(study()).metrics(outputs, targets)
    exact = Classifier(study(more='[evaluation]\nauroc = "exact"')).metrics(outputs, targets)
    assert exact["auroc_exact"].shape == (4, 2)
    assert "auroc" not in exact


def test_the_signature_names_raw_columns_and_classes() -> None:
    """Inputs in the study's order with range or values, and what is served."""
    assert Classifier(study(data="classes = 3")).signature() == {
        "inputs": [
            {"name": "age", "kind": "numeric", "min": 0.0, "max": 100.0},
            {"name": "dose", "kind": "numeric", "min": -5.0, "max": 5.0},
            {"name": "sex", "kind": "categorical", "values": ["female", "male"]},
        ],
        "outputs": [{"name": "probability", "classes": ["0", "1", "2"]}],
        "missing": "median",
    }


@pytest.mark.parametrize(("keep", "classes"), [(["age", "dose", "sex"], 2), (["age"], 3), (["sex"], 2)])
def test_preprocessing_model_and_output_export_to_onnx(keep: list[str], classes: int, tmp_path: Path) -> None:
    """Numbers, categories or both: the dynamo exporter's graph agrees with torch for any number of raw rows."""
    import onnxruntime

    text = STUDY.format(task="Classifier", data=f"classes = {classes}", more="[model]\nhidden = [4]")
    lines = [
        line for line in text.splitlines() if not line.startswith("features") or line[9:].split()[0] in keep
    ]
    task = Classifier(Study.parse("\n".join(lines)))
    examples = data(task, table(64))
    served = nn.Sequential(task.preprocessing(task.statistics(examples)), task.model(), task.output()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            served,
            (examples.inputs[:3],),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("rows")},),
            verbose=False,
        )
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    with torch.inference_mode():
        expected: NDArray[Any] = served(examples.inputs).numpy()
    for n in (1, 64):
        got = session.run(None, {session.get_inputs()[0].name: examples.inputs[:n].numpy()})[0]
        np.testing.assert_allclose(got, expected[:n], atol=1e-6)
        np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)
