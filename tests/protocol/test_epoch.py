"""The statement of a server's epoch: for one site, by a trusted key, or not believed."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.protocol import epoch
from consortium.protocol.errors import IntegrityError
from consortium.protocol.signing import ENDINGS, sign

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def test_a_statement_says_the_epoch_to_its_site() -> None:
    """Signed by any of the keys that the trust statement names."""
    said = epoch.state(KEY, "lung", "a", 1_700_000_000)
    assert epoch.verified(said, [OTHER.public_key(), KEY.public_key()], "lung", "a") == 1_700_000_000


def resigned(said: dict[str, str], **fields: object) -> dict[str, str]:
    """Another content, signed as it should be."""
    text = json.dumps({**json.loads(said["statement"]), **fields}, separators=(",", ":"), sort_keys=True)
    return {"statement": text, "signature": sign(KEY, "epoch", text.encode()).hex()}


WRONG: dict[str, Callable[[dict[str, str]], dict[str, object]]] = {
    "another number": lambda s: {**s, "statement": s["statement"].replace("5", "6")},
    "another key": lambda s: {**epoch.state(OTHER, "lung", "a", 5)},
    "another purpose": lambda s: {**s, "signature": sign(KEY, ENDINGS, s["statement"].encode()).hex()},
    "another site": lambda s: {**epoch.state(KEY, "lung", "b", 5)},
    "another federation": lambda s: {**epoch.state(KEY, "heart", "a", 5)},
    "another format": lambda s: {**resigned(s, format=2)},
    "more": lambda s: {**resigned(s, more=1)},
    "negative": lambda s: {**resigned(s, epoch=-1)},
    "text": lambda s: {**resigned(s, epoch="5")},
    "no hex": lambda s: {**s, "signature": "x"},
    "nothing": lambda s: {},
    "long": lambda s: {**s, "statement": " " * 2000},
}


@pytest.mark.parametrize("how", WRONG)
def test_anything_else_is_refused(how: str) -> None:
    """Whatever was changed; with a good signature too."""
    with pytest.raises(IntegrityError, match="statement of the epoch"):
        epoch.verified(WRONG[how](epoch.state(KEY, "lung", "a", 5)), [KEY.public_key()], "lung", "a")
