"""Using an exported model: verified to the byte, raw tables in, predictions out, by onnxruntime alone."""

import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from consortium.protocol import cli
from consortium.protocol.errors import InputError, IntegrityError
from consortium.server import load_model
from consortium.server.columns import tensor


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported model that a test may spoil."""
    return shutil.copytree(exported, tmp_path / "model")


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "contract.json"])
def test_one_changed_bit_is_found_and_the_file_named(copy: Path, name: str) -> None:
    """A model of which any file differs in one bit is not loaded, and the message names the file."""
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{name}: is not what was exported") as caught:
        load_model(copy)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "contract.json"])
def test_missing_file_is_found(copy: Path, name: str) -> None:
    """A file of the manifest that is gone is named."""
    (copy / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name}: is missing"):
        load_model(copy)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 1, "files": {"../x": "0"}}'])
def test_damaged_manifest_is_refused(copy: Path, text: str) -> None:
    """A manifest that is no manifest, or names files elsewhere, is damage, not a crash."""
    (copy / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json: is damaged"):
        load_model(copy)


def test_folder_that_is_no_model_is_wrong_input(tmp_path: Path) -> None:
    """A path without a model is a mistake of the user, not an integrity failure."""
    with pytest.raises(InputError, match="is not an exported model"):
        load_model(tmp_path / "nowhere")


def seal(folder: Path) -> None:
    """Write a manifest that fits the files as they are, as whoever changes all of them would."""
    import hashlib

    from consortium.server.seal import plain_json

    manifest = json.loads((folder / "manifest.json").read_text())
    names = manifest["files"]
    manifest["files"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
    (folder / "manifest.json").write_bytes(plain_json(manifest))


def test_graph_of_another_model_is_refused_in_a_fitting_manifest(copy: Path) -> None:
    """The graph itself says which model it is, so another graph under this contract is found."""
    contract = json.loads((copy / "contract.json").read_text())
    (copy / "contract.json").write_text(json.dumps({**contract, "model": "0" * 64}))
    seal(copy)
    with pytest.raises(IntegrityError, match=r"model\.onnx: says consortium\.model"):
        load_model(copy)


def test_predictions_do_not_depend_on_batch_or_form(exported: Path, rows: Any) -> None:
    """One row at a time, a mapping of lists, other orders and further columns give the same; the index is kept."""
    model, frame = load_model(exported), rows(9, seed=5)
    frame.index = pd.Index([f"r{i}" for i in range(9)])
    found = model.predict(frame)
    assert list(found.columns) == ["probability_0", "probability_1"]
    assert list(found.index) == list(frame.index)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    single = np.concatenate([model.predict(frame.iloc[[i]]).to_numpy() for i in range(9)])
    np.testing.assert_allclose(single, found.to_numpy(), atol=1e-6)
    lists = {name: frame[name].tolist() for name in ["smokes?", "cat", "linear"]}
    np.testing.assert_array_equal(model.predict(lists).to_numpy(), found.to_numpy())


def test_missing_and_unlisted_are_what_they_were_in_training(exported: Path, finished: Any) -> None:
    """NaN is the federated median; a code that is not listed and a missing one weigh alike; numbers are clipped."""
    model = load_model(exported)

    def p(linear: Any, smokes: Any) -> float:
        found = model.predict({"linear": [linear], "cat": [0.5], "smokes?": [smokes]})
        return float(found.to_numpy()[0, 1])

    histogram = finished.outcome.state.statistics["histogram"][0]
    median = float(finished.task.preprocessing(finished.outcome.state.statistics).median[0])
    assert histogram.sum() > 100
    assert p(np.nan, "yes") == pytest.approx(p(median, "yes"), abs=1e-6)
    assert p(None, "yes") == p("NA", "yes") == p("", "yes") == p(np.nan, "yes")
    assert p(50, "often") == p(50, None) == p(50, np.nan) == p(50, "")
    assert abs(p(50, "often") - p(50, "yes")) > 1e-3
    assert p(1e9, "no") == p(200, "no") != p(150, "no")
    assert p("50.0", "no") == p(50, " no ")
    assert p(50, 2) == p(50, 2.0) == p(50, "2.0") == p(50, "2") != p(50, "often")


def test_everything_wrong_with_a_table_is_said_at_once(exported: Path) -> None:
    """Absent columns with the nearest name; then all cells that are no numbers, by column and row."""
    model = load_model(exported)
    with pytest.raises(InputError) as caught:
        model.predict({"Linear": [1.0], "smokes?": ["no"]})
    assert "column 'linear': there is no such column, did you mean 'Linear'?" in str(caught.value)
    assert "column 'cat': there is no such column" in str(caught.value)
    with pytest.raises(InputError) as caught:
        model.predict({"linear": ["1", "x", "2"], "cat": [0, np.inf, -np.inf], "smokes?": ["no"] * 3})
    assert "column 'linear': 1 row (2): not a finite number" in str(caught.value)
    assert "column 'cat': 2 rows (2, 3): not a finite number" in str(caught.value)
    twice = pd.DataFrame([[1.0, 2.0, 3.0, "no"]], columns=["linear", "linear", "cat", "smokes?"])
    with pytest.raises(InputError, match="2 columns have this name"):
        model.predict(twice)
    with pytest.raises(InputError, match="takes columns by name"):
        model.predict(np.zeros((2, 3)))


def test_missing_where_the_study_refuses_it(exported: Path) -> None:
    """With missing = "refuse" an empty cell is an error, in numbers and in codes, and an unlisted code is not."""
    loaded = load_model(exported)
    inputs = [{**one, "missing": "refuse"} for one in loaded.contract["inputs"]]
    strict = type(loaded)(loaded.path, {**loaded.contract, "inputs": inputs}, loaded.session)
    strict.predict({"linear": [1], "cat": [2], "smokes?": ["often"]})
    with pytest.raises(InputError) as caught:
        strict.predict({"linear": [None, 2.0], "cat": [2, 2], "smokes?": ["no", ""]})
    assert "column 'linear': 1 row (1): no value" in str(caught.value)
    assert "column 'smokes?': 1 row (2): no value" in str(caught.value)


def test_empty_table_has_columns(exported: Path, rows: Any) -> None:
    """No rows in, no rows out, with the columns that there would be."""
    found = load_model(exported).predict(rows(3).iloc[:0])
    assert (list(found.columns), len(found)) == (["probability_0", "probability_1"], 0)


def test_one_tensor_is_checked() -> None:
    """An array of another shape, kind or range is refused; whole numbers are not taken for shares."""
    one = {"name": "image", "kind": "tensor", "shape": [2, 2], "dtype": "float32", "min": 0.0, "max": 1.0}
    assert tensor(one, {"image": np.full((3, 2, 2), 0.5)}).dtype == np.float32
    wrong: list[tuple[Any, str]] = [
        (np.zeros((3, 4)), r"shape \(3, 4\); \(n, 2, 2\)"),
        (np.zeros((3, 2, 2), np.uint8), "holds uint8; float32"),
        (np.full((3, 2, 2), np.nan), r"3 rows \(1, 2, 3\): NaN"),
        (np.full((3, 2, 2), 200.0), "holds 200 to 200; numbers from 0 to 1"),
        ({"imagge": 1}, "there is no 'image', did you mean 'imagge'"),
        (pd.DataFrame({"image": [1]}), "not a table"),
    ]
    for given, reason in wrong:
        with pytest.raises(InputError, match=reason):
            tensor(one, given)


def test_fresh_process_predicts_without_training_code(exported: Path, rows: Any, tmp_path: Path) -> None:
    """A new process loads the model and predicts the same raw rows; torch, Flower and our client are never imported."""
    rows(5).to_json(tmp_path / "rows.json")
    program = """
