"""The statement by which a site is told of runs that ended."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.protocol import endings
from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import canonical
from consortium.protocol.signing import ENDINGS, sign

KEY, BEFORE = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
KEYS = [KEY.public_key(), BEFORE.public_key()]
NONCE = "ab" * 32
TOLD = {"lung.1": endings.OVER, "lung.2": endings.FAILED}


def read(document: dict[str, Any], **changed: Any) -> dict[str, str]:
    asked = {"federation": "lung", "site": "north", "nonce": NONCE, "asked": TOLD, **changed}
    return endings.said(endings.signed(document, KEYS), **asked)


@pytest.mark.parametrize("key", [KEY, BEFORE])
def test_it_says_what_was_signed(key: Ed25519PrivateKey) -> None:
    """By any key of the trust statement, over JSON."""
    document = json.loads(json.dumps(endings.state(key, "lung", "north", NONCE, TOLD)))
    assert read(document) == TOLD


@pytest.mark.parametrize(
    "changed", [{"federation": "heart"}, {"site": "south"}, {"nonce": "cd" * 32}, {"asked": ["lung.1"]}]
)
def test_it_is_for_one_site_and_question(changed: dict[str, Any]) -> None:
    """Another federation, site or nonce, or a run that was not asked about: none of it is believed."""
    with pytest.raises(IntegrityError, match=r"what this site asked|was not asked"):
        read(endings.state(KEY, "lung", "north", NONCE, TOLD), **changed)


TEXT: dict[str, Any] = {"format": 1, "federation": "lung", "site": "north", "nonce": NONCE, "runs": TOLD}


@pytest.mark.parametrize(
    "text",
    [
        {**TEXT, "format": 2}, {**TEXT, "runs": ["lung.1"]}, {**TEXT, "runs": {"lung.1": "gone"}},
        {**TEXT, "runs": None}, {**TEXT, "runs": {"lung.1": 1}}, {"format": 1}, [], 5, None, "over",
    ],
)  # fmt: skip
def test_a_malformed_text_is_refused_though_it_is_signed(text: Any) -> None:
    """Another format, other types, missing fields."""
    content = canonical(text)
    document = {"statement": content.decode(), "signature": sign(KEY, ENDINGS, content).hex()}
    with pytest.raises(IntegrityError, match="statement of endings"):
        read(document)


@pytest.mark.parametrize(
    "changed",
    [
        {"signature": "00" * 64}, {"signature": "x"}, {"signature": None}, {"statement": 5}, {"statement": "{}"},
        {"statement": "\ud800"}, {"statement": "[" * (endings.MAX_STATEMENT + 1)},
    ],
)  # fmt: skip
def test_nothing_is_parsed_that_is_not_signed(changed: dict[str, Any]) -> None:
    """Another signature, none, noise in its place, or a text that is too long."""
    document = endings.state(KEY, "lung", "north", NONCE, TOLD)
    with pytest.raises(IntegrityError, match="statement of endings"):
        endings.signed({**document, **changed}, KEYS)
