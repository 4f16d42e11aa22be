"""Whose certificate the roster does not know is said to the admin by name."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from consortium.server import pki
from consortium.server.strangers import MOST, Strangers


def certificate(site: str) -> bytes:
    """A site's, as DER."""
    key, now = pki.new_key(), time.time()
    root = pki.Authority(key, pki.root(key, "lung", now))
    issued = pki.site_leaf(pki.new_key().public_key(), root, "lung", site, now)
    return x509.load_pem_x509_certificates(issued.chain.encode())[0].public_bytes(Encoding.DER)


def test_a_site_that_joined_after_the_backup_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """With the command that lets it in; whom the roster knew, as one that was revoked, and who shows none, is not."""
    known: set[str] = set()
    strangers, one, other = (
        Strangers(known.__contains__, Path("/srv/fed")),
        certificate("hospital-3"),
        certificate("hospital-4"),
    )
    for _ in range(3):
        strangers.refused(one)
    strangers.refused(None)
    (line,) = caplog.messages
    assert line.startswith("site hospital-3: is not let in")
    assert line.endswith("consortium server invite hospital-3 --dir /srv/fed")
    caplog.clear()
    Strangers(lambda fingerprint: True, Path("/srv/fed")).refused(other)
    assert caplog.messages == []


def test_no_more_than_some_are_remembered(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever has the issuing key fills no memory and no log."""
    strangers = Strangers(lambda fingerprint: False, Path("/srv/fed"))
    strangers._told.update(map(str, range(MOST)))
    strangers.refused(certificate("hospital-3"))
    assert caplog.messages == []