import sys, pandas
from consortium.server import load_model
found = load_model(sys.argv[1]).predict(pandas.read_json(sys.argv[2], dtype={"smokes?": str}))
heavy = {"torch", "flwr", "onnx", "onnxscript", "sklearn", "consortium.client"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
print(found.to_json())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, exported, tmp_path / "rows.json"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    here = load_model(exported).predict(rows(5))
    np.testing.assert_allclose(
        pd.read_json(io.StringIO(done.stdout.strip().splitlines()[-1])).to_numpy(), here.to_numpy(), atol=1e-6
    )


def consortium(*arguments: object) -> int:
    """Run the command line in this process; gives the exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(one) for one in arguments])
    return int(end.value.code or 0)


@pytest.fixture
def patients(rows: Any, tmp_path: Path) -> Path:
    """A CSV file with columns that the model does not take."""
    rows(7).drop(columns="ill").assign(note="007").to_csv(tmp_path / "patients.csv", index=False)
    return tmp_path / "patients.csv"


def test_predict_command_streams_csv_and_parquet(
    exported: Path,
    rows: Any,
    patients: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows come out in order, ids as they went in, the same from CSV and Parquet and whatever the chunks."""
    from consortium.server import predicting

    monkeypatch.setattr(predicting, "CHUNK", 3)
    out = patients.with_name("out.csv")
    assert consortium("model", "predict", exported, "--in", patients, "--out", out, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == 7
    found = pd.read_csv(out, dtype={"note": str})
    assert list(found.columns) == ["id", "note", "probability_0", "probability_1"]
    assert (found["id"].tolist(), set(found["note"])) == ([f"p{i}" for i in range(7)], {"007"})
    expected = load_model(exported).predict(rows(7)).to_numpy()
    np.testing.assert_allclose(found.iloc[:, 2:].to_numpy(), expected, atol=1e-6)
    rows(7).to_parquet(patients.with_suffix(".parquet"))
    again = patients.with_name("again.csv")
    assert (
        consortium("model", "predict", exported, "--in", patients.with_suffix(".parquet"), "--out", again)
        == 0
    )
    np.testing.assert_allclose(pd.read_csv(again).iloc[:, -2:].to_numpy(), expected, atol=1e-6)
    patients.write_text("linear,cat,smokes?\n")
    assert consortium("model", "predict", exported, "--in", patients, "--out", again) == 0
    assert again.read_text() == "probability_0,probability_1\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a table"),
        (b"\xff\xfe\x00\x01,\n", "is not a table"),
        (b"linear,cat\n1,2\n", "column 'smokes?': there is no such column"),
        (b"linear,cat,smokes?\n1,2,no\n1,2,no\n1,2,no\n1,x,no\n", "column 'cat': 1 row (4)"),
        (b"linear,cat,smokes?,probability_0\n1,2,no,3\n", "already has columns probability_0"),
    ],
)
def test_bad_tables_are_wrong_input_and_leave_no_file(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    reason: str,
) -> None:
    """Exit 2 with the reason, rows counted over the whole file, and no half-written output."""
    from consortium.server import predicting

    monkeypatch.setattr(predicting, "CHUNK", 2)
    (tmp_path / "in.csv").write_bytes(content)
    assert (
        consortium(
            "model", "predict", exported, "--in", tmp_path / "in.csv", "--out", tmp_path / "o.csv", "--strict"
        )
        == 2
    )
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_rows_that_cannot_be_predicted_are_told_and_left_empty(
    exported: Path,
    rows: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bad rows are counted over the whole file and get no prediction; the others have theirs; the same in Parquet."""
    from consortium.server import predicting

    monkeypatch.setattr(predicting, "CHUNK", 3)
    frame = rows(8).drop(columns="ill")
    frame["cat"] = frame["cat"].astype(str)
    frame.loc[[1, 6], "cat"] = ["x", "inf"]
    frame.loc[2, "linear"] = 1e6
    frame.to_csv(tmp_path / "in.csv", index=False)
    frame.to_parquet(tmp_path / "in.parquet")
    for source, out in (("in.csv", "out.csv"), ("in.parquet", "out.parquet"), ("in.csv", "both.parquet")):
        given = ["--in", tmp_path / source, "--out", tmp_path / out, "--json"]
        assert consortium("model", "predict", exported, *given) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["rows"], said["bad_rows"]) == (8, 2)
        assert said["problems"] == [
            "column 'cat': 1 row (2): not a finite number", "column 'cat': 1 row (7): not a finite number",
        ]  # fmt: skip
        assert said["beyond"]["linear"] >= 1
        assert said["beyond"]["smokes?"] >= 1
        read = pd.read_csv if out.endswith("csv") else pd.read_parquet
        found = read(tmp_path / out)
        assert found["id"].tolist() == [f"p{i}" for i in range(8)]
        assert found["probability_1"].isna().tolist() == [i in (1, 6) for i in range(8)]
        good = frame.drop(index=[1, 6])
        expected = load_model(exported).predict(good)["probability_1"]
        np.testing.assert_allclose(found["probability_1"].dropna(), expected, atol=1e-6)
    assert (
        consortium("model", "predict", exported, "--in", tmp_path / "in.csv", "--out", tmp_path / "o.csv")
        == 0
    )
    assert "no prediction: column 'cat': 1 row (2)" in capsys.readouterr().err


def database(folder: Path, frame: pd.DataFrame) -> str:
    """The URL of a database with the frame as table `patients`."""
    with sqlite3.connect(folder / "clinic.db") as made:
        frame.to_sql("patients", made, index=False, if_exists="append")
    return f"sqlite:///{folder / 'clinic.db'}"


def test_a_query_gives_the_predictions_that_its_rows_in_a_file_give(
    exported: Path,
    rows: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Numbers, texts and NULL alike, over several parts; bad rows by number; no rows, no predictions."""
    from consortium.server import predicting

    monkeypatch.setattr(predicting, "CHUNK", 3)
    frame = rows(8).drop(columns="ill").astype({"cat": object})
    frame.loc[4, "cat"] = "x"
    monkeypatch.setenv("CLINIC", database(tmp_path, frame))
    frame.to_csv(tmp_path / "in.csv", index=False)
    query = ["--sql", "SELECT * FROM patients", "--url", "env:CLINIC"]
    for out in ("sql.csv", "sql.parquet"):
        capsys.readouterr()
        assert consortium("model", "predict", exported, *query, "--out", tmp_path / out, "--json") == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["rows"], said["problems"]) == (8, ["column 'cat': 1 row (5): not a finite number"])
    file = tmp_path / "file.csv"
    assert consortium("model", "predict", exported, "--in", tmp_path / "in.csv", "--out", file) == 0
    expected = pd.read_csv(file)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "sql.csv"), expected)
    found = pd.read_parquet(tmp_path / "sql.parquet")
    pd.testing.assert_series_equal(
        found["probability_1"], expected["probability_1"], rtol=1e-6, check_dtype=False
    )
    query[1] += " WHERE 0"
    assert consortium("model", "predict", exported, *query, "--out", tmp_path / "none.csv") == 0
    assert (tmp_path / "none.csv").read_text() == "id,probability_0,probability_1\n"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--sql", "SELECT 1"], "--sql QUERY and --url URL"),
        (["--in", "x.csv", "--sql", "SELECT 1", "--url", "env:CLINIC"], "either --in FILE"),
        (["--sql", "SELECT 1", "--url", "postgresql://me:hunter2@host/db"], "--url: holds a password"),
        (["--sql", "SELECT 1", "--url", "env:CLINIC", "--password", "hunter2"], "env:NAME or file:PATH"),
        (["--sql", "SELECT 1", "--url", "env:NO_SUCH"], "variable NO_SUCH is not set"),
        (["--sql", "SELEKT", "--url", "env:CLINIC"], "--sql: the database refused"),
        (["--sql", "SELECT id FROM patients", "--url", "env:CLINIC"], "column 'linear': there is no such"),
    ],
)
def test_bad_queries_are_wrong_input_and_repeat_no_password(
    exported: Path,
    rows: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    reason: str,
) -> None:
    """Exit 2 with what is wrong, and no file."""
    monkeypatch.setenv("CLINIC", database(tmp_path, rows(3)))
    assert consortium("model", "predict", exported, *words, "--out", tmp_path / "out.csv") == 2
    said = capsys.readouterr().err
    assert reason in said
    assert "hunter2" not in said
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "sql"])
def test_memory_does_not_grow_with_the_rows(kind: str, exported: Path, rows: Any, tmp_path: Path) -> None:
    """Many more rows take no more memory at the peak, a tenth aside."""
    frame = rows(50_000).drop(columns="ill")
    program = """
import resource, sys
from consortium.protocol.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for times in (4, 40) if kind == "csv" else (2, 8):
        given: list[str | Path] = ["--in", tmp_path / "in.csv"]
        with (tmp_path / "in.csv").open("w") as file:
            for place in range(times):
                frame.to_csv(file, index=False, header=place == 0)
                if kind == "sql":
                    given = ["--sql", "SELECT * FROM patients", "--url", database(tmp_path, frame)]
        done = subprocess.run(
            [sys.executable, "-c", program, "model", "predict", exported, *given, "--out", tmp_path / "out.csv"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_absent_input_and_unwritable_output_are_wrong_input(
    exported: Path, patients: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing file and a missing folder are named, with exit 2."""
    nowhere = patients.with_name("nowhere")
    assert (
        consortium("model", "predict", exported, "--in", nowhere, "--out", patients.with_name("o.csv")) == 2
    )
    assert f"{nowhere}: No such file" in capsys.readouterr().err
    assert consortium("model", "predict", exported, "--in", patients, "--out", nowhere / "o.csv") == 2
    assert "No such file" in capsys.readouterr().err


