"""A model for Triton and KServe, and which versions hold a site's updates."""

import json
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kserve_schema import WHEELS, Schema, fetched
from peers import triton

from consortium.protocol import cli
from consortium.protocol.errors import InputError
from consortium.server import load_model
from consortium.server.records import Round
from consortium.server.serving.affected import affected_by
from consortium.server.serving.registry import Registry
from consortium.server.serving.scale_out import kserve_service, label

PARSES = """
import json, sys
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
config = text_format.Parse(sys.stdin.read(), model_config_pb2.ModelConfig())
print(json.dumps({
    "name": config.name, "backend": config.backend, "batch": config.max_batch_size,
    "inputs": [[one.name, model_config_pb2.DataType.Name(one.data_type), list(one.dims)] for one in config.input],
    "outputs": [[one.name, list(one.dims)] for one in config.output],
    "bundle": config.parameters["consortium.bundle"].string_value,
}))
"""


def consortium(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(one) for one in arguments])
    return int(end.value.code or 0)


def test_repository_and_service(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The graph's bytes in Triton's places, a service that names where they lie, digests in both; refusals first."""
    out = tmp_path / "out"
    arguments = ["model", "export", exported, "--to", "kserve", "--out", out]
    assert consortium(*arguments, "--uri", "pvc://m/toy") == 4
    assert consortium(*arguments, "--unsigned") == 2
    assert "pvc://models/lung" in capsys.readouterr().err
    assert consortium("model", "export", exported, "--to", "ray", "--out", out) == 2
    assert not out.exists()
    assert consortium(*arguments, "--unsigned", "--uri", "pvc://m/toy") == 0
    assert consortium(*arguments, "--unsigned", "--uri", "pvc://m/toy") == 2
    assert (out / "toy" / "1" / "model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()
    yaml = pytest.importorskip("yaml")
    service = yaml.safe_load((out / "inferenceservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert (model["storageUri"], model["protocolVersion"]) == ("pvc://m/toy", "v2")
    assert service["metadata"]["annotations"]["consortium/model"] == load_model(exported).contract["model"]


@pytest.mark.slow
def test_kserve_knows_every_field(exported: Path, tmp_path: Path) -> None:
    """The service is as KServe's published types have it, and what is not is seen."""
    yaml = pytest.importorskip("yaml")
    wheels = fetched(tmp_path)
    if not wheels:
        pytest.skip(f"{' and '.join(WHEELS)} cannot be downloaded here")
    arguments = ["--to", "kserve", "--out", tmp_path / "o", "--uri", "pvc://m/toy", "--unsigned"]
    assert consortium("model", "export", exported, *arguments) == 0
    service = yaml.safe_load((tmp_path / "o" / "inferenceservice.yaml").read_text())
    schema = Schema(wheels)
    assert schema.mistakes(service, "V1beta1InferenceService") == []
    predictor = service["spec"]["predictor"]
    predictor |= {"minReplicas": "1", "replicas": 1}
    predictor["model"]["resources"]["requests"]["cpu"] = 1
    del predictor["model"]["modelFormat"]
    assert schema.mistakes(service, "V1beta1InferenceService") == [
        ".spec.predictor.minReplicas: int is expected",
        ".spec.predictor.model.modelFormat: is missing",
        ".spec.predictor.model.resources.requests.cpu: str is expected",
        ".spec.predictor.replicas: is unknown",
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_triton_reads_the_configuration(exported: Path, tmp_path: Path) -> None:
    """Triton's own message parses config.pbtxt, and holds the contract's names, types and shapes."""
    python = triton(tmp_path / "triton")
    assert (
        consortium("model", "export", exported, "--to", "triton", "--out", tmp_path / "o", "--unsigned") == 0
    )
    text = (tmp_path / "o" / "toy" / "config.pbtxt").read_text()
    done = subprocess.run([python, "-c", PARSES], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["name"], found["backend"], found["batch"]) == ("toy", "onnxruntime", 1024)
    assert found["inputs"] == [
        ["linear", "TYPE_FP32", [1]], ["cat", "TYPE_FP32", [1]], ["smokes?", "TYPE_STRING", [1]],
    ]  # fmt: skip
    assert found["outputs"] == [["probability", [2]]]
    assert len(found["bundle"]) == 64


@pytest.mark.parametrize(
    ("name", "right"),
    [("breast-cancer", "breast-cancer"), ("a.b_c", "a-b-c"), ("-" * 70, "model"), ("x" * 70, "x" * 50)],
)
def test_names_are_labels(name: str, right: str) -> None:
    """Whatever a study is called, Kubernetes takes the name."""
    assert label(name) == right


@pytest.mark.parametrize("uri", ["", "models", "file:///x", 'pvc://a"b', "pvc://a b", "pvc://a\nx: y"])
def test_addresses_that_are_none(uri: str) -> None:
    """Nothing that would break out of the document, or that KServe cannot read, gets into it."""
    with pytest.raises(InputError, match="--uri"):
        kserve_service({"model": "m", "study": {"digest": "d"}}, "b", "n", uri)


@pytest.mark.slow
def test_versions_that_hold_a_sites_updates(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two versions, one with hospital-b; found withdrawn too, and not by the name of a site that only was asked."""
    from consortium.server.export import export

    registry = Registry(tmp_path / "models", time.time, "tester")
    for number, names in enumerate((("a",), ("a", "b")), 1):
        rounds = tuple(
            Round(n, 0, ("a", "b", "c"), dict.fromkeys(names, 1.0), {"c": "late"}, f"{number}{n}", 1.0)
            for n in (1, 2, 3)
        )
        outcome = replace(finished.outcome, state=replace(finished.outcome.state, rounds=rounds))
        bundle = export(finished.plan, outcome, tmp_path / f"m{number}").path
        registry.register(bundle, "toy", lambda copy: str(load_model(copy).contract["model"]))
    registry.promote("toy", 2)
    (one,) = affected_by(registry, "b").versions
    assert (one["version"], one["aliases"], one["rounds"]) == (2, ["champion"], [1, 2, 3])
    assert [one["version"] for one in affected_by(registry, "a").versions] == [1, 2]
    assert affected_by(registry, "c").versions == ()
    registry.withdraw("toy", 2, "why")
    assert consortium("model", "affected-by", "b", "--registry", registry.folder) == 0
    assert capsys.readouterr().out == "toy@2  withdrawn; rounds 1, 2, 3\n"
    shutil.copy(registry.folder / "toy/1/lineage.json", registry.folder / "toy/2/lineage.json")
    assert consortium("model", "affected-by", "b", "--registry", registry.folder) == 4
    assert "toy/2/lineage.json" in capsys.readouterr().err
