"""A database whose driver wants a password: SQLite, behind a dialect that checks the one of its URL.

`install` puts it where Python finds it by PYTHONPATH; its URL is clinicdb://reader@clinic//PATH, and the right password
is the text of PATH.password.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL

LOOKING = 0.5
"""Seconds for which connecting takes, so that the program that does it can be looked at."""


class Dialect(SQLiteDialect_pysqlite):
    """SQLite with a user and a password."""

    name = "clinicdb"
    driver = "clinicdb"
    supports_statement_cache = True

    def create_connect_args(self, url: URL) -> tuple[Sequence[Any], dict[str, Any]]:
        """Where to connect to, with the right password."""
        assert url.database is not None
        time.sleep(LOOKING)
        if url.password != Path(f"{url.database}.password").read_text(encoding="utf-8"):
            raise PermissionError("wrong password")
        return [url.database], {}


def install(folder: Path) -> Path:
    """Put the driver into a folder for PYTHONPATH."""
    about = folder / "clinicdb-1.0.dist-info"
    about.mkdir(parents=True)
    shutil.copy(__file__, folder / "clinicdb.py")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: clinicdb\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[sqlalchemy.dialects]\nclinicdb = clinicdb:Dialect\n")
    return folder
