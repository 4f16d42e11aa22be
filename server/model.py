"""An exported model, verified, and its predictions: onnxruntime, numpy and pandas, without torch or Flower."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.layout import Layout, digest_of
from consortium.server import seal
from consortium.server.seal import CONTRACT, FORMAT

if TYPE_CHECKING:
    import pandas as pd

    from consortium.server.columns import Table

ONNX, WEIGHTS = "model.onnx", "model.safetensors"


@dataclass(frozen=True)
class Model:
    """One exported model. `contract` is its contract.json; `session` the onnxruntime session of its graph."""

    path: Path
    contract: Mapping[str, Any]
    session: Any

    def predict(self, table: Table, *, first_row: int = 1) -> pd.DataFrame:
        """Predictions for raw rows, one row each, in order.

        table: a data frame or a mapping with every column that the contract names (others are not looked at): numbers
            in the study's units, codes as the study lists them. Numbers are clipped to the declared range; a code that
            is not listed counts as none of them. For a model of one tensor: an array (n, *shape), or a mapping to it.
        first_row: what the first row is called in messages.

        A column a number that is given: `probability_0`, `probability_1` for an output `probability` with classes 0
        and 1. The index is the table's.

        Raises:
            InputError: naming columns that are absent, and rows that are not numbers, or missing where the study
                refuses that.
        """
        import pandas as pd

        from consortium.server.columns import as_frame, columns, tensor

        inputs = self.contract["inputs"]
        if inputs[0]["kind"] == "tensor":
            arrays, index = {inputs[0]["name"]: tensor(inputs[0], table)}, None
        else:
            frame = as_frame(table)
            index = frame.index
            arrays = columns(inputs, frame, first_row)
        rows = len(next(iter(arrays.values())))
        return pd.DataFrame(self.answers(arrays, rows), index=index)

    def answers(self, arrays: Mapping[str, NDArray[Any]], rows: int) -> dict[str, NDArray[Any]]:
        """As `predict`, from the graph's inputs: by column of the answer its numbers, (rows,)."""
        found = self.run(arrays) if rows else {}
        answers: dict[str, NDArray[Any]] = {}
        for output in self.contract["outputs"]:
            names = _names(output)
            flat = found.get(output["name"], np.empty(0, output["dtype"])).reshape(rows, len(names))
            answers |= {name: flat[:, i] for i, name in enumerate(names)}
        return answers

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The graph's outputs by name, for its inputs by name: columns (n, 1), text as objects, or one tensor."""
        names = self._outputs
        return dict(zip(names, self.session.run(names, arrays), strict=True))

    @cached_property
    def _outputs(self) -> list[str]:
        return [str(output["name"]) for output in self.contract["outputs"]]


def load_model(path: str | Path, *, root: str | None = None) -> Model:
    """The model in an exported folder, once every file in it is what the manifest says.

    root: the fingerprint of the root certificate of the federation that must have signed the manifest. Without it, who
        can change the folder can also sign it, as a federation of their own.

    Raises:
        InputError: there is no exported model, or one without an ONNX graph.
        IntegrityError: a file is missing, too many, or differs by a byte, which the message names; another or nobody
            signed it; or it was withdrawn.
    """
    folder = Path(path)
    files = verified(folder, root)
    contract = _contract(folder, files)
    if ONNX not in files:
        raise InputError(
            f'{folder}: has no {ONNX}; export it with formats = ["onnx"] under [export] in the study'
        )
    session = open_graph(files[ONNX], str(folder / ONNX))
    said = session.get_modelmeta().custom_metadata_map
    for key, right in (
        ("consortium.model", contract["model"]),
        ("consortium.study", contract["study"]["digest"]),
    ):
        if said.get(key) != right:
            raise IntegrityError(f"{folder / ONNX}: says {key} {said.get(key)}, but {CONTRACT} says {right}")
    return Model(folder, contract, session)


def verified(folder: Path, root: str | None = None) -> dict[str, bytes]:
    """The content of every file of an exported model, by name, as its manifest has it.

    Raises:
        InputError, IntegrityError: see `load_model`.
    """
    sealed = seal.read(folder, root)
    return {name: seal.content(folder, sealed, name) for name in sealed.files}


def verify_weights(folder: Path, files: Mapping[str, bytes]) -> None:
    """Check that the weights beside the graph are the model that the rounds committed, by its digest.

    Raises:
        IntegrityError: they are not.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    contract = _contract(folder, files)
    shared = Layout.parse(contract["layout"])["shared"]
    try:
        found = digest_of([shared.join(load(files[WEIGHTS]))])
    except (SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError(
            f"{folder / WEIGHTS}: does not hold the arrays of {CONTRACT} ({error})"
        ) from error
    if found != contract["model"]:
        raise IntegrityError(
            f"{folder / WEIGHTS}: is the model {found}, but {CONTRACT} says {contract['model']}"
        )


def open_graph(graph: bytes | Path, name: str) -> Any:
    """An onnxruntime session of one thread over a graph: its bytes, or its file, which is then not in memory twice.

    Raises:
        ConsortiumError: onnxruntime cannot run it.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        source = str(graph) if isinstance(graph, Path) else graph
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except (
        errors.Fail,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
        errors.NotImplemented,
        errors.RuntimeException,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConsortiumError(
            f'{name}: onnxruntime cannot run it ({reason}); [model] dtype = "float32" may help'
        ) from error


def _contract(folder: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    contract: dict[str, Any] = json.loads(files[CONTRACT])
    if contract.get("format") != FORMAT:
        raise InputError(
            f"{folder / CONTRACT}: format {contract.get('format')} is not known here; this version reads {FORMAT}"
        )
    return contract


def _names(output: Mapping[str, Any]) -> list[str]:
    """One name a number of an output: by class, else by place, else the output's own."""
    name, shape = str(output["name"]), [int(n) for n in output["shape"]]
    if math.prod(shape) == 1:
        return [name]
    classes = output.get("classes")
    if classes is not None and shape == [len(classes)]:
        return [f"{name}_{one}" for one in classes]
    return ["_".join([name, *map(str, place)]) for place in np.ndindex(*shape)]
