"""The join code: what an admin hands to a site, once, so that it can join.

    consortium-1.BODY.CHECK

BODY is base64url without padding of canonical JSON: federation, site, host, the two ports, SHA-256 of the root
certificate and a secret of 128 bits. CHECK is the first 8 hex digits of SHA-256 of what precedes; it finds slips of the
hand, nothing else. Whoever holds the code can join in the site's name, once, until it expires.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from consortium.protocol.configuration import NAME_PATTERN, host_name
from consortium.protocol.errors import InputError
from consortium.protocol.messages import canonical

PREFIX = "consortium-1"
SECRET_BYTES = 16
MAX_LENGTH = 2048
"""Characters; a longer text is no code."""

_BODY = re.compile(r"[A-Za-z0-9_-]+")
_KINDS = {"f": str, "s": str, "h": str, "p": int, "e": int, "r": str, "k": str}


@dataclass(frozen=True)
class JoinCode:
    """A code, read. Its `repr` does not show the secret.

    root: SHA-256 (hex) of the root certificate's DER. secret: hex of 16 bytes.
    """

    federation: str
    site: str
    host: str
    port: int
    enrol_port: int
    root: str
    secret: str = field(repr=False)

    def text(self) -> str:
        """The code as it is handed over."""
        fields = {
            "f": self.federation, "s": self.site, "h": self.host, "p": self.port, "e": self.enrol_port,
            "r": self.root, "k": self.secret,
        }  # fmt: skip
        body = base64.urlsafe_b64encode(canonical(fields)).decode().rstrip("=")
        start = f"{PREFIX}.{body}"
        return f"{start}.{_check(start)}"

    @staticmethod
    def parse(text: str) -> JoinCode:
        """A code as a person pasted it; spaces and line breaks in it do not matter.

        Raises:
            InputError: it is no code, of another version, or mistyped. The error does not show it.
        """
        code = "".join(text.split())
        parts = code.split(".")
        if len(code) > MAX_LENGTH or len(parts) != 3 or not parts[0].startswith("consortium-"):
            raise InputError("this is no join code; it starts with consortium-1. and is one long line")
        if parts[0] != PREFIX:
            raise InputError("the join code is of another version; do both sides run the same version?")
        if parts[2].lower() != _check(f"{parts[0]}.{parts[1]}"):
            raise InputError("the join code is mistyped or incomplete; copy it again, whole")
        return _read(parts[1])


def _check(start: str) -> str:
    return hashlib.sha256(start.encode()).hexdigest()[:8]


def _read(body: str) -> JoinCode:
    malformed = InputError("the join code is malformed; ask the server's admin for another one")
    if _BODY.fullmatch(body) is None:
        raise malformed
    try:
        fields = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (ValueError, RecursionError):
        raise malformed from None
    if not isinstance(fields, dict) or {name: type(fields[name]) for name in fields} != _KINDS:
        raise malformed
    if not _sound(fields):
        raise malformed
    return JoinCode(*(fields[name] for name in _KINDS))


def _sound(fields: dict[str, Any]) -> bool:
    try:
        host_name(fields["h"])
    except ValueError:
        return False
    return (
        all(re.fullmatch(NAME_PATTERN, fields[name]) is not None for name in "fs")
        and all(1 <= fields[name] <= 65535 for name in "pe")
        and re.fullmatch(r"[0-9a-f]{64}", fields["r"]) is not None
        and re.fullmatch(rf"[0-9a-f]{{{SECRET_BYTES * 2}}}", fields["k"]) is not None
    )


def proof_content(csr: str, federation: str, site: str) -> bytes:
    """What a site signs with its identity key to join (purpose "join"): which request, in which federation, as whom."""
    return canonical({"csr": csr, "federation": federation, "site": site})
