"""What a site is told of runs that ask nothing more: so that it ends what works for them and removes what it keeps.

A site names in its poll the runs that it keeps something of, what it was told of each, and a fresh nonce. As soon as
the server has another word for one of them, it answers with {"statement": text, "signature": hex}; the text is
canonical JSON, signed by the instruction key for this purpose, this federation, this site and this nonce. So nobody
else can say it, and what was said once cannot be said again: a live run's state is safe from both.

    over      the run has ended for good; everything of it can go
    failed    it has ended, and its admin may resume it: what was answered must stay, the rest can go
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.protocol import statement
from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import canonical
from consortium.protocol.signing import ENDINGS

FORMAT = 1
OVER, FAILED = "over", "failed"
MOST_RUNS = 128
"""Runs that one poll names; of more, a site names those that it heard of last."""
LONGEST_NAME = 200
MAX_STATEMENT = 64 * 1024
"""Characters of a statement's text."""


def state(
    key: Ed25519PrivateKey, federation: str, site: str, nonce: str, runs: Mapping[str, str]
) -> dict[str, str]:
    """A statement, signed. runs: `OVER` or `FAILED` by run."""
    text = canonical(
        {"format": FORMAT, "federation": federation, "site": site, "nonce": nonce, "runs": dict(runs)}
    )
    return statement.signed(key, ENDINGS, text)


def signed(document: Mapping[str, Any], keys: Sequence[Ed25519PublicKey]) -> bytes:
    """The text of a statement, not parsed yet, after its signature was found to be that of one of the keys.

    Raises:
        IntegrityError: it is not, or it is malformed.
    """
    return statement.content(document, keys, ENDINGS, MAX_STATEMENT, "statement of endings")


def said(content: bytes, federation: str, site: str, nonce: str, asked: Collection[str]) -> dict[str, str]:
    """`OVER` or `FAILED` by run, of a text that `signed` gave.

    Raises:
        IntegrityError: it is for another federation, site or question, or malformed.
    """
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise IntegrityError("statement of endings: its format is not known; is this version too old?")
        if [fields[name] for name in ("federation", "site", "nonce")] != [federation, site, nonce]:
            raise IntegrityError("statement of endings: it is not the answer to what this site asked now")
        runs = fields["runs"]
        sound = runs.keys() <= set(asked) and all(word in (OVER, FAILED) for word in runs.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError("statement of endings: it is malformed") from error
    if not sound:
        raise IntegrityError("statement of endings: it names what was not asked")
    return dict(runs)
