"""The model card and the bill of materials of a bundle, written from its other documents. Pure.

The card follows Mitchell et al., "Model Cards for Model Reporting" (arXiv 1810.03993); the bill is CycloneDX 1.6 with
its model card. What nobody has stated (intended use, limits) the card asks for instead of inventing it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

MATERIALS = ("consortium", "numpy", "onnxruntime", "onnxscript", "safetensors", "torch")
"""Distributions that made the model; onnxruntime and numpy alone serve it."""

Document = Mapping[str, Any]


def card(contract: Document, lineage: Document, privacy: Document, evaluation: Document) -> str:
    """MODEL_CARD.md."""
    study = contract["study"]
    lines = [
        f"# {study['name']}",
        "",
        f"Model `{contract['model']}`, trained by federated learning with Consortium {contract['consortium']}.",
        "",
        "## Where it comes from",
        "",
        f"- federation: {lineage['federation']}, run {lineage['run']}",
        f"- study: {study['name']}, task `{study['task']}`, digest `{study['digest']}`",
        f"- {contract['rounds']} rounds of {contract['strategy']}",
        f"- sites whose updates it holds: {', '.join(lineage['sites']) or 'not recorded'}",
        "",
        "## What it takes and gives",
        "",
        *_ends(contract),
        "",
        "## How it was judged",
        "",
        *_judged(evaluation),
        *_quantized(contract),
        "",
        "## Privacy",
        "",
        str(privacy["statement"]),
        "",
        "## What this card does not say",
        "",
        "Nobody has stated the intended use, who must not use it, or its known limits. Whoever puts the model to use "
        "states them, and has them reviewed, before anybody relies on an answer.",
        "",
    ]
    return "\n".join(lines)


def _ends(contract: Document) -> Iterator[str]:
    if not contract.get("inputs"):
        yield "Weights alone; no graph was exported."
        return
    yield "| input | what |"
    yield "| --- | --- |"
    for one in contract["inputs"]:
        yield f"| {_cell(one['name'])} | {_cell(about(one))} |"
    yield ""
    yield "| output | what |"
    yield "| --- | --- |"
    for one in contract["outputs"]:
        yield f"| {_cell(one['name'])} | {_cell(about(one))} |"


def about(one: Document) -> str:
    """One input or output in words."""
    kind = one.get("kind")
    if kind == "numeric":
        empty = "missing values become the median" if one["missing"] == "median" else "none missing"
        return f"a number, clipped to {one['min']:g} to {one['max']:g}; {empty}"
    if kind == "categorical":
        return "one of " + ", ".join(map(str, one["values"]))
    numbers = f"{one['dtype']} (n, {', '.join(map(str, one['shape']))})"
    return f"{numbers}, by class {', '.join(map(str, one['classes']))}" if one.get("classes") else numbers


def _judged(evaluation: Document) -> Iterator[str]:
    if not evaluation["evaluated"]:
        yield "It was not evaluated."
        return
    rows = {"all sites": evaluation["pooled"], **evaluation["sites"]}
    names = sorted({name for row in rows.values() for name in row if name != "suppressed"})
    yield "| holdout of | " + " | ".join(map(_cell, names)) + " |"
    yield "| --- |" + " --- |" * len(names)
    for site, row in rows.items():
        cells = ["suppressed" if "suppressed" in row else _number(row.get(name)) for name in names]
        yield f"| {_cell(site)} | " + " | ".join(cells) + " |"
    calibration = evaluation["calibration"]
    if calibration is not None:
        yield ""
        yield f"Expected calibration error of class {calibration['class']}: {calibration['expected_error']:.3f}."
    yield ""
    yield f"Cells of fewer than {evaluation['smallest_cell']} examples are suppressed. No groups were compared."


def _quantized(contract: Document) -> Iterator[str]:
    about = contract.get("quantization")
    if about is None:
        return
    judged, size = about["judged"], about["bytes"]
    yield ""
    yield (
        f"The graph is in 8 bits ({about['kind']}), {size['fp32'] / size['int8']:.1f} times smaller, calibrated by the "
        f"ranges of {about['calibrated']['rows']} rows. The figures above are of the 32-bit model. Of {judged['rows']} "
        f"labelled rows it gets {judged['accuracy_int8']:.2%} right, the 32-bit model {judged['accuracy_fp32']:.2%}."
    )


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def bill(contract: Document, lineage: Document, evaluation: Document, hashes: Mapping[str, str]) -> Document:
    """bom.cdx.json. hashes: SHA-256 (hex) of the files that hold the model, by name."""
    study = contract["study"]
    name = str(study["name"])
    pooled = evaluation.get("pooled", {})
    metrics = [
        {"type": metric, "value": repr(value), "slice": "all sites"}
        for metric, value in sorted(pooled.items())
        if isinstance(value, float)
    ]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": str(contract["model"]),
        "description": f"{contract['rounds']} rounds of {contract['strategy']} over {len(lineage['sites'])} sites",
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": str(study["task"]),
                "inputs": [{"format": f"{one['name']}: {about(one)}"} for one in contract.get("inputs", ())],
                "outputs": [
                    {"format": f"{one['name']}: {about(one)}"} for one in contract.get("outputs", ())
                ],
            },
            "quantitativeAnalysis": {"performanceMetrics": metrics},
        },
        "properties": [
            {"name": "consortium:study", "value": str(study["digest"])},
            {"name": "consortium:federation", "value": str(lineage["federation"])},
            {"name": "consortium:run", "value": str(lineage["run"])},
        ],
    }
    files: list[dict[str, Any]] = [
        {
            "type": "file",
            "bom-ref": f"file:{file}",
            "name": file,
            "hashes": [{"alg": "SHA-256", "content": sha256}],
        }
        for file, sha256 in sorted(hashes.items())
    ]
    made: list[dict[str, Any]] = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{one}@{version(one)}",
            "name": one,
            "version": version(one),
            "purl": f"pkg:pypi/{one}@{version(one)}",
        }
        for one in MATERIALS
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, '/'.join(map(str, hashes.values())) or name)}",
        "version": 1,
        "metadata": {"component": model},
        "components": [*files, *made],
        "dependencies": [{"ref": "model", "dependsOn": [one["bom-ref"] for one in [*files, *made]]}],
    }
