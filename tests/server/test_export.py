"""What is exported: traced by torch, checked in onnxruntime, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from consortium.client import onnx_file, tracing, worker
from consortium.client.site import start
from consortium.protocol.code import load
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.study import Study
from consortium.server import worker_process
from consortium.server.export import export, parity
from consortium.server.records import Plan
from consortium.strategies import fedavg, scaffold
from consortium.strategies.base import Local

OWN = """
import torch
from torch import nn
from consortium.client import Task

class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x)

class Plain(Task):
    net = Linear
    def model(self): return self.net()
    def loss(self, outputs, targets): return outputs.mean()
    def data(self, source): raise NotImplementedError

class Values(Plain):
    class net(Linear):
        def forward(self, x):
            if x.sum() > 0:
                x = x * 2
            return self.layer(x)

class Count(Plain):
    class net(Linear):
        def forward(self, x):
            return self.layer(x) * (2 if x.shape[0] > 5 else 1)

class Drops(Plain):
    class net(Linear):
        def forward(self, x):
            return self.layer(x[x[:, 0] > 0])

class Bessel(Plain):
    class net(Linear):
        def forward(self, x):
            return self.layer(torch.special.bessel_j0(x))

class Normed(Plain):
    def model(self): return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))

class Head(Plain):
    local = ("layer.bias",)

class Broken(Plain):
    def model(self):
        raise KeyError("width")
"""


def own(folder: Path, name: str, data: str = "") -> Study:
    """A study with a task of its own."""
    (folder / "task.py").write_text(OWN)
    text = f'format = 1\n[study]\nname = "own"\ntask = "task:{name}"\nrounds = 1\n[data]\n{data}'
    return Study.parse(text, folder=folder)


def traced(study: Study) -> tracing.Traced:
    task = load(study.task, study.folder)(study)
    return tracing.trace(task, start(study, task, Local()).module, {}, {"consortium.model": "abc"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tracing.Traced:
    """The graph of a task that says nothing of its inputs."""
    return traced(own(tmp_path_factory.mktemp("plain"), "Plain"))


def test_graph_equals_model_along_a_sites_own_path(exported: Path, finished: Any, rows: Any) -> None:
    """Raw rows through the graph and through a site's reading, preprocessing and model give the same to 1e-6."""
    from consortium.server import load_model

    frame = rows(60, seed=3)
    found = load_model(exported).predict(frame).to_numpy()
    expected = finished.reference(frame)
    assert expected.std(0).min() > 0.05, "the rows must differ for this to say anything"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_graph_takes_raw_columns_by_name(exported: Path) -> None:
    """Every column is an input [batch, 1] of its own name, also one that the exporter uses, codes as strings."""
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    said = {one.name: (one.type, one.shape) for one in session.get_inputs()}
    assert said == {
        "linear": ("tensor(float)", ["batch", 1]),
        "cat": ("tensor(float)", ["batch", 1]),
        "smokes?": ("tensor(string)", ["batch", 1]),
    }
    assert [(one.name, one.shape) for one in session.get_outputs()] == [("probability", ["batch", 2])]


def test_contract_says_what_made_the_model(exported: Path, finished: Any) -> None:
    """The contract holds study, model, layout, rounds, metrics (null where undecided), inputs, outputs, parity."""
    contract = json.loads((exported / "contract.json").read_text())
    study = finished.plan.study
    assert contract["study"] == {"name": "toy", "task": study.task, "digest": study.digest}
    assert (contract["model"], contract["rounds"]) == (finished.outcome.digest, 3)
    assert contract["layout"]["digest"] == finished.plan.layout.digest
    assert contract["metrics"] == {"auroc": 0.75, "log_loss": None}
    assert contract["opset"] == 20
    assert contract["inputs"][0] == {
        "name": "linear", "kind": "numeric", "min": 0.0, "max": 200.0, "dtype": "float32", "missing": "median",
    }  # fmt: skip
    assert contract["inputs"][2]["values"] == ["no", "yes", "2"]
    assert contract["outputs"] == [
        {"name": "probability", "classes": ["0", "1"], "shape": [2], "dtype": "float32"}
    ]
    assert 0 <= contract["parity"]["largest_error"] < 1e-6


def test_weights_are_the_committed_ones_bit_for_bit(exported: Path, finished: Any) -> None:
    """model.safetensors holds every array of the layout under its name, with the run's own bytes."""
    from safetensors.numpy import load_file

    arrays = load_file(exported / "model.safetensors")
    expected = finished.plan.layout["shared"].split(finished.outcome.model)
    assert set(arrays) == set(expected)
    assert all(arrays[name].tobytes() == expected[name].tobytes() for name in expected)