def test_verify_and_show_commands(
    exported: Path, copy: Path, finished: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """`verify` says what it checked and exits 4 on damage; `show` tells inputs, outputs and what made the model."""
    assert consortium("model", "verify", exported, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verified"] is True
    assert said["model"] == finished.outcome.digest
    assert consortium("model", "show", exported) == 0
    shown = capsys.readouterr().out
    for part in (
        "toy",
        "3 rounds of fedavg",
        "auroc 0.75",
        "linear: a number, clipped to 0 to 200",
        "no, yes, 2",
    ):
        assert part in shown
    assert consortium("model", "show", exported, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == 3
    (copy / "model.safetensors").write_bytes(b"x")
    assert consortium("model", "verify", copy) == 4
    assert "model.safetensors" in capsys.readouterr().err


def test_verify_ties_weights_to_the_rounds(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other weights under a fitting manifest are not the model whose digest the rounds recorded."""
    from safetensors.numpy import load_file, save_file

    arrays = load_file(copy / "model.safetensors")
    arrays["2.bias"] = arrays["2.bias"] + np.float32(1)
    save_file(arrays, copy / "model.safetensors")
    seal(copy)
    assert consortium("model", "verify", copy) == 4
    assert "model.safetensors: is the model" in capsys.readouterr().err


def test_help_has_examples_and_no_traceback_is_shown(tmp_path: Path) -> None:
    """Every command's help shows one to copy; a wrong path from a real terminal gives one line and exit 2."""
    command = Path(sys.executable).with_name("consortium")
    environment = {**os.environ, "COLUMNS": "200"}
    for name in ("verify", "show", "predict"):
        done = subprocess.run(
            [command, "model", name, "--help"], capture_output=True, text=True, check=False, env=environment
        )
        assert f"Example: consortium model {name}" in done.stdout, done.stderr
    done = subprocess.run(
        [command, "model", "verify", tmp_path], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
