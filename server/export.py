"""A finished run becomes a folder that serves: `model.onnx`, `model.safetensors`, `contract.json`, `privacy.json`,
`manifest.json`.

A worker process traces the graph and answers probes with the torch model; here, without torch, onnxruntime must give
the same answers to the same raw inputs before anything is written. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consortium.privacy.mechanisms import RESERVED
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.files import sync_folder
from consortium.protocol.layout import Segment, Vector, digest_of
from consortium.protocol.messages import Statistics
from consortium.server import card, lineage, seal
from consortium.server.model import ONNX, WEIGHTS, open_graph
from consortium.server.records import Outcome, Plan
from consortium.server.worker_process import TIMEOUT, exchange, run

OPSET = 20
LINEAGE = "lineage.json"
Sign = Callable[[bytes, bytes], Mapping[str, Any] | None]
"""From a manifest and the lineage that it lists to the signature's document, or None where nobody signs."""
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
"""How far onnxruntime may be from torch, as a share of the larger of 1 and the torch model's answer."""


_PIECE = 1 << 18
"""Numbers that are compared at a time."""

Content = bytes | mmap.mmap


@dataclass(frozen=True)
class Exported:
    """Where a model lies, and its contract."""

    path: Path
    contract: Mapping[str, Any]


def export(
    plan: Plan,
    outcome: Outcome,
    destination: Path,
    *,
    local: Vector | None = None,
    sign: Sign | None = None,
    timeout: float = TIMEOUT,
    trusted: bool = False,
    ledger: Mapping[str, Any] | None = None,
) -> Exported:
    """Write the model that a run selected into the new folder `destination`.

    local: the `local` segment, for a model of which parts stay at the sites: then this is one site's own model.
    sign: gives the content of `signature.json` for a manifest and the lineage; None leaves the model unsigned.
    timeout: seconds for the worker. trusted: whether code that the study brings runs without a sandbox.
    ledger: what the server's ledger holds of the run (`StudyLedger.of_run`); None: the run's own records count.

    Raises:
        InputError: the destination is taken, or the graph depends on the values or the number of its rows.
        ConsortiumError: the run gave no model, the graph's answers differ from the model's, or the worker failed.
    """
    study = plan.study
    if outcome.status == "failed":
        raise ConsortiumError(
            f"study '{study.name}': the run made no model ({outcome.why}); nothing to export"
        )
    destination = destination.absolute()
    refuse_taken(destination)
    with exchange() as folder:
        _give(folder, outcome.model, local, outcome.state.statistics)
        run("export", study, plan.strategy.local, folder, timeout=timeout, trusted=trusted)
        weights = _mapped(folder, WEIGHTS)
        _same_weights(folder / WEIGHTS, plan.layout["shared"], outcome.model)
        contract = _contract(plan, outcome)
        files: dict[str, Content] = {}
        if "safetensors" in study.export.formats:
            files[WEIGHTS] = weights
        if "onnx" in study.export.formats:
            files[ONNX] = _mapped(folder, ONNX)
            signature = json.loads(_read(folder, "signature.json"))
            error = parity(folder / ONNX, signature["outputs"], folder)
            contract |= {"opset": OPSET, **signature, "parity": {"largest_error": error}}
            contract["decisions"] = _decisions(signature["outputs"])
    made = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    contract["files"] = made
    documents = _documents(plan, outcome, contract, ledger)
    hashes = made | {name: hashlib.sha256(content).hexdigest() for name, content in documents.items()}
    files |= documents | _sealed(hashes, documents[LINEAGE], plan.federation, sign, study.export.approvals)
    place(files, destination)
    return Exported(destination, contract)


def _documents(
    plan: Plan, outcome: Outcome, contract: Mapping[str, Any], ledger: Mapping[str, Any] | None
) -> dict[str, bytes]:
    """What stands beside the model, as bytes by name."""
    came, private = lineage.lineage(plan, outcome), lineage.privacy(plan, outcome, ledger)
    judged, reference = lineage.evaluation(plan, outcome), lineage.reference(plan, outcome)
    bill = card.bill(contract, came, judged, contract["files"])
    documents: dict[str, Mapping[str, Any]] = {
        seal.CONTRACT: contract,
        LINEAGE: came,
        "privacy.json": private,
        "evaluation.json": judged,
        "reference.json": reference,
        "bom.cdx.json": bill,
    }
    text = card.card(contract, came, private, judged)
    return {name: seal.plain_json(one) for name, one in documents.items()} | {"MODEL_CARD.md": text.encode()}


def _sealed(
    hashes: Mapping[str, str], came: bytes, federation: str, sign: Sign | None, approvals: int
) -> dict[str, bytes]:
    """The manifest, and its signature where somebody signs. approvals: of sites, before the model is used."""
    if sign is not None:
        manifest = seal.manifest(hashes, federation, approvals)
        signature = sign(manifest, came)
        if signature is not None:
            return {seal.MANIFEST: manifest, seal.SIGNATURE: seal.signature(signature)}
    return {seal.MANIFEST: seal.manifest(hashes, None)}


def _give(folder: Path, model: Vector, local: Vector | None, statistics: Statistics) -> None:
    np.ascontiguousarray(model).tofile(folder / "model.bin")
    if local is not None:
        np.ascontiguousarray(local).tofile(folder / "local.bin")
    arrays: dict[str, Any] = {name: sums for name, sums in statistics.items() if name not in RESERVED}
    np.savez(folder / "statistics.npz", allow_pickle=False, **arrays)


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ConsortiumError(f"export: the worker left no {name}") from error