def test_file_is_the_same_in_every_process_and_names_no_machine(exported: Path, finished: Any) -> None:
    """The worker's graph equals, byte for byte, one made here; no path, stack trace or class name is in it."""
    labels = onnxruntime.InferenceSession(exported / "model.onnx").get_modelmeta().custom_metadata_map
    net = start(finished.plan.study, finished.task, Local())
    net.load(finished.outcome.model, None)
    again = tracing.trace(finished.task, net.module, finished.outcome.state.statistics, labels)
    written = (exported / "model.onnx").read_bytes()
    assert b"".join(again.onnx) == written
    assert not any(
        word in written for word in (b".py", b"site-packages", str(Path.cwd()).encode(), b"stack_trace")
    )
    onnx.checker.check_model(onnx.load_from_string(written), full_check=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Values", r"line 23: if x\.sum\(\) > 0:.*depends on the values of its inputs; use torch\.where"),
        ("Count", r"depends on the number of rows \(.*<= 5"),
        ("Drops", "rows gave .* answers; one a row is needed"),
        ("Bessel", "ONNX cannot express the model: .*bessel_j0"),
    ],
)
def test_graph_that_bakes_in_its_example_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    """Control flow by values or rows, and unknown operators, are refused with the reason, and torch prints nothing."""
    with pytest.raises(InputError, match=reason):
        traced(own(tmp_path, name))
    assert "forward" not in capfd.readouterr().err


def test_large_weights_stand_in_the_file_as_the_library_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, whether weights are copied into the message or not."""
    copied = traced(own(tmp_path, "Normed", "shape = [1, 8, 8]"))
    assert len(copied.onnx) == 1
    monkeypatch.setattr(onnx_file, "LARGE", 60)
    left_out = traced(own(tmp_path, "Normed", "shape = [1, 8, 8]"))
    assert sum(isinstance(piece, memoryview) for piece in left_out.onnx) >= 2
    assert b"".join(left_out.onnx) == copied.onnx[0]


def test_own_task_is_one_tensor(tmp_path: Path, plain: tracing.Traced) -> None:
    """A task that says nothing of its inputs takes one tensor: of the first layer's width, or the study's shape."""
    assert [(one["name"], one["shape"]) for one in plain.inputs] == [("input", [4])]
    convolution = traced(own(tmp_path, "Normed", "shape = [1, 8, 8]"))
    assert convolution.inputs[0]["shape"] == [1, 8, 8]
    session = onnxruntime.InferenceSession(b"".join(convolution.onnx))
    for rows, probe in zip((1, 4, 17), convolution.probes, strict=True):
        (found,) = session.run(None, dict(probe.inputs))
        assert found.shape == (rows, 3)
        np.testing.assert_allclose(found, probe.outputs["output"], atol=1e-5)


def test_shape_that_nothing_says_is_asked_for(tmp_path: Path) -> None:
    """Where neither study nor task nor first layer says what one input is, the message shows what to write."""
    with pytest.raises(InputError, match=r"shape = \[1, 28, 28\]"):
        traced(own(tmp_path, "Normed"))


def probes(folder: Path, graph: tracing.Traced, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Write the probes as a worker does, with the torch model's answers changed."""
    for probe in graph.probes:
        arrays: dict[str, Any] = {f"input/{name}": value for name, value in probe.inputs.items()}
        arrays |= {f"output/{name}": change(value.copy()) for name, value in probe.outputs.items()}
        np.savez(folder / f"probe-{len(arrays['output/output'])}.npz", allow_pickle=False, **arrays)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a + np.float32(1e-3), "differs from torch by 0.001"),
        (lambda a: a[:, :1], r"onnxruntime gives float32\[.*2\], torch float32\[.*1\]"),
        (lambda a: a * np.float32(np.nan), "not a finite number"),
    ],
)
def test_parity_refuses_what_differs(tmp_path: Path, plain: tracing.Traced, change: Any, reason: str) -> None:
    """Another answer, another shape, or NaN at any batch size is a failed export."""
    outputs = list(plain.outputs)
    probes(tmp_path, plain, lambda a: a)
    assert parity(b"".join(plain.onnx), outputs, tmp_path) < 1e-6
    probes(tmp_path, plain, change)
    with pytest.raises(ConsortiumError, match=reason):
        parity(b"".join(plain.onnx), outputs, tmp_path)


def test_parity_without_probes_is_refused(tmp_path: Path, plain: tracing.Traced) -> None:
    """A worker that left nothing to compare with has proved nothing."""
    with pytest.raises(ConsortiumError, match="no probes"):
        parity(b"".join(plain.onnx), [], tmp_path)


