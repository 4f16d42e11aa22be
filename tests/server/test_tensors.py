"""What a request may hold: the contract, checked exactly, and everything wrong with it said at once."""

import json
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consortium.server.serving import wire
from consortium.server.serving.tensors import Checker, Given, Numbers, RequestError, checked

NUMBER = {"name": "x", "kind": "numeric", "min": -1.0, "max": 0.3, "dtype": "float32", "missing": "median"}
CODE = {"name": "c", "kind": "categorical", "values": ["no", "yes"], "missing": "median"}
IMAGE = {"name": "i", "kind": "tensor", "shape": [2, 2], "dtype": "uint8"}


def one(declared: dict[str, Any], datatype: str, shape: tuple[int, ...], data: Any) -> Any:
    return checked([declared], [Given(declared["name"], datatype, shape, data)])[declared["name"]]


def test_right_tensors_come_through() -> None:
    """Nested or flat JSON, binary, ends of the range in float32, missing as null or NaN, codes, whole numbers."""
    np.testing.assert_array_equal(
        one(NUMBER, "FP32", (2, 1), [[-1], [0.3]])[:, 0], np.array([-1, 0.3], np.float32)
    )
    assert np.isnan(one(NUMBER, "FP32", (1, 1), [None])).all()
    raw = np.array([0.3, np.nan], "<f4").tobytes()
    assert one(NUMBER, "FP32", (2, 1), raw).dtype == np.float32
    assert one(CODE, "BYTES", (2, 1), ["yes", ""]).tolist() == [["yes"], [""]]
    framed = struct.pack("<I", 3) + b"yes" + struct.pack("<I", 0)
    assert one(CODE, "BYTES", (2, 1), framed).tolist() == [["yes"], [""]]
    assert one(IMAGE, "UINT8", (1, 2, 2), [[[0, 255], [1, 2]]]).dtype == np.uint8


@pytest.mark.parametrize(
    ("declared", "datatype", "shape", "data", "reason"),
    [
        (NUMBER, "FP64", (1, 1), [0.0], "has datatype 'FP64'; FP32 is expected"),
        (NUMBER, "FP32", (1,), [0.0], r"has shape \[1\]; \[rows, 1\] is expected"),
        (NUMBER, "FP32", (0, 1), [], "has 0 rows"),
        (NUMBER, "FP32", (2**39, 1), [0.0], "rows; 1 to"),
        (NUMBER, "FP32", (2, 1), [0.0], "has 1 values; its shape says 2"),
        (NUMBER, "FP32", (2, 1), [[0.0], 1.0], "mixes lists and values"),
        (NUMBER, "FP32", (1, 1), ["0"], "holds texts; numbers"),
        (NUMBER, "FP32", (1, 1), [True], "holds true or false"),
        (NUMBER, "FP32", (1, 1), [10**400], "too large"),
        (NUMBER, "FP32", (2, 1), [0.0, 0.31], r"is 0\.31 in row 2; -1 to 0\.3 is the declared range"),
        (NUMBER, "FP32", (1, 1), struct.pack("<f", float("inf")), "is infinite in row 1"),
        (NUMBER, "FP32", (2, 1), b"1234", "has 4 bytes; 8 are expected"),
        ({**NUMBER, "missing": "refuse"}, "FP32", (1, 1), [None], "holds null; the model refuses"),
        ({**NUMBER, "missing": "refuse"}, "FP32", (1, 1), struct.pack("<f", float("nan")), "not a number in row 1"),
        (CODE, "BYTES", (1, 1), ["maybe"], "is 'maybe' in row 1; one of 'no', 'yes'"),
        (CODE, "BYTES", (1, 1), [1], "holds numbers; texts"),
        (CODE, "BYTES", (1, 1), b"\xff\xff\xff\xff", "text 1 claims 4294967295 bytes"),
        (CODE, "BYTES", (1, 1), struct.pack("<I", 2) + b"no!", "has 1 bytes after"),
        (CODE, "BYTES", (1, 1), struct.pack("<I", 1) + b"\xff", "not UTF-8"),
        ({**CODE, "missing": "refuse"}, "BYTES", (1, 1), [""], "has no value in row 1"),
        (IMAGE, "UINT8", (1, 2, 2), [0, 1, 2, 256], "numbers beyond 0 to 255"),
        (IMAGE, "UINT8", (1, 2, 2), [0, 1, 2, 0.5], "holds fractions"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(declared: Any, datatype: str, shape: Any, data: Any, reason: str) -> None:
    """Each mistake has its own words."""
    with pytest.raises(RequestError, match=reason):
        one(declared, datatype, shape, data)


def test_all_mistakes_are_said_at_once() -> None:
    """Absent, unknown (with the nearest name) and doubled inputs, and different numbers of rows."""
    x = Given("x", "FP32", (2, 1), [0.0, 0.0])
    with pytest.raises(RequestError) as caught:
        checked([NUMBER, CODE], [x, x, Given("xx", "FP32", (1, 1), [0.0])])
    for part in (
        "'xx': the model takes no such input, did you mean 'x'?",
        "given twice",
        "'c': is missing; BYTES",
    ):
        assert part in str(caught.value)
    with pytest.raises(RequestError, match=r"different numbers of rows: \[1, 2\]"):
        checked([NUMBER, CODE], [x, Given("c", "BYTES", (1, 1), ["no"])])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
INPUT = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "c", "i"]) | JSON,
        "datatype": st.sampled_from(["FP32", "BYTES", "UINT8", "FP64", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(-2, 5), max_size=4) | st.lists(st.integers(), max_size=3) | JSON,
        "data": st.lists(st.floats() | st.integers() | st.none() | st.sampled_from(["no", "yes"]), max_size=8) | JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-3, 40) | JSON}) | JSON,
    },
)  # fmt: skip
REQUEST = st.fixed_dictionaries(
    {},
    optional={"inputs": st.lists(INPUT, max_size=4) | JSON, "outputs": JSON, "id": JSON, "parameters": JSON},
)


