"""The site's mapping: how its own columns, units and codes become the study's. It never leaves the site.

    format = 1
    missing = ["NA", -9]                  # cells that mean "no value", beside empty ones; replaces NA, NaN, null

    [source]                              # only where needed
    separator = ";"                       # of a CSV file; decimal = "," and encoding = "latin-1" likewise
    sql = "SELECT ... FROM ..."           # instead of a file
    url = "env:HOSPITAL_DATABASE"         # the database's URL, itself or env:NAME or file:PATH; never a password
    password = "file:/etc/clinic/dbpass"  # only where the database has no pgpass or the like: env:NAME or file:PATH

    [columns.temperature]                 # the study's name
    column = "temp_f"                     # the site's name; the same where left out
    scale = 0.5555555555555556            # study's value = site's value * scale + offset
    offset = -17.77777777777778

    [columns.sex]
    column = "geschlecht"
    codes = { M = "male", W = "female", D = "" }   # "" is a value that the study does not list
    missing = ["U"]

A column that is not named here is taken as it is. Names that a study does not ask for are ignored, so one mapping
serves several studies.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy.engine import URL

from consortium.protocol.database import checked_url, url_of
from consortium.protocol.errors import InputError, nearest

Cell = str | int | float | bool
DEFAULT_MISSING: tuple[Cell, ...] = ("NA", "N/A", "NaN", "nan", "null", "NULL")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ColumnMap(_Part):
    """[columns.NAME]: where the study's column NAME comes from."""

    column: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    codes: dict[str, Cell] | None = None
    missing: list[Cell] | None = None


class SourceMap(_Part):
    """[source]: how a CSV file is written, or the query that gives the table."""

    sql: str | None = None
    url: str | None = None
    password: Annotated[str, Field(pattern=r"^(env|file):.+")] | None = None
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    decimal: Literal[".", ","] = "."
    encoding: str = "utf-8"


class SiteMapping(_Part):
    """A whole mapping, checked."""

    format: Literal[1] = 1
    missing: list[Cell] | None = None
    source: SourceMap = SourceMap()
    columns: dict[str, ColumnMap] = {}

    def of(self, name: str) -> ColumnMap:
        """How the study's column `name` is read."""
        return self.columns.get(name, ColumnMap())

    def local(self, name: str) -> str:
        """The site's name of the study's column `name`."""
        return self.of(name).column or name

    def markers(self, name: str) -> tuple[Cell, ...]:
        """The cells of column `name` that mean "no value", beside empty ones."""
        own = self.of(name).missing
        chosen = own if own is not None else self.missing
        return DEFAULT_MISSING if chosen is None else tuple(chosen)


def load(path: str | Path) -> dict[str, Any]:
    """The document of a mapping file, checked, as `Source.mapping` takes it.

    Raises:
        InputError: the file cannot be read, is not TOML, or has mistakes (all of them).
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give the path of a mapping (TOML)"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text; give the path of a mapping (TOML)") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is not valid TOML: {error}; correct that line") from error
    parse(document, str(path))
    return document


def parse(document: Mapping[str, Any], where: str = "mapping") -> SiteMapping:
    """A mapping from its document; an empty one takes every column as it is. `where` names it in errors.

    Raises:
        InputError: every mistake in it, each with its key. No value is repeated that could be a password.
    """
    if not document:
        return SiteMapping()
    problems: list[str] = []
    mapping = SiteMapping()
    if "format" not in document:
        problems.append("format: format = 1 is needed")
    try:
        mapping = SiteMapping.model_validate(dict(document))
    except ValidationError as error:
        found = [_problem(detail["loc"], detail["type"], detail["msg"]) for detail in error.errors()]
        problems += dict.fromkeys(found)  # a cell of four possible types is one mistake, not four
    problems += _mistakes(mapping)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise InputError(
            f"{where}: {count(len(problems), 'mistake')}\n{lines}\nCorrect the mapping and try again"
        )
    return mapping


def count(n: int, thing: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{n} {thing}" + ("" if n == 1 else "s")


_CELLS = ("str", "int", "float", "bool")
_KEYS: dict[int, type[BaseModel]] = {1: SiteMapping, 2: SourceMap, 3: ColumnMap}


def _problem(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    names = [str(part) for part in loc]
    if len(names) > 2 and ("codes" in names or "missing" in names) and names[-1] in _CELLS:
        return f"{'.'.join(names[:-1])}: a text, a number, true or false would be right"
    key = ".".join(names)
    if kind == "extra_forbidden":
        known = tuple(_KEYS[len(names)].model_fields) if len(names) in _KEYS else ()
        return f"{key}: no such key{nearest(names[-1], known) or '.'} Keys here: {', '.join(known)}"
    if key == "format":
        return "format: format = 1 would be right"
    if key == "source.password":
        return 'source.password: "env:NAME" or "file:PATH" would be right; never the password itself'
    return f"{key}: {message[0].lower()}{message[1:]}"


def _mistakes(mapping: SiteMapping) -> list[str]:
    """What is wrong although each key by itself is right."""
    problems = []
    source = mapping.source
    if (source.sql is None) != (source.url is None):
        given, needed = ("sql", "url") if source.url is None else ("url", "sql")
        problems.append(f"source.{needed}: is needed beside source.{given}")
    if source.password is not None and source.url is None:
        problems.append("source.password: goes with source.sql and source.url only")
    if source.url is not None and not source.url.startswith(("env:", "file:")):
        try:
            checked_url(source.url, "source.url")
        except InputError as error:
            problems.append(str(error))
    for name, column in mapping.columns.items():
        if column.scale == 0:
            problems.append(
                f"columns.{name}.scale: 0 would make every value the same; leave it out or correct it"
            )
        if column.codes is not None and (column.scale != 1 or column.offset != 0):
            problems.append(f"columns.{name}.codes: either codes, or scale and offset, not both")
    return problems


def database(source: SourceMap) -> URL:
    """The URL to connect to; the password, where the mapping says where it lies, is put in here and only here.

    Raises:
        InputError: the environment variable or file is not there, or the URL is malformed or holds a password.
    """
    assert source.url is not None
    return url_of(source.url, source.password, ("source.url", "source.password"))
