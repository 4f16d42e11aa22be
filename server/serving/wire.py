"""A request for predictions in the Open Inference Protocol, version 2, over HTTP: JSON, and JSON with binary tensors.

With the header `Inference-Header-Content-Length` the body is that many bytes of JSON, then the inputs' raw bytes in
order, each as long as its parameter `binary_data_size` says. Pure; nothing here knows HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from consortium.server.serving.tensors import DATATYPES, Given, Numbers, RequestError, framed

MAX_ID = 200
MAX_TENSORS = 10_000
_MAX_DIMENSIONS = 16
_DATATYPES = {np.dtype(name).char: text for name, text in DATATYPES.items() if name != "string"}


@dataclass(frozen=True)
class Asked:
    """A request. outputs: wanted ones by name and whether in binary, all where there are none. binary: the default."""

    id: str
    given: Sequence[Given]
    outputs: Mapping[str, bool]
    binary: bool


def parse(body: bytes, header_length: str | None) -> Asked:
    """The request in a body.

    Raises:
        RequestError: it is none; the message says where.
    """
    if header_length is None:
        try:
            usual = _USUAL.decode(body)
            return Asked(usual.id, usual.inputs, {}, False)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # what is unusual, or wrong, is looked at below, which can say what it is
    length = len(body) if header_length is None else _length(header_length, len(body))
    document = _object(body[:length])
    parameters = _parameters(document, "the request")
    identity = document.get("id", "")
    if not isinstance(identity, str) or len(identity) > MAX_ID:
        raise RequestError(f"'id': a text of at most {MAX_ID} letters is expected")
    given: list[Given] = []
    place = length
    for number, one in enumerate(_list(document, "inputs", required=True)):
        tensor, place = _tensor(one, f"inputs[{number}]", body, place)
        given.append(tensor)
    if place != len(body):
        raise RequestError(f"the body has {len(body) - place} bytes that no input claims")
    outputs: dict[str, bool] = {}
    binary = _flag(parameters, "binary_data_output", False)
    for number, one in enumerate(_list(document, "outputs", required=False)):
        where = f"outputs[{number}]"
        own = _parameters(one, where)
        if "classification" in own:
            raise RequestError(f"{where}: the classification extension is not served")
        outputs[_text(one, "name", where)] = _flag(own, "binary_data", binary)
    return Asked(identity, given, outputs, binary)


def answer(
    found: Mapping[str, NDArray[Any]], asked: Asked, head: Mapping[str, Any]
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where binary tensors follow.

    found: outputs of the model by name, those that were asked for. head: what stands before the outputs.
    """
    outputs, raw = [], []
    for name, array in found.items():
        one: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
        if asked.outputs.get(name, asked.binary):
            raw.append(bytes_of(array))
            one["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            one["data"] = array.reshape(-1).tolist()
        outputs.append(one)
    content = compact({**head, "outputs": outputs})
    return (content + b"".join(raw), len(content)) if raw else (content, None)


def datatype_of(array: NDArray[Any]) -> str:
    """The protocol's datatype of an array."""
    return "BYTES" if array.dtype.kind == "O" else _DATATYPES[array.dtype.char]


def bytes_of(array: NDArray[Any]) -> bytes:
    """An array's elements as the protocol has them, little-endian."""
    if array.dtype.kind == "O":
        return framed(array)
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def document(content: bytes) -> dict[str, Any]:
    """A JSON object from a stranger.

    Raises:
        RequestError: it is none, or holds NaN or infinity as JavaScript writes them.
    """
    return _object(content)


def _object(content: bytes) -> dict[str, Any]:
    try:
        found = _DECODER.decode(content.decode())
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({str(error)[:100] or type(error).__name__})") from error
    if not isinstance(found, dict):
        raise RequestError("the body is not a JSON object")
    return found


def _no_constant(name: str) -> float:
    raise RequestError(f"the body holds {name}, which JSON has not; null stands for a missing number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_ENCODER = msgspec.json.Encoder()


def compact(document: Mapping[str, Any]) -> bytes:
    """A document as JSON without blanks, in UTF-8; a text of a stranger's that UTF-8 has not (half a surrogate pair)
    stands as it came, escaped."""
    try:
        return _ENCODER.encode(document)
    except UnicodeEncodeError:
        return json.dumps(document, separators=(",", ":")).encode()


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    """A request as nearly all are. It is read in one pass, which does not say what is wrong where something is."""

    inputs: Annotated[list[Numbers], msgspec.Meta(max_length=MAX_TENSORS)]
    id: Annotated[str, msgspec.Meta(max_length=MAX_ID)] = ""


_USUAL = msgspec.json.Decoder(_Request)


def _length(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= most):
        raise RequestError(
            f"Inference-Header-Content-Length: got {text[:20]!r}; at most the body's {most} is right"
        )
    return int(text)


def _tensor(one: Any, where: str, body: bytes, place: int) -> tuple[Given, int]:
    name, datatype = _text(one, "name", where), _text(one, "datatype", where)
    shape = one.get("shape")
    sound = isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS and all(type(n) is int for n in shape)
    if not sound or any(not 0 <= n < 2**40 for n in shape):
        raise RequestError(f"{where}: 'shape' must be a list of whole numbers from 0")
    size = _parameters(one, where).get("binary_data_size")
    if size is None:
        if not isinstance(one.get("data"), list):
            raise RequestError(
                f"{where}: 'data' must be a list, or parameter 'binary_data_size' a number of bytes"
            )
        return Given(name, datatype, tuple(shape), one["data"]), place
    if type(size) is not int or size < 0 or "data" in one:
        raise RequestError(f"{where}: 'binary_data_size' must be a number of bytes, without 'data'")
    if place + size > len(body):
        raise RequestError(f"{where}: the body ends before its {size} bytes")
    return Given(name, datatype, tuple(shape), body[place : place + size]), place + size


def _list(document: Mapping[str, Any], key: str, required: bool) -> Sequence[Any]:
    found = document.get(key, None if required else [])
    if not isinstance(found, list) or len(found) > MAX_TENSORS:
        raise RequestError(f"'{key}': a list of tensors is expected")
    if not set(map(type, found)) <= {dict}:
        raise RequestError(f"'{key}': each must be an object")
    return found


def _text(one: Any, key: str, where: str) -> str:
    found = one.get(key)
    if not isinstance(found, str):
        raise RequestError(f"{where}: '{key}' must be a text")
    return found


def _parameters(one: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    found = one.get("parameters", {})
    if not isinstance(found, dict):
        raise RequestError(f"{where}: 'parameters' must be an object")
    return found


def _flag(parameters: Mapping[str, Any], key: str, default: bool) -> bool:
    found = parameters.get(key, default)
    if not isinstance(found, bool):
        raise RequestError(f"parameter '{key}': true or false is expected")
    return found
