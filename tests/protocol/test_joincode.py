"""The join code: it survives paste, finds slips of the hand, and never shows its secret."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consortium.protocol.errors import InputError
from consortium.protocol.joincode import JoinCode, _check

CODE = JoinCode("lung", "hospital-1", "fl.example.org", 9440, 9442, "ab" * 32, "cd" * 16)


def written(fields: Any, prefix: str = "consortium-1") -> str:
    """A code with a right check over any fields."""
    body = base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")
    return f"{prefix}.{body}.{_check(f'{prefix}.{body}')}"


FIELDS = {
    "f": "lung", "s": "hospital-1", "h": "fl.example.org", "p": 9440, "e": 9442, "r": "ab" * 32, "k": "cd" * 16
}  # fmt: skip


def test_a_code_reads_back() -> None:
    """What was written is read, and a code is one line of URL-safe characters."""
    text = CODE.text()
    assert JoinCode.parse(text) == CODE
    assert text.startswith("consortium-1.")
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


@pytest.mark.parametrize("host", ["10.0.0.1", "2001:db8::1", "localhost", "FL.example.org"])
def test_hosts(host: str) -> None:
    """Names and addresses of both kinds fit."""
    code = JoinCode("lung", "a", host, 1, 65535, "ab" * 32, "cd" * 16)
    assert JoinCode.parse(code.text()) == code


def test_a_mail_program_may_break_the_line() -> None:
    """Spaces and line breaks in and around a code do not matter."""
    text = CODE.text()
    assert JoinCode.parse(f"  {text[:40]}\r\n\t{text[40:90]} \n{text[90:]}\n") == CODE


@given(st.integers(0, len(CODE.text()) - 1), st.sampled_from("aZ7-_.x"))
def test_every_slip_of_one_character_is_found(place: int, other: str) -> None:
    """A code with one character changed is refused, wherever it stands."""
    text = CODE.text()
    changed = text[:place] + other + text[place + 1 :]
    if changed != text:
        with pytest.raises(InputError, match="join code"):
            JoinCode.parse(changed)


@given(st.integers(0, len(CODE.text()) - 1))
def test_a_code_that_was_cut_short_is_found(length: int) -> None:
    """The beginning of a code is none."""
    with pytest.raises(InputError, match="join code"):
        JoinCode.parse(CODE.text()[:length])


@given(st.text(max_size=300))
def test_any_text_is_refused_as_input(text: str) -> None:
    """Whatever a person pastes, the error is for a person."""
    with pytest.raises(InputError):
        JoinCode.parse(text)


@pytest.mark.parametrize(
    "change",
    [
        {"p": 0}, {"e": 65536}, {"p": True}, {"p": "9440"}, {"p": 1.5}, {"s": "Hospital"}, {"s": "a\n"}, {"f": ""},
        {"h": "fe80::1%eth0"}, {"h": "a..b"},
        {"h": "http://x/"}, {"h": "a b"}, {"h": ""}, {"r": "AB" * 32}, {"r": "ab"}, {"k": "cd" * 15}, {"k": None},
        {"x": 1}, {"h": ["a"]}, {"s": "../etc"},
    ],
)  # fmt: skip
def test_a_well_summed_code_with_wrong_fields_is_refused(change: dict[str, Any]) -> None:
    """The check sum is no proof: each field is measured and typed."""
    assert JoinCode.parse(written(FIELDS)) == CODE
    with pytest.raises(InputError, match="malformed"):
        JoinCode.parse(written(FIELDS | change))


@pytest.mark.parametrize("fields", [[], "text", 7, None, {}, {"f": "lung"}])
def test_other_json_is_refused(fields: Any) -> None:
    """Neither another kind of JSON nor missing fields pass."""
    with pytest.raises(InputError, match="malformed"):
        JoinCode.parse(written(fields))


def test_another_version_is_named() -> None:
    """A code of a later version says so, instead of being called mistyped."""
    with pytest.raises(InputError, match="another version"):
        JoinCode.parse(written(FIELDS, "consortium-2"))


def test_the_secret_is_not_shown() -> None:
    """Neither the `repr` of a code nor an error holds the secret."""
    assert CODE.secret not in repr(CODE)
    with pytest.raises(InputError) as caught:
        JoinCode.parse(written(FIELDS | {"p": 0}))
    assert CODE.secret not in str(caught.value)
    assert CODE.text()[13:60] not in str(caught.value)
