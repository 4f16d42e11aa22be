"""A bundle in 8 bits from a bundle: calibrated over several sites' rows, judged on labelled ones, and sealed anew.

What it takes and gives, where it comes from and who judged it stay; `contract.json` says how it was made and what it
cost. It is a bundle like any other, so it is registered, gated at the sites and served as one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consortium.protocol.errors import InputError, IntegrityError, RefusedError
from consortium.server import card, int8, seal
from consortium.server.columns import reading_arrays, tensor
from consortium.server.export import place, refuse_taken
from consortium.server.model import ONNX, WEIGHTS, Model, load_model, open_graph, verified

FORMAT = 1
BATCH = 256
FEWEST = 100
"""Labelled rows, below which a loss of one row in a hundred could not be seen."""
RELEASE = "the smallest and largest number of each activation over the rows that int8 was calibrated by, by site, once"

Seal = Callable[[bytes], Mapping[str, Any]]
"""From a manifest to the document of its signature."""


@dataclass(frozen=True)
class Labelled:
    """Rows (n, *shape) as a model takes them, and the place of each one's class (n,)."""

    inputs: NDArray[Any]
    labels: NDArray[np.int64]


def read(path: Path, model: Model) -> Labelled:
    """Labelled rows of an .npz file: x, as the image task reads it (n, height, width, channels), or an array of the
    model's input's name as it is served; and y, the places of the classes.

    Raises:
        InputError: the model is no classifier of one tensor, or the file is not such a file.
    """
    one, classes = model.contract["inputs"][0], _classes(model)
    if path.suffix != ".npz":
        raise InputError(
            f"{path}: an .npz file would be right; write it with numpy.savez(path, x=..., y=...)"
        )
    with reading_arrays(path), np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if name in ("x", "y", one["name"])}
    if "y" not in arrays or len(arrays) < 2:
        raise InputError(
            f"{path}: needs the arrays y and x, or y and {one['name']}; it has {', '.join(arrays) or 'none'}"
        )
    given = arrays.get(str(one["name"]))
    if given is None:
        x = arrays["x"]
        given = x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x
        given = np.moveaxis(given, -1, 1) if given.ndim > 1 else given
    try:
        inputs = tensor(one, given)
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix('predict: ')}") from error
    labels = arrays["y"]
    fits = labels.shape == (len(inputs),) and labels.dtype.kind in "iu" and len(labels) > 0
    if not fits or not (labels.min() >= 0 and labels.max() < classes):
        raise InputError(f"{path}: y: {len(inputs)} whole numbers from 0 to {classes - 1} would be right")
    return Labelled(inputs, labels.astype(np.int64))


def _classes(model: Model) -> int:
    inputs, outputs = model.contract["inputs"], model.contract["outputs"]
    if (
        len(inputs) != 1
        or inputs[0]["kind"] != "tensor"
        or len(outputs) != 1
        or not outputs[0].get("classes")
    ):
        raise InputError(
            f"{model.path}: int8 is for classifiers of one tensor, such as images; this model is none"
        )
    return len(outputs[0]["classes"])


def refuse_private(folder: Path) -> None:
    """Raises RefusedError where the bundle's model is differentially private: ranges would be a release that nobody
    accounts for."""
    mechanism = json.loads(verified(folder)["privacy.json"])["mechanism"]
    if mechanism != "none":
        raise RefusedError(
            f"{folder}: the model is private ({mechanism}), and ranges of activations over records are a release that "
            "no budget is charged for; serve it as it is"
        )


def calibration(model: Model, data: Labelled) -> dict[str, Any]:
    """What a site hands over: the ranges of its rows, and the graph that they are of."""
    graph = (model.path / ONNX).read_bytes()
    found = int8.ranges(graph, ({_input(model): part} for part in _parts(data.inputs)))
    return {
        "format": FORMAT,
        "graph": hashlib.sha256(graph).hexdigest(),
        "rows": len(data.inputs),
        "ranges": {name: list(both) for name, both in sorted(found.items())},
    }