def _mapped(folder: Path, name: str) -> Content:
    """A large file that the worker left; in memory only so far as it is looked at."""
    try:
        with (folder / name).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ConsortiumError(f"export: the worker left no {name}") from error


def _same_weights(weights: Path, segment: Segment, model: Vector) -> None:
    """The worker must have exported the model that it was given, bit for bit."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="np") as file:
            names = set(file.keys())
            for name, expected in segment.split(model).items():
                found = file.get_tensor(name) if name in names else None  # one array at a time
                if found is None or found.dtype != expected.dtype or not _same_bytes(found, expected):
                    raise IntegrityError(
                        f"export: '{name}' in the worker's {WEIGHTS} is not what the run committed"
                    )
    except SafetensorError as error:
        raise IntegrityError(f"export: the worker's {WEIGHTS} is damaged ({error})") from error


def _same_bytes(one: Vector, other: Vector) -> bool:
    """Whether two arrays have the same bytes; compared in pieces, which take no memory."""
    if one.size != other.size:
        return False
    some, others = one.reshape(-1), other.reshape(-1)
    return all(
        some[i : i + _PIECE].tobytes() == others[i : i + _PIECE].tobytes() for i in range(0, one.size, _PIECE)
    )


def _contract(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """What whoever uses the model needs to know, so far as the run says it; plain JSON, the same for the same run."""
    study, state, judged = plan.study, outcome.state, outcome.evaluation
    made = judged.round if judged is not None and outcome.digest != state.digest else state.round
    pooled = judged.pooled if judged is not None and judged.model == outcome.digest else {}
    return {
        "format": seal.FORMAT,
        "consortium": version("consortium"),
        "study": {"name": study.name, "task": study.task, "digest": study.digest},
        "model": digest_of([outcome.model]),
        "layout": {"digest": plan.layout.digest, **plan.layout.document()},
        "strategy": plan.strategy.name,
        "rounds": made,
        "metrics": {name: value if math.isfinite(value) else None for name, value in pooled.items()},
    }


def _decisions(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How an output of class probabilities becomes a class. No threshold is tuned; one half is the default."""
    found: dict[str, Any] = {}
    for one in outputs:
        classes = one.get("classes")
        if classes is not None and len(classes) == 2:
            found[one["name"]] = {"class": classes[1], "threshold": 0.5, "tuned": False}
        elif classes is not None:
            found[one["name"]] = {"class": "the most probable", "threshold": None, "tuned": False}
    return found


def parity(graph: bytes | Path, outputs: list[Mapping[str, Any]], folder: Path) -> float:
    """The largest difference between onnxruntime and the torch model over the worker's probes in `folder`.

    As a share of the larger of 1 and the torch model's answer.

    Raises:
        ConsortiumError: it is larger than `TOLERANCE`, the shapes differ, or an answer is not finite.
    """
    session = open_graph(graph, ONNX)
    largest = 0.0
    probes = sorted(folder.glob("probe-*.npz"))
    if len(probes) == 0:
        raise ConsortiumError("export: the worker left no probes to check the graph by")
    for path in probes:
        with np.load(path, allow_pickle=False) as table:
            arrays = {name: table[name] for name in table.files}
        inputs = {
            name.removeprefix("input/"): _fed(a) for name, a in arrays.items() if name.startswith("input/")
        }
        found = session.run([str(one["name"]) for one in outputs], inputs)
        for one, got in zip(outputs, found, strict=True):
            expected = arrays[f"output/{one['name']}"]
            rows = f"output '{one['name']}', {len(expected)} rows"
            largest = max(largest, _difference(rows, got, expected))
    return largest


def _fed(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(object) if array.dtype.kind == "U" else array


def _difference(what: str, got: NDArray[Any], expected: NDArray[Any]) -> float:
    again = "the model is not exported; nothing was written"
    if got.shape != expected.shape or got.dtype != expected.dtype:
        found, right = f"{got.dtype}{list(got.shape)}", f"{expected.dtype}{list(expected.shape)}"
        raise ConsortiumError(f"export: {what}: onnxruntime gives {found}, torch {right}; {again}")
    if not (np.isfinite(expected).all() and np.isfinite(got).all()):
        raise ConsortiumError(
            f"export: {what}: an answer is not a finite number, so training diverged; {again}"
        )
    wide = got.astype(np.float64) - expected.astype(np.float64)
    error = float(np.max(np.abs(wide) / np.maximum(1.0, np.abs(expected.astype(np.float64))), initial=0.0))
    limit = TOLERANCE.get(str(expected.dtype), 0.0)
    if error > limit:
        raise ConsortiumError(
            f"export: {what}: onnxruntime differs from torch by {error:.2g}, at most {limit:.0e} is right; {again}"
        )
    return error


def refuse_taken(destination: Path) -> None:
    """Raises InputError where a bundle cannot be written, because something is there."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"{destination}: is not empty; give a new folder, exported models are never changed")


def place(files: Mapping[str, Content], destination: Path) -> None:
    """Write into a folder beside the destination, then rename it: whole or not at all."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        try:
            for name, content in files.items():
                descriptor = os.open(partial / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(partial)
            partial.rename(destination)
            sync_folder(destination.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{destination}: cannot be written ({error.strerror}); give another folder"
        ) from error
