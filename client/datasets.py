"""The data that this site has registered: `data.toml`, and a folder for each with its mapping and holdout key.

    format = 1

    [patients]
    source = "/srv/exports/patients.csv"   # a file or folder; "sql" where the mapping has the query

The holdout key decides which rows are held out. It is made when a data set is first added, and stays when it is
removed, so that rows that were held out once never become training rows.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from consortium.client.home import Home
from consortium.protocol.errors import InputError, nearest
from consortium.protocol.files import private_folder, sync_folder, write_private

FORMAT = 1
MAPPING, KEY = "mapping.toml", "holdout.key"
SQL = "sql"

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Dataset:
    """One registered data set. source: its file or folder; None where the mapping's query gives it."""

    name: str
    source: Path | None
    folder: Path

    def mapping(self) -> dict[str, Any]:
        """The document of its mapping, which was checked when it was added; empty for none.

        Raises:
            InputError: it cannot be read any more.
        """
        path = self.folder / MAPPING
        try:
            return tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: cannot be read; add '{self.name}' again (consortium client data remove, then add)"
            ) from error

    def digests(self) -> dict[str, str]:
        """What an audit log says of it: where it lies, and the SHA-256 of its mapping."""
        mapping = hashlib.sha256((self.folder / MAPPING).read_bytes()).hexdigest()
        return {"source": SQL if self.source is None else str(self.source), "mapping": mapping}

    def key(self) -> bytes:
        """Its holdout key.

        Raises:
            InputError: it is not there.
        """
        path = self.folder / KEY
        try:
            return path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: the holdout key cannot be read ({error.strerror}); restore it from a backup"
            ) from error


class Datasets:
    """The registry of one site."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def all(self) -> list[Dataset]:
        """Every data set, by name.

        Raises:
            InputError: the registry has mistakes.
        """
        path = self._home.data_file
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read, or is not TOML; correct it") from error
        if document.pop("format", None) != FORMAT:
            raise InputError(f"{path}: format: format = {FORMAT} would be right")
        for name, table in document.items():
            if not (
                isinstance(table, dict) and set(table) == {"source"} and isinstance(table["source"], str)
            ):
                raise InputError(f"{path}: [{name}]: source, and nothing else, would be right")
        return [self._made(name, document[name]["source"]) for name in sorted(document)]

    def get(self, name: str) -> Dataset:
        """One data set.

        Raises:
            InputError: there is none of that name.
        """
        known = {one.name: one for one in self.all()}
        if name not in known:
            hint = nearest(name, known) or "; see: consortium client data list"
            raise InputError(f"data '{name}': there is no such data set{hint}")
        return known[name]

    def add(self, name: str, source: str, mapping: Path | None) -> Dataset:
        """Register a data set. source: a file or folder, or "sql". mapping: a file, which is copied.

        Raises:
            InputError: the name is taken or no name, there is no such source, or the mapping has mistakes.
        """
        if _NAME.fullmatch(name) is None or name == "format":
            raise InputError(f"data {name[:80]!r}: small letters, digits, - and _ would be right as a name")
        known = {one.name: one.source for one in self.all()}
        if name in known:
            raise InputError(f"data '{name}': is there already; first: consortium client data remove {name}")
        where = _source(name, source)
        own = _checked(name, where, mapping)
        private_folder(self._home.data(name).parent)
        folder = private_folder(self._home.data(name))
        key = folder / KEY
        if not key.exists():
            write_private(key, secrets.token_bytes(32))
        write_private(folder / MAPPING, own)
        self._write({**known, name: where})
        return self._made(name, SQL if where is None else str(where))

    def remove(self, name: str) -> None:
        """Take a data set out; its source is untouched and its holdout key stays.

        Raises:
            InputError: there is none of that name.
        """
        folder = self.get(name).folder
        self._write({one.name: one.source for one in self.all() if one.name != name})
        (folder / MAPPING).unlink(missing_ok=True)
        sync_folder(folder)

    def _made(self, name: str, source: str) -> Dataset:
        return Dataset(name, None if source == SQL else Path(source), self._home.data(name))

    def _write(self, sources: Mapping[str, Path | None]) -> None:
        tables = {name: {"source": SQL if path is None else str(path)} for name, path in sources.items()}
        write_private(self._home.data_file, tomli_w.dumps({"format": FORMAT, **tables}).encode())


def _source(name: str, source: str) -> Path | None:
    if source == SQL:
        return None
    if "://" in source:  # not repeated: it may hold a password
        raise InputError(
            f"data '{name}': a database's URL belongs into the mapping, as url under [source] beside sql; "
            "then: --source sql"
        )
    path = Path(source).expanduser()
    if not path.exists() or not os.access(path, os.R_OK):
        raise InputError(
            f"data '{name}': there is no {source} that can be read; give a file, a folder or sql"
        )
    return path.resolve()


def _checked(name: str, source: Path | None, mapping: Path | None) -> bytes:
    """The bytes of a mapping that fits the source; a mapping that says nothing where there is none."""
    from consortium.client.mapping import load

    document = load(mapping) if mapping is not None else {}
    asks = "sql" in document.get("source", {})
    if source is None and not asks:
        raise InputError(
            f"data '{name}': --source sql needs sql and url under [source] in its mapping (--map)"
        )
    if source is not None and asks:
        raise InputError(f"data '{name}': the mapping has sql, so the source is not a file; say --source sql")
    return mapping.read_bytes() if mapping is not None else b"format = 1\n"