def calibration_in(path: Path) -> dict[str, Any]:
    """A document of `calibration`, from a file.

    Raises:
        InputError: it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        about = {"format": found["format"], "graph": str(found["graph"]), "rows": found["rows"]}
        ranges = {str(name): (float(low), float(high)) for name, (low, high) in found["ranges"].items()}
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); correct the path or its permissions"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: holds no ranges; make them with: consortium model ranges") from error
    if about["format"] != FORMAT:
        raise InputError(f"{path}: format {about['format']} is not known here; this version reads {FORMAT}")
    if type(about["rows"]) is not int or about["rows"] < 1:
        raise InputError(f"{path}: rows: a whole number from 1 would be right")
    try:
        return {**about, "ranges": int8.checked(ranges)}
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def quantize(
    folder: Path,
    calibrations: Sequence[Mapping[str, Any]],
    judges: Sequence[Labelled],
    out: Path,
    sign: Seal | None,
) -> dict[str, Any]:
    """Write the bundle in `folder` anew into the new folder `out`, in 8 bits; returns what `contract.json` says of it.

    calibrations: of one or more sites. judges: labelled rows, in all at least `FEWEST`.

    Raises:
        RefusedError: it gets more rows wrong than `int8.LARGEST_LOSS` allows, or is not `int8.LEAST_SHRINKING` times
            smaller, or the model is private.
        InputError: the ranges are another graph's, the rows are too few, or `out` is taken.
    """
    refuse_taken(out)
    refuse_private(folder)
    model, files = load_model(folder), verified(folder)
    whole = files[ONNX]
    for one in calibrations:
        if one["graph"] != hashlib.sha256(whole).hexdigest():
            raise InputError(f"ranges: they are of another model than {folder}; make them over this one")
    rows = sum(len(one.labels) for one in judges)
    if rows < FEWEST:
        raise InputError(
            f"{rows} labelled rows cannot show a loss of one in a hundred; give at least {FEWEST}"
        )
    small = int8.quantized(whole, int8.merged([dict(one["ranges"]) for one in calibrations]))
    right = {
        "fp32": _right(model, model.session, judges),
        "int8": _right(model, open_graph(small, ONNX), judges),
    }
    _gate(right, rows, len(whole), len(small))
    about = {
        "kind": "static int8, QDQ",
        "of": hashlib.sha256(whole).hexdigest(),
        "calibrated": {"rows": sum(int(one["rows"]) for one in calibrations), "sets": len(calibrations)},
        "judged": {"rows": rows, **{f"accuracy_{kind}": n / rows for kind, n in right.items()}},
        "bytes": {"fp32": len(whole), "int8": len(small)},
    }
    _write(files, small, about, out, sign, seal.read(folder).required)
    return about


def _gate(right: Mapping[str, int], rows: int, whole: int, small: int) -> None:
    lost = right["fp32"] - right["int8"]
    if lost > int8.LARGEST_LOSS * rows:
        raise RefusedError(
            f"int8 is refused: it gets {right['int8']} of {rows} rows right, and fp32 {right['fp32']}; at most "
            f"{int8.LARGEST_LOSS:.0%} may be lost. Calibrate with more rows, or rows as they will be served"
        )
    if whole < int8.LEAST_SHRINKING * small:
        raise RefusedError(
            f"int8 is refused: it has {small} bytes, and fp32 {whole}; at least {int8.LEAST_SHRINKING:g} times smaller "
            "is asked for, and a small network does not become so: serve it as it is"
        )


def _write(
    files: Mapping[str, bytes],
    graph: bytes,
    about: Mapping[str, Any],
    out: Path,
    sign: Seal | None,
    approvals: int,
) -> None:
    """The new bundle, whole or not at all. The 32-bit weights are not in it."""
    documents = {name: json.loads(content) for name, content in files.items() if name.endswith(".json")}
    contract = {**documents[seal.CONTRACT], "quantization": about}
    contract["files"] = {ONNX: hashlib.sha256(graph).hexdigest()}
    private = documents["privacy.json"]
    private = {**private, "not_covered": [*private["not_covered"], RELEASE]}
    came, judged = documents["lineage.json"], documents["evaluation.json"]
    bill = card.bill(contract, came, judged, contract["files"])
    text = card.card(contract, came, private, judged)
    made = {name: content for name, content in files.items() if name not in (ONNX, WEIGHTS)}
    made |= {
        ONNX: graph,
        seal.CONTRACT: seal.plain_json(contract),
        "privacy.json": seal.plain_json(private),
        "bom.cdx.json": seal.plain_json(bill),
        "MODEL_CARD.md": text.encode(),
    }
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in made.items()}
    if sign is None:
        made[seal.MANIFEST] = seal.manifest(hashes, None)
    else:
        made[seal.MANIFEST] = seal.manifest(hashes, str(came["federation"]), approvals)
        made[seal.SIGNATURE] = seal.signature(dict(sign(made[seal.MANIFEST])))
    place(made, out)


def signer_of(bundle: Path, federation: Any) -> Seal:
    """The seal of the federation (`server/federation.py`) whose bundle this is.

    Raises:
        IntegrityError: another, or nobody, signed the bundle; what is made of it is not this federation's to sign.
    """
    signer = seal.read(bundle).signer
    if signer is None or signer.root != federation.root_fingerprint:
        raise IntegrityError(
            f"{bundle}: is not signed by federation '{federation.config.name}', so int8 of it is not"
        )
    seal_of: Seal = federation.seal
    return seal_of


def _input(model: Model) -> str:
    return str(model.contract["inputs"][0]["name"])


def _right(model: Model, session: Any, judges: Sequence[Labelled]) -> int:
    """How many rows a graph puts into their class."""
    found = 0
    for one in judges:
        for part, labels in zip(_parts(one.inputs), _parts(one.labels), strict=True):
            (answers,) = session.run([model.contract["outputs"][0]["name"]], {_input(model): part})
            found += int((answers.argmax(axis=1) == labels).sum())
    return found


def _parts(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (array[start : start + BATCH] for start in range(0, len(array), BATCH))
