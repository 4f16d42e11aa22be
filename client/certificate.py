"""A site's certificate: what is asked of the server, and what is taken from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from consortium.protocol import credentials, wire
from consortium.protocol.errors import IntegrityError


def request_for(key: ec.EllipticCurvePrivateKey, site: str) -> str:
    """A certificate request (PEM)."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()


def chain_from(
    answer: Mapping[str, Any], root: x509.Certificate, site: str, key: ec.EllipticCurvePrivateKey
) -> list[x509.Certificate]:
    """The chain in the server's answer: for our key and name, by the federation's root.

    Raises:
        IntegrityError: it is not.
    """
    text = wire.field(answer, "chain", str)
    chain = credentials.certificates(text.encode(errors="replace"), "the server's answer")
    credentials.check_issued(chain, root, "the server's answer")
    mine = credentials.same_key(key.public_key(), chain[0].public_key())
    if not mine or credentials.common_name(chain[0]) != site:
        raise IntegrityError("the server's answer: the certificate is not for this site's name and key")
    return chain