@settings(max_examples=1000, deadline=None)
@given(
    REQUEST | JSON, st.binary(max_size=40), st.none() | st.integers(-5, 300).map(str) | st.text(max_size=4)
)
def test_nothing_that_can_be_sent_gets_beyond_a_request_error(
    document: Any, tail: bytes, length: str | None
) -> None:
    """Whatever the body and its header: it is refused with RequestError, or its arrays are what the contract says."""
    body = json.dumps(document).encode()
    if length == "0" or length is None:
        length = str(len(body)) if length == "0" else None
    try:
        asked = wire.parse(body + tail, length)
        arrays = checked([NUMBER, CODE, IMAGE], asked.given)
    except RequestError as error:
        json.dumps(str(error))
        return
    assert {array.dtype.kind for array in arrays.values()} == {"f", "O", "u"}


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_json(content: bytes) -> None:
    """Random bytes, deep nesting and endless numbers are refused in words."""
    for body in (content, b"[" * 100_000, b'{"inputs":' * 5000, b"9" * 5000, b'{"id": NaN}'):
        with pytest.raises(RequestError):
            wire.parse(body, None)


def test_quick_look_agrees_with_the_careful_one() -> None:
    """Whatever order, range or mistake: a checker gives the arrays, or the words, that looking at each input gives."""
    inputs = [{**NUMBER, "name": name, "max": high} for name, high in (("x", 0.3), ("y", 5.0), ("z", 1e30))]
    check = Checker(inputs)
    rng = np.random.default_rng(0)
    odd = [None, True, "1", 1e400, 10**400, 0.30000001, float(np.float32(0.3)), 0.3, -1, 5, -1.0000001, 3e38]
    agreed = [0, 0]
    for _ in range(2000):
        given: list[Given] = []
        rows = int(rng.integers(1, 3))
        for name in rng.permutation(["x", "y", "z"]) if rng.random() < 0.5 else "xyz":
            data: list[Any] = [float(v) for v in rng.uniform(-1, 0.3, rows)]
            if rng.random() < 0.3:
                data[int(rng.integers(rows))] = odd[int(rng.integers(len(odd)))]
            plain = {type(value) for value in data} <= {int, float} and rng.random() < 0.5
            datatype = "FP32" if rng.random() < 0.95 else "FP64"
            given.append((Numbers if plain else Given)(str(name), datatype, (rows, 1), data))
        right, said = None, ""
        try:
            right = checked(inputs, given)
        except RequestError as error:
            said = str(error)
        if right is None:
            with pytest.raises(RequestError) as caught:
                check(given)
            assert str(caught.value) == said
            agreed[0] += 1
        else:
            found = check(given)
            assert all(found[name].tobytes() == right[name].tobytes() for name in ("x", "y", "z"))
            agreed[1] += 1
    assert min(agreed) > 300


@pytest.mark.parametrize(
    "content",
    [
        '{"inputs": [{"name": "a", "datatype": "FP32", "shape": [2, 1], "data": [1, 2.5]}]}',
        '{"id": "x", "inputs": [{"name": "a", "datatype": "INT64", "shape": [1, 1], "data": [9007199254740993]}]}',
        '{"inputs": [{"name": "\u00e9", "datatype": "FP64", "shape": [1, 1], "data": [1e308]}], "inputs": []}',
        '{"inputs": [{"name": "a", "datatype": "FP32", "shape": [1, 1], "data": [123456789012345678901234567890]}]}',
        '{"inputs": [{"name": "a", "datatype": "FP32", "shape": [1, 1], "data": [null]}]}',
        '{"inputs": [{"name": "a", "datatype": "FP32", "shape": [1, 1], "data": [1e999]}]}',
        '{"inputs": [{"name": "a", "datatype": "FP32", "shape": [1, 1], "data": [true]}]}',
        '{"inputs": [{"name": "a", "datatype": "FP32", "shape": [-1, 1], "data": [1]}]}',
        '{"inputs": [{"name": "a", "datatype": "FP32", "shape": [1, 1], "data": [NaN]}]}',
        '{"inputs": [{"name": "a", "datatype": "FP32", "shape": [1, 1], "data": [[1]]}], "parameters": {}}',
        '{"id": 7, "inputs": []}',
        '{"inputs": [{"name": "a"}]}',
        "[1]",
        "{",
    ],
)
def test_the_quick_way_to_read_a_request_reads_what_the_slow_one_reads(content: str) -> None:
    """The same request, or the same refusal: what is unusual or wrong goes the slow way."""

    def read(header: str | None) -> Any:
        try:
            asked = wire.parse(content.encode(), header)
        except RequestError as error:
            return str(error)
        return asked.id, [msgspec.structs.astuple(one) for one in asked.given], asked.outputs, asked.binary

    assert read(None) == read(str(len(content.encode())))


def test_half_a_surrogate_pair_comes_back_as_it_went_in() -> None:
    """JSON may hold it, UTF-8 may not: an id with one is answered, and no fault of ours."""
    body = json.dumps({"id": "\ud800", "inputs": [], "parameters": {"x": "\ud800"}}).encode()
    asked = wire.parse(body, None)
    content, _ = wire.answer({"p": np.zeros((1, 2))}, asked, {"id": asked.id})
    assert json.loads(content)["id"] == "\ud800"
