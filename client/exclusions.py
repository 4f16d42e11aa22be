"""The persons or records that a site leaves out of everything: a list of their ids at the site, under a key.

    data/NAME/excluded.json    the column that holds the ids, and each id's HMAC-SHA256 under excluded.key
    data/NAME/excluded.key     made with the first list

Neither the ids nor the digests leave the site. The rows are taken out of the copy that a run works on
(`client/snapshot.py`), so that nothing that a study does can reach them. As the holdout key, the list stays when the
data set is removed from the registry, so that it counts again when it comes back.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.files import write_private

LIST, KEY = "excluded.json", "excluded.key"
KEY_BYTES = 32
FORMAT = 1
MOST_IDS = 1_000_000


@dataclass(frozen=True)
class Exclusions:
    """column: of the site's own table. digests: of the ids (hex). Empty: nobody is excluded."""

    column: str = ""
    key: bytes = field(default=b"", repr=False)
    digests: frozenset[str] = frozenset()

    def covers(self, text: str) -> bool:
        """Whether the record with this text in `column` is left out."""
        return _digest(self.key, text) in self.digests

    def document(self) -> dict[str, Any]:
        """For the program that makes a copy; `parse` reads it."""
        return {"column": self.column, "key": self.key.hex(), "digests": sorted(self.digests)}

    @staticmethod
    def parse(document: dict[str, Any]) -> Exclusions:
        """Of what `document` gave."""
        return Exclusions(document["column"], bytes.fromhex(document["key"]), frozenset(document["digests"]))


def _digest(key: bytes, text: str) -> str:
    return hmac.digest(key, text.encode(), sha256).hex()


def read(folder: Path) -> Exclusions:
    """The list of the data set in `folder`.

    Raises:
        IntegrityError: list or key are damaged or missing. Nothing may run then: it could reach who is excluded.
    """
    path = folder / LIST
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        digests = frozenset(str(one) for one in kept["ids"])
        if kept["format"] != FORMAT or not isinstance(kept["column"], str):
            raise ValueError("another format")
        if not digests and not (folder / KEY).exists():
            return Exclusions(kept["column"])  # `change` was cut off before it wrote the first id
        key = (folder / KEY).read_bytes()
        if len(key) != KEY_BYTES:  # under another key nobody would be covered
            raise IntegrityError(f"{folder / KEY}: is damaged; restore it from a backup")
        return Exclusions(kept["column"], key, digests)
    except FileNotFoundError as error:
        if not path.exists() and not (folder / KEY).exists():
            return Exclusions()
        raise IntegrityError(f"{error.filename}: is missing; restore it from a backup") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: is damaged; restore it from a backup") from error


def change(folder: Path, column: str, ids: Iterable[str], *, undo: bool = False) -> tuple[Exclusions, int]:
    """Put ids on the list, or with `undo` take them off; durable when it returns. The list, and how many are new on it
    or were taken off.

    column: of the ids; "" for that of the list.

    Raises:
        InputError: another column than the list's, or none where there is no list yet; too many ids.
        IntegrityError: as `read`.
    """
    before = read(folder)
    column = column or before.column
    if not column:
        raise InputError("--column: name the column of the site's table that holds the ids")
    if before.digests and column != before.column:
        raise InputError(
            f"--column: got '{column}'; the list is of column '{before.column}', whose ids belong here"
        )
    key = before.key or secrets.token_bytes(KEY_BYTES)
    given = frozenset(_digest(key, text) for text in ids)
    after = before.digests - given if undo else before.digests | given
    if len(after) > MOST_IDS:
        raise InputError(
            f"at most {MOST_IDS} ids can be excluded; take the records out of the source instead"
        )
    if not before.key:  # an empty list first: a key without a list would read as a list that was lost
        _write(folder / LIST, column, frozenset())
        write_private(folder / KEY, key)
    _write(folder / LIST, column, after)
    return Exclusions(column, key, after), len(before.digests ^ after)


def _write(path: Path, column: str, digests: frozenset[str]) -> None:
    document = {"format": FORMAT, "column": column, "ids": sorted(digests)}
    write_private(path, json.dumps(document).encode())


def ids_in(path: Path) -> list[str]:
    """The ids of a text file, one a line; blanks around them and empty lines do not count.

    Raises:
        InputError: it cannot be read, is no UTF-8 text, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a text file, an id a line"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text; give a text file, an id a line") from error
    found = [text for line in lines if (text := line.strip())]
    if not found:
        raise InputError(f"{path}: holds no id; give a text file, an id a line")
    return found
