"""What a site is told of a version of a model: which files it is, and whether it may still be used.

The server says it for one site and one question (a fresh nonce), and signs it for this purpose with the instruction
key: {"statement": text, "signature": hex}, the text canonical JSON. It names every file of the bundle by size and
SHA-256, so that nothing of what a site fetches needs to be parsed before it is known to be what the server has. A
version that was withdrawn has a reason in place of files. The statement is good until a time that it names: a site
that cannot reach the server uses the model until then, and no longer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.protocol import statement
from consortium.protocol.errors import IntegrityError
from consortium.protocol.messages import canonical
from consortium.protocol.signing import DELIVERY

FORMAT = 1
GOOD_FOR = 7 * 86400.0
"""Seconds for which a site may use a model without having reached the server."""
MAX_STATEMENT = 64 * 1024
"""Characters of a statement's text."""
MOST_BYTES = 8 << 30
"""Of a bundle's files together."""
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", re.ASCII)
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
"""What a model may be called."""
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class File:
    """One file of a bundle. size: bytes. sha256: hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Delivery:
    """One version of a model. bundle: SHA-256 (hex) of its manifest. files: by name; none where it was withdrawn.

    withdrawn: why, "" where it was not. at, until: when the server said so, and until when that is good; seconds since
    the epoch, by the server's clock.
    """

    model: str
    version: int
    bundle: str
    at: float
    until: float
    files: Mapping[str, File] = field(default_factory=dict)
    withdrawn: str = ""


def approval(federation: str, site: str, bundle: str) -> bytes:
    """What a site signs, for the purpose `APPROVAL`, to approve the bundle of this digest."""
    return canonical({"format": FORMAT, "federation": federation, "site": site, "bundle": bundle})


def state(key: Ed25519PrivateKey, federation: str, site: str, nonce: str, said: Delivery) -> dict[str, str]:
    """A statement for one site and question, signed."""
    about = {"format": FORMAT, "federation": federation, "site": site, "nonce": nonce}
    return statement.signed(key, DELIVERY, canonical(about | asdict(said)))


def verified(
    document: Mapping[str, Any],
    keys: Sequence[Ed25519PublicKey],
    federation: str,
    site: str,
    model: str,
    nonce: str | None = None,
) -> Delivery:
    """What a statement says. nonce: of the question; None for a statement that was kept.

    Raises:
        IntegrityError: it is signed by nobody that is trusted, for another site, model or question, or malformed.
    """
    content = statement.content(document, keys, DELIVERY, MAX_STATEMENT, "statement of a model")
    try:
        fields = json.loads(content)
        about = {"format": FORMAT, "federation": federation, "site": site, "model": model}
        about |= {} if nonce is None else {"nonce": nonce}
        if any(fields[name] != right for name, right in about.items()):
            raise IntegrityError("statement of a model: it is not the answer to what this site asked")
        files = {name: File(int(one["size"]), str(one["sha256"])) for name, one in fields["files"].items()}
        said = Delivery(
            model,
            int(fields["version"]),
            str(fields["bundle"]),
            float(fields["at"]),
            float(fields["until"]),
            files,
            str(fields["withdrawn"]),
        )
        sound = (
            MODEL_NAME.fullmatch(model)
            and said.version > 0
            and 0 <= said.until - said.at <= GOOD_FOR
            and all(_FILE.fullmatch(name) and _SHA256.fullmatch(one.sha256) for name, one in files.items())
            and all(one.size >= 0 for one in files.values())
            and sum(one.size for one in files.values()) <= MOST_BYTES
            and bool(files) != bool(said.withdrawn)
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise IntegrityError("statement of a model: it is malformed") from error
    if not sound:
        raise IntegrityError("statement of a model: it names what no bundle has")
    return said
