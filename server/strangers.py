"""Who shows a certificate that the federation issued, and that the roster does not know: said to the admin, by name.

After a restore that is whoever joined, or renewed its certificate, after the backup was made. It is not let in for the
signature alone: then a stolen issuing key would open the site door, which only the roster does.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

MOST = 256
"""Certificates of which it is said."""

_log = logging.getLogger(__name__)


class Strangers:
    """Says it once of each certificate. knows: whether the roster has a fingerprint, valid still or not. folder: the
    server's."""

    def __init__(self, knows: Callable[[str], bool], folder: Path) -> None:
        self._knows, self._folder, self._told = knows, folder, set[str]()

    def refused(self, der: bytes | None) -> None:
        """A connection was not let in by its certificate, if any, which TLS has found to be of this federation."""
        fingerprint = hashlib.sha256(der).hexdigest() if der else ""
        if not der or fingerprint in self._told or len(self._told) >= MOST or self._knows(fingerprint):
            return
        self._told.add(fingerprint)
        (name,) = x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        _log.warning(
            "site %s: is not let in: the roster does not know its certificate, though this federation issued it; was "
            "this server restored from a backup of before? To let the site in: consortium server invite %s --dir %s",
            *(name.value, name.value, self._folder),
        )