def test_refusal_in_the_worker_reaches_us_and_nothing_is_written(tmp_path: Path, finished: Any) -> None:
    """The worker's reason comes through the process as the same error, and the destination does not appear."""
    study = own(tmp_path, "Values")
    task = load(study.task, study.folder)(study)
    net = start(study, task, Local())
    plan = Plan(study, fedavg(), net.layout, net.vector("shared"))
    outcome = replace(
        finished.outcome, model=plan.initial, state=replace(finished.outcome.state, statistics={})
    )
    target = tmp_path / "out" / "model"
    with pytest.raises(InputError, match=r"task\.py, line 23"):
        export(plan, outcome, target)
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


def test_failed_run_and_taken_folder_are_refused(tmp_path: Path, finished: Any) -> None:
    """A run without a model exports nothing, and an exported model is never overwritten; no worker is started."""
    with pytest.raises(ConsortiumError, match="made no model"):
        export(
            finished.plan, replace(finished.outcome, status="failed", why="no site came"), tmp_path / "model"
        )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "note").touch()
    with pytest.raises(InputError, match="not empty"):
        export(finished.plan, finished.outcome, tmp_path / "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The exchange folder of a worker that is called in this process."""
    (tmp_path / "exchange").mkdir()
    return tmp_path / "exchange"


def ask(command: str, study: Study, folder: Path) -> int:
    (folder / "study.toml").write_text(study.text)
    return worker.main([command, str(folder), "--code", str(study.folder)])


def test_faults_of_the_studys_code_name_the_line(tmp_path: Path, folder: Path) -> None:
    """An exception of the study's own code becomes exit code 2 and one line that names file, line and error."""
    assert ask("initial", own(tmp_path, "Broken"), folder) == 2
    said = json.loads((folder / "error.json").read_text())
    assert said["kind"] == "InputError"
    assert "task.py, line 50: KeyError: 'width'" in said["message"]


def test_model_with_parts_at_the_sites_is_not_whole(tmp_path: Path, folder: Path) -> None:
    """The server does not export a model whose local parts it has never seen; with one site's parts it does."""
    study = own(tmp_path, "Head")
    net = start(study, load(study.task, study.folder)(study), Local())
    (folder / "model.bin").write_bytes(net.vector("shared").tobytes())
    np.savez(folder / "statistics.npz")
    assert ask("export", study, folder) == 2
    assert "stay at the sites (layer.bias)" in json.loads((folder / "error.json").read_text())["message"]
    bias = np.array([3.0, 4.0], np.float32)
    (folder / "local.bin").write_bytes(bias.tobytes())
    assert ask("export", study, folder) == 0
    from safetensors.numpy import load_file

    np.testing.assert_array_equal(load_file(folder / "model.safetensors")["layer.bias"], bias)


def test_first_model_of_a_worker_is_every_sites_first_model(finished: Any) -> None:
    """The worker's first model has the bits of one started in this process, and SCAFFOLD's layout its variates."""
    study = finished.plan.study
    made = worker_process.initial(study, scaffold().local)
    here = start(study, finished.task, scaffold().local)
    assert made.prepares
    assert made.layout == here.layout
    assert made.layout["control"].size > 0
    assert made.vector.tobytes() == here.vector("shared").tobytes()


def test_late_worker_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """At the time limit the worker and its children are killed, and the error says so."""
    child = "import os, subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(ConsortiumError, match=r"took longer than 1\.5 s"):
        worker_process._run([sys.executable, "-c", child], tmp_path, 1.5, "study 'x'")
    assert time.monotonic() - started < 20
    pid = int((tmp_path / "log.txt").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1]:
            break
        time.sleep(0.05)
    else:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the worker's child lives on")


def test_death_of_a_worker_is_told(tmp_path: Path, finished: Any) -> None:
    """A worker that dies without a word is reported with its signal and its last line."""
    command = [sys.executable, "-c", "import os; print('loading', flush=True); os.kill(os.getpid(), 9)"]
    code = worker_process._run(command, tmp_path, 20, "x")
    error = worker_process._error(finished.plan.study, "initial", tmp_path, code)
    assert type(error) is ConsortiumError
    assert "SIGKILL: loading" in str(error)


def test_worker_sees_none_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of ours reaches the worker but those by which programs and libraries are found."""
    monkeypatch.setenv("DATABASE_PASSWORD", "hunter2")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shown = subprocess.run(
        [sys.executable, "-c", "import os; print(os.environ)"],
        env=worker_process._environment(tmp_path), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "hunter2" not in shown
    assert "PYTHONPATH" not in shown


def test_other_weights_from_a_worker_are_refused(exported: Path, finished: Any) -> None:
    """A worker that exports another model than the one it was given is found out."""
    from consortium.server.export import _same_weights

    weights = exported / "model.safetensors"
    _same_weights(weights, finished.plan.layout["shared"], finished.outcome.model)
    other = finished.outcome.model.copy()
    other[5] = np.nextafter(other[5], np.float32(9))
    with pytest.raises(IntegrityError, match=r"in the worker's model\.safetensors"):
        _same_weights(weights, finished.plan.layout["shared"], other)
