"""Records of a Flower message as bytes: exact both ways, and nothing that is not numbers and words comes in."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.messages import canonical
from consortium.protocol.records import DTYPES, Packed, Records, pack, unpack

RECORDS: Records = {
    "z": ("arrays", {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 2)), "1": np.array(1.5)}),
    "a": ("metrics", {"loss": math.nan, "n": 7, "all": [1.0, math.inf], "none": []}),
    "c": ("config", {"name": "x", "yes": True, "raw": b"\x00\xff", "list": [True, False], "words": ["a"]}),
}  # fmt: skip


def same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return repr(one) == repr(other) and type(one) is type(other)


def test_what_is_packed_comes_back_the_same_with_order_and_types() -> None:
    found = unpack(pack(Packed(RECORDS, "train.more", "3")))
    assert (found.type, found.group, list(found.records)) == ("train.more", "3", ["z", "a", "c"])
    for name, (kind, entries) in RECORDS.items():
        other_kind, others = found.records[name]
        assert (kind, list(entries)) == (other_kind, list(others))
        assert all(same(entries[key], others[key]) for key in entries)
    every = {dtype: np.ones(3, dtype) for dtype in DTYPES}
    back = unpack(pack(Packed({"all": ("arrays", every)}))).records["all"][1]
    assert all(same(every[dtype], back[dtype]) for dtype in DTYPES)


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["a"]), np.zeros(2, complex)])
def test_arrays_of_objects_and_words_do_not_travel(value: object) -> None:
    with pytest.raises(InputError, match="does not travel"):
        pack(Packed({"a": ("arrays", {"x": value})}))


def test_values_of_other_types_do_not_travel() -> None:
    with pytest.raises(InputError, match="is a dict, which does not travel"):
        pack(Packed({"a": ("config", {"x": {}})}))


def headed(records: object, rest: bytes = b"") -> bytes:
    header = canonical({"type": "", "group": "", "records": records})
    return len(header).to_bytes(8, "big") + header + rest


WRONG: dict[str, bytes] = {
    "nothing": b"",
    "no header": b"\xff" * 20,
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "an object array": headed([["a", "arrays", [["x", "|O", [1]]]]], bytes(8)),
    "a wide dtype": headed([["a", "arrays", [["x", "|V99999", [1]]]]], bytes(99999)),
    "a negative shape": headed([["a", "arrays", [["x", "<f8", [-1]]]]], bytes(8)),
    "a true shape": headed([["a", "arrays", [["x", "<f8", [True]]]]], bytes(8)),
    "a huge shape": headed([["a", "arrays", [["x", "<f8", [2**40, 2**40, 0]]]]]),
    "more than is there": headed([["a", "arrays", [["x", "<f8", [2]]]]], bytes(8)),
    "less than is there": headed([["a", "arrays", [["x", "<f8", [1]]]]], bytes(9)),
    "another kind": headed([["a", "pickles", []]]),
    "one name twice": headed([["a", "metrics", []], ["a", "metrics", []]]),
    "one key twice": headed([["a", "metrics", [["x", "int", 1], ["x", "int", 2]]]]),
    "words as metrics": headed([["a", "metrics", [["x", "str", "hello"]]]]),
    "a huge number": headed([["a", "metrics", [["x", "int", 2**63]]]]),
    "a false truth": headed([["a", "config", [["x", "bool", 1]]]]),
    "a mixed list": headed([["a", "config", [["x", "list", [["int", 1], ["str", "a"]]]]]]),
    "a list of lists": headed([["a", "config", [["x", "list", [["list", []]]]]]]),
    "no entries": headed([["a", "metrics"]]),
    "no list": headed(7),
    "deep": headed([["a", "config", [["x", "list", [["list", [["list", []]]]]]]]]),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_what_pack_does_not_write_is_refused(what: str) -> None:
    with pytest.raises(IntegrityError):
        unpack(WRONG[what])


def test_any_byte_that_is_changed_is_refused_or_gives_plain_values() -> None:
    """2,000 changes of one byte: none raises anything else, none gives an array of another kind."""
    draw, good = random.Random(4), pack(Packed(RECORDS, "train", "1"))
    for _ in range(2000):
        at = draw.randrange(len(good))
        wrong = good[:at] + bytes([draw.randrange(256)]) + good[at + 1 :]
        try:
            found = unpack(wrong)
        except IntegrityError:
            continue
        arrays = [
            one for kind, entries in found.records.values() if kind == "arrays" for one in entries.values()
        ]
        assert all(array.dtype.str in DTYPES for array in arrays)
