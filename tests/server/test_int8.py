"""A bundle in 8 bits: as right as the one that it is of, a third of its size, or refused."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consortium.protocol.cli import main
from consortium.protocol.errors import InputError, IntegrityError, RefusedError
from consortium.protocol.study import Study
from consortium.server import int8, int8_bundle, seal
from consortium.server.export import export
from consortium.server.federation import Federation
from consortium.server.model import ONNX, WEIGHTS, Model, load_model
from consortium.server.predicting import predict_file
from consortium.server.records import Plan
from consortium.simulations import simulate
from consortium.strategies.chosen import strategy_of

STUDY = """format = 1
[study]
name = "corners"
task = "consortium.client.tasks.image:Classifier"
rounds = 5
seed = 3
[data]
shape = [16, 16, 1]
classes = 4
holdout = 0.2
[model]
channels = [16, 32]
hidden = 64
[training]
optimizer = "sgd"
lr = 0.1
batch_size = 32
local_epochs = 2
[strategy]
name = "fedavg"
[cohort]
min_sites = 2
"""


def images(rows: int, seed: int) -> dict[str, Any]:
    """Noise in which one corner, the class, is a little brighter."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, rows)
    x = rng.random((rows, 16, 16, 1)).astype(np.float32) / 2
    for image, place in zip(x, y, strict=True):
        top, left = divmod(int(place), 2)
        image[8 * top : 8 * top + 8, 8 * left : 8 * left + 8] += 0.05 + 0.3 * rng.random()
    return {"x": x, "y": y}


