"""The server's ledger of what it noised and published."""

from __future__ import annotations

from pathlib import Path

import pytest
from founded import found
from private_studies import private_study

from consortium.privacy.mechanisms import mechanism_of
from consortium.protocol.audit import FOLDER, segments
from consortium.protocol.errors import IntegrityError
from consortium.server import audit
from consortium.server.serve import Server

CENTRAL = private_study('unit = "site"\nmechanism = "central-gaussian"')


def test_noised_rounds_add_up_over_restarts_and_edits_are_found(tmp_path: Path) -> None:
    """A round that moved the model is one release of its study, a void one is none; a changed figure is found."""
    federation = found(tmp_path / "fed")
    for number in (1, 2):
        server = Server(federation)
        for void in ("too few", ""):
            event = {"kind": "round", "round": number, "attempt": 0, "model": "m", "void": void}
            server.archive.released("private.1", CENTRAL, event)
        said = server.archive.published("private")
        assert said is not None
        one = mechanism_of(CENTRAL)
        assert one is not None
        assert (said["releases"], said["epsilon"]) == (number, one.guarantee(number).epsilon)
        assert server.archive.published("other") is None
        server.store.close()
    audit.verify(federation)
    (path,) = segments(tmp_path / "fed" / FOLDER)
    path.write_bytes(path.read_bytes().replace(b'"noise_multiplier":', b'"noise_multiplieR":', 1))
    with pytest.raises(IntegrityError, match="entry"):
        audit.verify(federation)
