"""A model for serving engines past one machine: a Triton model repository, and a KServe InferenceService over it.

    NAME/config.pbtxt NAME/1/model.onnx   what Triton reads
    inferenceservice.yaml                 for KServe: Triton's runtime, scaled by CPU

The engines know no contract: what `consortium model serve` refuses (ranges, codes, missing values) they answer.
The bundle's digests stand in both, so that what answers can be traced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from consortium.protocol.errors import InputError
from consortium.server import seal
from consortium.server.model import ONNX, verified

MAX_BATCH = 1024
_TYPES = {"float32": "TYPE_FP32", "float64": "TYPE_FP64", "int64": "TYPE_INT64", "uint8": "TYPE_UINT8"}
_LABEL = re.compile(r"[^a-z0-9-]+")


def files(folder: Path, roots: tuple[str, ...], unsigned: bool, uri: str | None) -> dict[str, bytes]:
    """The files for the bundle in `folder`, verified, by their place. uri: for KServe's service; None writes none.

    Raises:
        InputError, IntegrityError: the bundle is refused, or the address is none.
    """
    content = verified(folder)
    sealed = seal.read(folder)
    seal.check_signer(folder, sealed, roots, unsigned)
    seal.check_approved(folder, sealed)
    contract = json.loads(content[seal.CONTRACT])
    if ONNX not in content:
        raise InputError(f"{folder}: has no {ONNX}, which these engines serve")
    name = label(str(contract["study"]["name"]))
    found = {
        f"{name}/config.pbtxt": triton_config(contract, sealed.digest, name).encode(),
        f"{name}/1/{ONNX}": content[ONNX],
    }
    if uri is not None:
        found["inferenceservice.yaml"] = kserve_service(contract, sealed.digest, name, uri).encode()
    return found


def write(found: Mapping[str, bytes], out: Path) -> None:
    """Write files into a new folder, readable by the engine's user too.

    Raises:
        InputError: the folder is taken, or cannot be written.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: is not empty; give a new folder")
        for place, content in found.items():
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            (out / place).write_bytes(content)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); give another --out") from error


def label(name: str) -> str:
    """A name as Kubernetes has it: small letters, digits and '-', at most 50."""
    return _LABEL.sub("-", name.lower()).strip("-")[:50].strip("-") or "model"


def triton_config(contract: Mapping[str, Any], digest: str, name: str) -> str:
    """config.pbtxt of the model. digest: of its bundle."""
    lines = [
        f"name: {_text(name)}",
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        f"max_batch_size: {MAX_BATCH}",
        *_ends("input", contract["inputs"]),
        *_ends("output", contract["outputs"]),
        "instance_group [ { kind: KIND_CPU count: 1 } ]",
        "dynamic_batching { }",
    ]
    for key, value in _provenance(contract, digest).items():
        lines.append(f"parameters {{ key: {_text(key)} value: {{ string_value: {_text(value)} }} }}")
    return "\n".join(lines) + "\n"


def _ends(kind: str, ends: list[Mapping[str, Any]]) -> Iterator[str]:
    for one in ends:
        dtype = "TYPE_STRING" if one.get("kind") == "categorical" else _TYPES[one["dtype"]]
        dims = ", ".join(map(str, one.get("shape", [1])))
        yield f"{kind} {{ name: {_text(one['name'])} data_type: {dtype} dims: [ {dims} ] }}"


def _provenance(contract: Mapping[str, Any], digest: str) -> dict[str, str]:
    return {
        "consortium.bundle": digest,
        "consortium.model": str(contract["model"]),
        "consortium.study": str(contract["study"]["digest"]),
    }


def kserve_service(contract: Mapping[str, Any], digest: str, name: str, uri: str) -> str:
    """inferenceservice.yaml. uri: where KServe finds the repository, such as pvc://models/lung.

    Raises:
        InputError: the address is none that KServe reads.
    """
    if not re.fullmatch(r"(pvc|s3|gs|https?|hdfs|oci)://[^\s\"]{1,500}", uri):
        raise InputError(
            f"--uri: got {uri[:80]!r}; where the cluster finds the folder, such as pvc://models/lung, would be right"
        )
    notes = {
        "serving.kserve.io/deploymentMode": "RawDeployment",
        "serving.kserve.io/autoscalerClass": "hpa",
        **{
            key.replace("consortium.", "consortium/"): value
            for key, value in _provenance(contract, digest).items()
        },
    }
    lines = [
        "apiVersion: serving.kserve.io/v1beta1",
        "kind: InferenceService",
        "metadata:",
        f"  name: {_text(label(name))}",
        "  annotations:",
        *(f"    {key}: {_text(value)}" for key, value in notes.items()),
        "spec:",
        "  predictor:",
        "    minReplicas: 1",
        "    maxReplicas: 4",
        "    scaleMetric: cpu",
        "    scaleTarget: 80",
        "    model:",
        "      modelFormat:",
        "        name: triton",
        "      runtime: kserve-tritonserver",
        "      protocolVersion: v2",
        f"      storageUri: {_text(uri)}",
        "      resources:",
        '        requests: { cpu: "1", memory: 1Gi }',
        '        limits: { cpu: "2", memory: 2Gi }',
    ]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
