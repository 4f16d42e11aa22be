"""Rows of a database: its URL, which never holds the password, and a query's result.

A URL and a password are given as "env:NAME" or "file:PATH" (a URL also as itself), so that neither stands in arguments,
in files that are handed on, or in what is logged. What a database says of an error may repeat a cell: it goes into a
note of the error, for the eyes of whoever runs the program, and never into its text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy.engine import URL, CursorResult, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from consortium.protocol.errors import InputError

_SECRETS = ("password", "passwd", "pwd", "passphrase", "secret", "token")


def url_of(url: str, password: str | None, keys: tuple[str, str]) -> URL:
    """The URL to connect to; the password, where it is said where it lies, is put in here and only here.

    keys: what url and password are called in errors.

    Raises:
        InputError: the environment variable or file is not there, or the URL is malformed or holds a password.
    """
    found = checked_url(_referred(url, keys[0]), keys[0])
    return found if password is None else found.set(password=_referred(password, keys[1]))


def _referred(reference: str, key: str) -> str:
    """The text that "env:NAME" or "file:PATH" refers to, or the text itself."""
    form, _, name = reference.partition(":")
    if form == "env":
        if name not in os.environ:
            raise InputError(f"{key}: the environment variable {name} is not set; set it and try again")
        return os.environ[name].strip()
    if form == "file":
        try:
            return Path(name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{key}: the file {name} cannot be read; correct the path or its permissions"
            ) from error
    return reference


def checked_url(text: str, key: str) -> URL:
    """A database URL without a password.

    Raises:
        InputError: it is none, or holds one. It is not repeated.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        # The text itself is not repeated: it may hold a password.
        right = "dialect://user@host/database would be right, or env:NAME or file:PATH that holds it"
        raise InputError(f"{key}: is not a database URL; {right}") from error
    if holds_password(url):
        right = (
            'take it out, and use the database\'s own file (pgpass), or password = "env:NAME" or "file:PATH"'
        )
        raise InputError(f"{key}: holds a password; {right}")
    return url


def holds_password(url: URL) -> bool:
    """Whether a URL says a password, in its own place or as an option."""
    return url.password is not None or any(
        word in option.lower() for option in url.query for word in _SECRETS
    )


@contextmanager
def queried(
    url: URL, sql: str, where: tuple[str, str], *, part: int | None = None
) -> Iterator[CursorResult[Any]]:
    """The result of a query, which is read within the block. where: what query and URL are called in errors.

    part: rows that the database hands over at a time; None: all at once, where it does so.

    Raises:
        InputError: the database cannot be reached, or refuses; what it said is a note of the error.
    """
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise InputError(f"{where[1]}: there is no SQLite file {url.database or ''}; correct the path")
    try:
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            if part is not None:
                connection = connection.execution_options(stream_results=True, max_row_buffer=part)
            yield connection.exec_driver_sql(sql)
    except (ImportError, NoSuchModuleError) as error:
        name = url.drivername
        raise InputError(
            f"{where[0]}: there is no driver for '{name}' here; install its Python package"
        ) from error
    except SQLAlchemyError as error:
        said = getattr(error, "orig", None) or error
        right = "try the query in the database's own client"
        refusal = InputError(f"{where[0]}: the database refused ({type(said).__name__}); {right}")
        refusal.add_note(f"The database said: {said}")
        raise refusal from error
