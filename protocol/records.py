"""Records of a Flower message as bytes that carry numbers and words alone: arrays, metrics, settings.

    length of the header, 8 bytes big-endian | header (canonical JSON) | the arrays' bytes, one after the other

The header holds `type` and `group` of the message, and by name, in order, each record with its entries. Arrays are raw
little-endian numbers of the dtypes of `DTYPES`; floats are written in hex, which is exact, NaN too. Reading makes
nothing but numpy arrays over the bytes given, and plain Python values: nothing is ever unpickled.

This floor does not know Flower, so the pieces of `flwr.app` are given by whoever does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.messages import canonical

DTYPES = ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")
MAX_HEADER = 8 << 20
MOST_ENTRIES = 100_000
MOST_DIMENSIONS = 32
KINDS = ("arrays", "metrics", "config")

Records = Mapping[str, tuple[str, Mapping[str, Any]]]
"""By name: the kind (`KINDS`), and the entries: numpy arrays; numbers; numbers, words, truths, bytes; or lists of one
of these."""


@dataclass(frozen=True)
class Packed:
    """What a message carries. type, group: Flower's message type and group id."""

    records: Records
    type: str = ""
    group: str = ""


def pack(packed: Packed) -> bytes:
    """The bytes of it.

    Raises:
        InputError: an array or a value is none that can travel.
    """
    about, pieces = [], []
    for name, (kind, entries) in packed.records.items():
        if kind == "arrays":
            arrays = {key: _little(key, value) for key, value in entries.items()}
            about.append([name, kind, [[key, a.dtype.str, list(a.shape)] for key, a in arrays.items()]])
            pieces += [array.tobytes() for array in arrays.values()]
        else:
            about.append([name, kind, [[key, *_said(key, value)] for key, value in entries.items()]])
    header = canonical({"type": packed.type, "group": packed.group, "records": about})
    if len(header) > MAX_HEADER:
        raise InputError(
            f"records: their names and values take {len(header)} bytes; at most {MAX_HEADER} travel"
        )
    return b"".join([len(header).to_bytes(8, "big"), header, *pieces])


def unpack(content: bytes | memoryview) -> Packed:
    """What these bytes hold; arrays are read-only views of them.

    Raises:
        IntegrityError: they are not what `pack` writes.
    """
    content = memoryview(content)
    length = int.from_bytes(content[:8], "big")
    if len(content) < 8 or length > min(MAX_HEADER, len(content) - 8):
        raise IntegrityError("records: the header does not end")
    try:
        about = json.loads(bytes(content[8 : 8 + length]))
        found, place = _read(about["records"], content, 8 + length)
        packed = Packed(found, _text(about["type"]), _text(about["group"]))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise IntegrityError(f"records: the header is malformed ({type(error).__name__})") from error
    if place != len(content):
        raise IntegrityError("records: the bytes are not as many as the header says")
    return packed


def _read(
    listed: Any, content: memoryview, place: int
) -> tuple[dict[str, tuple[str, Mapping[str, Any]]], int]:
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    if sum(len(entries) for _, _, entries in listed) > MOST_ENTRIES:
        raise IntegrityError(f"records: more than {MOST_ENTRIES} entries")
    for name, kind, entries in listed:
        if kind not in KINDS or _text(name) in found:
            raise IntegrityError("records: a record of a kind that is not known, or twice of one name")
        values: dict[str, Any] = {}
        for key, *value in entries:
            if _text(key) in values:
                raise IntegrityError("records: an entry is there twice")
            if kind == "arrays":
                values[key], place = _array(value, content, place)
            else:
                values[key] = _meant(value, kind)
        found[name] = (kind, values)
    return found, place


def _array(about: Any, content: memoryview, place: int) -> tuple[NDArray[Any], int]:
    dtype, shape = about
    sound = (
        dtype in DTYPES and len(shape) <= MOST_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)
    )
    if not sound or math.prod(max(n, 1) for n in shape) >= 2**48:
        raise IntegrityError("records: an array of a dtype or shape that is not taken")
    end = place + math.prod(shape) * np.dtype(dtype).itemsize
    if end > len(content):
        raise IntegrityError("records: an array lies outside of the bytes")
    return np.frombuffer(content[place:end], dtype).reshape(shape), end


def _little(key: str, value: Any) -> NDArray[Any]:
    array = np.asarray(value)
    array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    if array.dtype.str not in DTYPES:
        raise InputError(f"records: array '{key}' has dtype {array.dtype}, which does not travel")
    return array


def _said(key: str, value: Any) -> list[Any]:
    """A value with its type, as JSON has it."""
    if isinstance(value, list | tuple):
        return ["list", [_said(key, one) for one in value]]
    for kind, of in (("bool", bool), ("int", int), ("str", str)):
        if type(value) is of:
            return [kind, value]
    if isinstance(value, float):
        return ["float", float(value).hex()]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    raise InputError(f"records: '{key}' is a {type(value).__name__}, which does not travel")


def _meant(said: Any, record: str) -> Any:
    kind, value = said
    if kind == "list":
        values = [_meant(one, record) for one in value]
        if len({type(one) for one in values}) > 1 or list in {type(one) for one in values}:
            raise IntegrityError("records: a list of different kinds")
        return values
    if kind == "float":
        return float.fromhex(_text(value))
    if kind == "int" and type(value) is int and abs(value) < 2**63:
        return value
    if record == "config" and kind == "bytes":
        return bytes.fromhex(_text(value))
    if record == "config" and {"bool": bool, "str": str}.get(kind) is type(value):
        return value
    raise IntegrityError("records: a value of a kind that is not taken")


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_HEADER:
        raise IntegrityError("records: a name that is none")
    return value


def from_flower(content: Any) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The records of a Flower `RecordDict`.

    Raises:
        InputError: an array is not numpy's own form.
    """
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, record in content.items():
        kind = {"ArrayRecord": "arrays", "MetricRecord": "metrics"}.get(type(record).__name__, "config")
        if kind == "arrays":
            odd = [key for key, array in record.items() if array.stype != "numpy.ndarray"]
            if odd:
                raise InputError(
                    f"records: array '{odd[0]}' is not serialised as numpy.ndarray, and does not travel"
                )
            found[name] = (kind, {key: array.numpy() for key, array in record.items()})
        else:
            found[name] = (kind, dict(record))
    return found


def to_flower(found: Records, app: Any) -> Any:
    """A Flower `RecordDict` of records. app: the module `flwr.app`."""
    made = app.RecordDict()
    for name, (kind, entries) in found.items():
        if kind == "arrays":
            made[name] = app.ArrayRecord({key: app.Array(np.array(array)) for key, array in entries.items()})
        else:
            made[name] = (app.MetricRecord if kind == "metrics" else app.ConfigRecord)(dict(entries))
    return made