@dataclass(frozen=True)
class Made:
    """A bundle of a network that was trained, and files of two sites' labelled rows."""

    bundle: Path
    data: list[Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("int8")
    study = Study.parse(STUDY)
    result = simulate(study, sites={f"site-{i}": images(300, i) for i in range(3)}, processes=0)
    plan = Plan(study, strategy_of(study), result.layout, result.outcome.model, prepares=False)
    bundle = export(plan, result.outcome, folder / "model").path
    files = [folder / "north.npz", folder / "south.npz"]
    for seed, file in enumerate(files):
        np.savez(file, **images(400, 10 + seed))
    return Made(bundle, files)


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["model", *map(str, words)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.slow
def test_int8_by_the_ranges_of_two_sites_is_as_right_and_a_third_of_the_size(
    made: Made, tmp_path: Path
) -> None:
    """By the commands, the same bytes twice; the bundle verifies and serves, and says what was done and released."""
    words = []
    for number, data in enumerate(made.data):
        file = tmp_path / f"site-{number}.json"
        assert run("ranges", made.bundle, "--data", data, "--out", file, "--unsigned") == 0
        words += ["--ranges", file]
    for data in made.data:
        words += ["--data", data]
    for name in ("one", "two"):
        assert run("quantize", made.bundle, *words, "--out", tmp_path / name, "--unsigned") == 0
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert WEIGHTS not in one

    model, before = load_model(tmp_path / "one"), load_model(made.bundle)
    about = model.contract["quantization"]
    assert about["calibrated"] == {"rows": 800, "sets": 2}
    size = (made.bundle / ONNX).stat().st_size / len(one[ONNX])
    assert size >= 3 <= about["bytes"]["fp32"] / about["bytes"]["int8"]
    fresh = int8_bundle.Labelled(*_fresh())
    accuracy = [
        (m.predict(fresh.inputs).to_numpy().argmax(1) == fresh.labels).mean() for m in (before, model)
    ]
    assert accuracy[0] > 0.9  # a network that learned something
    assert accuracy[1] >= accuracy[0] - 0.01
    assert int8_bundle.RELEASE in json.loads(one["privacy.json"])["not_covered"]
    assert "The graph is in 8 bits" in one["MODEL_CARD.md"].decode()
    kinds = {node.op_type for node in _graph(one[ONNX]).node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds


def _fresh() -> tuple[Any, Any]:
    """Rows that neither calibrated nor judged it."""
    found = images(2000, 99)
    return np.moveaxis(found["x"], -1, 1).copy(), found["y"]


def _graph(content: bytes) -> Any:
    import onnx

    return onnx.load_from_string(content).graph


@pytest.mark.slow
def test_merged_ranges_are_those_of_the_rows_together(made: Made, tmp_path: Path) -> None:
    """So nothing is lost by calibrating at the sites."""
    model = load_model(made.bundle)
    each = [int8_bundle.read(file, model) for file in made.data]
    graph = (made.bundle / ONNX).read_bytes()
    apart = int8.merged([int8.ranges(graph, [{"image": one.inputs}]) for one in each])
    together = int8.ranges(graph, [{"image": np.concatenate([one.inputs for one in each])}])
    assert apart == together


@pytest.mark.slow
def test_a_quantisation_that_loses_is_refused(made: Made, tmp_path: Path) -> None:
    """Ranges a thousand times too wide leave no steps for the images: exit code 3, and nothing is written."""
    model = load_model(made.bundle)
    found = int8_bundle.calibration(model, int8_bundle.read(made.data[0], model))
    found["ranges"] = {name: [1000 * low, 1000 * high] for name, (low, high) in found["ranges"].items()}
    (tmp_path / "wide.json").write_text(json.dumps(found))
    words = [
        "--ranges",
        tmp_path / "wide.json",
        "--data",
        made.data[0],
        "--out",
        tmp_path / "out",
        "--unsigned",
    ]
    assert run("quantize", made.bundle, *words) == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_cannot_be_made_int8_is_refused(made: Made, exported: Path, tmp_path: Path) -> None:
    """A private model, another model's ranges, a model of columns, too few rows, rows of another shape, a stranger's
    bundle, and a bundle that nobody signed where that was not said."""
    model = load_model(made.bundle)
    rows = int8_bundle.read(made.data[0], model)
    found = int8_bundle.calibration(model, rows)
    with pytest.raises(InputError, match="another model"):
        int8_bundle.quantize(made.bundle, [{**found, "graph": "0" * 64}], [rows], tmp_path / "out", None)
    few = int8_bundle.Labelled(rows.inputs[:99], rows.labels[:99])
    with pytest.raises(InputError, match="99 labelled rows"):
        int8_bundle.quantize(made.bundle, [found], [few], tmp_path / "out", None)
    with pytest.raises(InputError, match="classifiers of one tensor"):
        int8_bundle.read(made.data[0], load_model(exported))
    np.savez(tmp_path / "wrong.npz", x=np.zeros((4, 8, 8, 1)), y=np.zeros(4, int))
    with pytest.raises(InputError, match=r"wrong\.npz: 'image' has shape"):
        int8_bundle.read(tmp_path / "wrong.npz", model)
    federation = Federation.init(tmp_path / "fed", name="lung", host="127.0.0.1", now=1.8e9)
    with pytest.raises(IntegrityError, match="is not signed by federation 'lung'"):
        int8_bundle.signer_of(made.bundle, federation)
    assert run("quantize", made.bundle, "--data", made.data[0], "--out", tmp_path / "out") == 4
    private = _private(made.bundle, tmp_path / "private")
    with pytest.raises(RefusedError, match="no budget"):
        int8_bundle.refuse_private(private)


def _private(bundle: Path, place: Path) -> Path:
    """A copy whose statement says that the model is private."""
    import hashlib
    import shutil

    shutil.copytree(bundle, place)
    document = json.loads((place / "privacy.json").read_bytes()) | {"mechanism": "dp-sgd"}
    (place / "privacy.json").write_bytes(seal.plain_json(document))
    files = json.loads((place / "manifest.json").read_bytes())["files"]
    files["privacy.json"] = hashlib.sha256((place / "privacy.json").read_bytes()).hexdigest()
    (place / "manifest.json").write_bytes(seal.manifest(files, None))
    return place


def test_ranges_from_strangers_are_checked(tmp_path: Path) -> None:
    """Not finite, downwards, of other tensors, no JSON: refused, and the tensor named."""
    for low, high in ((0.0, float("nan")), (1.0, 0.0), (float("-inf"), 0.0)):
        with pytest.raises(InputError, match="tensor 'conv'"):
            int8.checked({"conv": (low, high)})
    with pytest.raises(InputError, match="different graphs"):
        int8.merged([{"a": (0.0, 1.0)}, {"b": (0.0, 1.0)}])
    assert int8.merged([{"a": (0.0, 1.0)}, {"a": (-1.0, 0.5)}]) == {"a": (-1.0, 1.0)}
    for text, reason in (
        ("[]", "holds no ranges"),
        ("[" * 100_000, "holds no ranges"),
        ('{"format": 1, "graph": "g", "rows": Infinity, "ranges": {}}', "rows: a whole number"),
        ('{"format": 1, "graph": "g", "rows": -9, "ranges": {}}', "rows: a whole number"),
        ('{"format": 1, "graph": "g", "rows": 9, "ranges": {"conv": [0, 1e300]}}', "tensor 'conv'"),
        (
            f'{{"format": 1, "graph": "g", "rows": 9, "ranges": {{"conv": [0, 1{"0" * 999}]}}}}',
            "holds no ranges",
        ),
    ):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(InputError, match=rf"r\.json.*{reason}"):
            int8_bundle.calibration_in(tmp_path / "r.json")
    with pytest.raises(InputError, match=r"none\.json: cannot be read \(No such file"):
        int8_bundle.calibration_in(tmp_path / "none.json")


CONTRACT = {
    "inputs": [{"name": "image", "kind": "tensor", "shape": [1, 4, 4], "dtype": "float32"}],
    "outputs": [{"name": "probability", "classes": ["0", "1"], "shape": [2], "dtype": "float32"}],
}


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


SOUND = npz(x=np.zeros((4, 4, 4, 1)), y=np.zeros(4, int))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"text", SOUND[: len(SOUND) // 2], SOUND[:60] + bytes(20) + SOUND[80:],
        npz(x=np.array(1.0), y=np.zeros(1, int)), npz(x=np.zeros(4), y=np.zeros(4, int)), npz(),
        npz(x=np.array([{}], object), y=np.zeros(1, int)), npz(x=np.zeros((4, 4, 4, 1)), y=np.array(["a"])),
    ],
)  # fmt: skip
def test_a_file_of_rows_that_is_damaged_is_named(content: bytes, tmp_path: Path) -> None:
    """Whatever numpy says of it: wrong input, exit code 2, by quantisation and by prediction."""
    model, path = Model(tmp_path, CONTRACT, None), tmp_path / "rows.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.npz"):
        int8_bundle.read(path, model)
    if content != npz(x=np.zeros((4, 4, 4, 1)), y=np.array(["a"])):
        with pytest.raises(InputError):
            predict_file(model, path, tmp_path / "out.csv", False)
    for place in (tmp_path / "none.npz", tmp_path / "rows.npy"):
        with pytest.raises(InputError, match=place.name):
            int8_bundle.read(place, model)


def test_the_gate_counts_rows_and_bytes() -> None:
    """One row in a hundred may be lost, and no more; a third of the size, and no less."""
    int8_bundle._gate({"fp32": 990, "int8": 980}, 1000, 300, 100)
    with pytest.raises(RefusedError, match="979 of 1000 rows right"):
        int8_bundle._gate({"fp32": 990, "int8": 979}, 1000, 300, 100)
    with pytest.raises(RefusedError, match="at least 3 times smaller"):
        int8_bundle._gate({"fp32": 990, "int8": 990}, 1000, 299, 100)
