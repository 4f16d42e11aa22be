"""Tokens of a served model: who may ask, and for what. Kept by their SHA-256 alone, in `tokens.json`.

caller   predictions, feedback, and what the model is
monitor  metrics, lineage, and what the model is
admin    all of it
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.files import private_folder, write_private

FILE = "tokens.json"
FORMAT = 1
ABOUT, INFER, FEEDBACK, LINEAGE, METRICS = "about", "infer", "feedback", "lineage", "metrics"
ROLES: Mapping[str, frozenset[str]] = {
    "caller": frozenset({ABOUT, INFER, FEEDBACK}),
    "monitor": frozenset({ABOUT, LINEAGE, METRICS}),
    "admin": frozenset({ABOUT, INFER, FEEDBACK, LINEAGE, METRICS}),
}
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    name: str
    rights: frozenset[str]


def read(folder: Path) -> dict[str, Caller]:
    """Callers by the SHA-256 (hex) of their token.

    Raises:
        IntegrityError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != FORMAT:
            raise ValueError("format")
        return {
            str(one["sha256"]): Caller(str(name), ROLES[one["role"]])
            for name, one in document["tokens"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{path}: is damaged; remove it and make new tokens: consortium model token NAME"
        ) from error


def find(known: Mapping[str, Caller], header: str | None) -> Caller | None:
    """Whose token an `Authorization: Bearer` header holds. What is compared is a digest, so its time tells nothing."""
    kind, _, token = (header or "").partition(" ")
    if kind.lower() != "bearer" or not token or len(token) > 200:
        return None
    return known.get(hashlib.sha256(token.strip().encode()).hexdigest())


def new(folder: Path, name: str, role: str) -> str:
    """A token for a person or program, in place of an earlier one of that name.

    Raises:
        InputError: the name or the role is none.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"got the name {name[:80]!r}; letters, digits and '.@-_' would be right, up to 64")
    if role not in ROLES:
        raise InputError(f"--role: got {role[:40]!r}; one of {', '.join(ROLES)} would be right")
    token = secrets.token_urlsafe(32)
    change(folder, name, {"role": role, "sha256": hashlib.sha256(token.encode()).hexdigest()})
    return token


def remove(folder: Path, name: str) -> None:
    """Make a token worthless.

    Raises:
        InputError: there is none of that name.
    """
    if name not in {one.name for one in read(folder).values()}:
        raise InputError(f"{folder / FILE}: there is no token of '{name[:80]}'")
    change(folder, name, None)


def change(folder: Path, name: str, entry: Mapping[str, str] | None) -> None:
    """Keep an entry, or none, under a name."""
    private_folder(folder)
    path = folder / FILE
    read(folder)  # damage is told before it is replaced
    document: dict[str, Any] = {"format": FORMAT, "tokens": {}}
    if path.exists():
        document = json.loads(path.read_bytes())
    document["tokens"].pop(name, None)
    if entry is not None:
        document["tokens"][name] = dict(entry)
    write_private(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
