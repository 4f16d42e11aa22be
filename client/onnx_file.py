"""A converted graph as the bytes of an ONNX file.

Inputs and outputs get their own names, text columns their codes, and nothing of the machine that wrote it stays in the
file; the same model gives the same bytes.

The file is one message of Protocol Buffers, which their library would hold several times over: as the message's own
copy of all weights, and as its bytes. So large weights are left out of the message, and stand in the file's pieces as
the model itself has them in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGE = 1 << 20
"""Bytes of a weight from which on it is not copied."""

Piece = bytes | memoryview

ML_OPSET = 4
"""Of the operators of classical machine learning, `ai.onnx.ml`; it came with opset 20."""

UNLISTED = -1.0
"""The code of a value that a categorical column does not list, and of a missing one: no place of a one-hot."""


def codes_of(one: Mapping[str, Any]) -> dict[str, float]:
    """The place of each value that a categorical column lists; the empty text is no value."""
    return {str(value): float(code) for code, value in enumerate(one["values"]) if str(value)}


def onnx_file(
    program: Any,
    inputs: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str],
) -> list[Piece]:
    """The pieces, one after the other, of the file of a `torch.onnx.ONNXProgram`; its inputs and outputs are in the
    order given.

    labels: what the file says of itself, readable as the metadata of an onnxruntime session.
    """
    import onnx_ir as ir
    import torch

    graph = program.model.graph
    taken = {str(one["name"]) for one in (*inputs, *outputs)}
    for value in [*_values_of(graph), *graph.initializers.values()]:
        if value.name in taken:  # a column may be called like one of the exporter's own values
            value.name = f"inner/{value.name}"
    for value, one in zip(graph.outputs, outputs, strict=True):
        value.name = one["name"]
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(["batch", *value.shape[1:]])
    for place, one in enumerate(inputs):
        graph.inputs[place].name = one["name"]
        if one["kind"] == "categorical":
            _encode(ir, graph, place, one)
    if any(one["kind"] == "categorical" for one in inputs):
        program.model.opset_imports["ai.onnx.ml"] = ML_OPSET
    large = _large(ir, graph)
    proto = ir.to_proto(program.model)
    _strip(proto)
    proto.producer_name, proto.producer_version = "pytorch", torch.__version__
    for key, text in sorted(labels.items()):
        proto.metadata_props.add(key=key, value=text)
    return _pieces(proto, large)


def _large(ir: Any, graph: Any) -> dict[str, NDArray[Any]]:
    """The large weights of a graph by name, each of which gets one without numbers in its place."""
    found = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if (
            tensor is None
            or tensor.nbytes < LARGE
            or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        ):
            continue
        array = np.ascontiguousarray(tensor.numpy())
        found[name] = array.astype(array.dtype.newbyteorder("<"), copy=False)
        value.const_value = ir.Tensor(np.empty(0, array.dtype), name=name)
    return found


def _pieces(proto: Any, large: Mapping[str, NDArray[Any]]) -> list[Piece]:
    """A model's bytes with its fields in ascending order, as the library writes them."""
    if not large:
        return [_bytes(proto)]
    weights: list[Piece] = []
    for one in proto.graph.initializer:
        array = large.get(one.name)
        data: Piece = b""
        if array is not None:
            one.ClearField("raw_data")
            del one.dims[:]
            one.dims.extend(array.shape)
            data = array.reshape(-1).view(np.uint8).data
        content = _bytes(one)
        if array is not None:  # it is the last field that is there
            content += _begin(_RAW_DATA, len(data))
        weights += [_begin(_INITIALIZER, len(content) + len(data)) + content, data]
    graph = [*_around(proto.graph, _INITIALIZER, weights)]
    return _around(proto, _GRAPH, [_begin(_GRAPH, sum(map(len, graph))), *graph])


_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Numbers of the fields ModelProto.graph, GraphProto.initializer, TensorProto.raw_data (onnx.proto)."""


def _around(message: Any, number: int, within: Sequence[Piece]) -> list[Piece]:
    """The bytes of a message, with `within` in place of the field of that number. The message loses its fields."""
    after = type(message)()
    after.CopyFrom(message)
    for field, _ in message.ListFields():
        if field.number >= number:
            message.ClearField(field.name)
    for field, _ in after.ListFields():
        if field.number <= number:
            after.ClearField(field.name)
    return [_bytes(message), *within, _bytes(after)]


def _begin(number: int, length: int) -> bytes:
    """How a field of `length` bytes begins: number and wire type 2, then the length as a varint."""
    out = bytearray([number << 3 | 2])
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*out, length])


def _bytes(message: Any) -> bytes:
    written: bytes = message.SerializeToString(deterministic=True)
    return written


def _values_of(graph: Any) -> Iterator[Any]:
    """Every value of a graph: inputs, and what nodes compute, in branches too."""
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _encode(ir: Any, graph: Any, place: int, one: Mapping[str, Any]) -> None:
    """Put a string input before a column of codes: the place of the value in the study's list, or -1."""
    column, codes = graph.inputs[place], codes_of(one)
    name = str(one["name"])
    text = ir.Value(name=name, shape=column.shape, type=ir.TensorType(ir.DataType.STRING))
    encoder = ir.node(
        "LabelEncoder",
        [text],
        {
            "keys_strings": list(codes),
            "values_floats": list(codes.values()),
            "default_float": UNLISTED,
        },
        domain="ai.onnx.ml",
        name=f"codes/{name}",
    )
    encoder.outputs[0].name = f"codes/{name}"
    encoder.outputs[0].shape, encoder.outputs[0].type = column.shape, column.type
    graph.insert_before(graph[0], encoder)
    column.replace_all_uses_with(encoder.outputs[0])
    graph.inputs[place] = text


def _strip(message: Any) -> None:
    """Remove what the exporter noted on the side (stack traces with paths, names of Python modules), everywhere."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string", "value_info"):
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            repeated = value if not hasattr(value, "ListFields") else [value]
            for one in repeated:
                _strip(one)
