"""The certificates of a federation: root, issuing authority, server, sites. Pure functions; times are arguments.

    root      P-256, 20 years   signs issuing authorities and trust statements; may lie off the machine
    issuing   P-256, 2 years    signs leaves, nothing else (path length 0)
    server    90 days           serverAuth; its host, localhost and 127.0.0.1
    site      90 days           clientAuth; CN is the site, URI is consortium://FEDERATION/site/SITE

Extensions are those that RFC 5280 wants, so that strict verifiers accept them. Times are seconds since the epoch; a
certificate is valid from an hour before it is made, for clocks that run behind, and never longer than its issuer.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from consortium.protocol import credentials
from consortium.protocol.configuration import is_address
from consortium.protocol.errors import ConsortiumError, IntegrityError

ROOT_LIFE = timedelta(days=20 * 365)
ISSUING_LIFE = timedelta(days=2 * 365)
LEAF_LIFE = timedelta(days=90)
SKEW = timedelta(hours=1)
MAX_CSR = 8192
"""Characters of a certificate request (PEM) that are read."""

_CURVES = ("secp256r1", "secp384r1")


@dataclass(frozen=True)
class Authority:
    """A key that signs certificates, and its own certificate. Its `repr` does not show the key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def __repr__(self) -> str:
        return f"Authority({self.certificate.subject.rfc4514_string()!r})"


@dataclass(frozen=True)
class Issued:
    """A certificate as it is handed out. chain: PEM, leaf first; fingerprint: SHA-256 (hex) of the leaf's DER."""

    chain: str
    fingerprint: str
    issued: float
    expires: float


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def root(key: ec.EllipticCurvePrivateKey, federation: str, now: float) -> x509.Certificate:
    """The certificate that a federation's root gives itself."""
    name = _name(federation, "root")
    builder = _builder(name, name, key.public_key(), now, ROOT_LIFE)
    return _authority(builder, path_length=1).sign(key, hashes.SHA256())


def issuing(
    key: ec.EllipticCurvePrivateKey, root: Authority, federation: str, now: float
) -> x509.Certificate:
    """A certificate by the root for an authority that issues leaves."""
    name = _name(federation, f"issuing {_when(now):%Y-%m-%d}")
    builder = _issued(name, key.public_key(), root, now, ISSUING_LIFE)
    return _authority(builder, path_length=0).sign(root.key, hashes.SHA256())


def server_leaf(
    key: ec.EllipticCurvePublicKey, issuer: Authority, federation: str, hosts: Sequence[str], now: float
) -> x509.Certificate:
    """The server's certificate for `hosts`, localhost and 127.0.0.1."""
    builder = _issued(_name(federation, "server"), key, issuer, now, LEAF_LIFE)
    names = [general_name(one) for one in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    return _leaf(builder, names, ExtendedKeyUsageOID.SERVER_AUTH).sign(issuer.key, hashes.SHA256())


def site_leaf(
    key: ec.EllipticCurvePublicKey, issuer: Authority, federation: str, site: str, now: float
) -> Issued:
    """A site's certificate. The name is the caller's: from the roster, never from a request."""
    builder = _issued(_name(federation, site), key, issuer, now, LEAF_LIFE)
    names = [x509.UniformResourceIdentifier(f"consortium://{federation}/site/{site}")]
    leaf = _leaf(builder, names, ExtendedKeyUsageOID.CLIENT_AUTH).sign(issuer.key, hashes.SHA256())
    chain = credentials.pem([leaf, issuer.certificate]).decode()
    ends = leaf.not_valid_after_utc.timestamp()
    return Issued(chain, credentials.fingerprint(leaf), now, ends)


def requested_key(csr: str) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate request (PEM). Subject and extensions of the request count for nothing.

    Raises:
        IntegrityError: it is malformed, not signed by its own key, or its key is not on P-256 or P-384.
    """
    if len(csr) > MAX_CSR:
        raise IntegrityError(f"certificate request: {len(csr)} characters; at most {MAX_CSR} are read")
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        key = request.public_key()
        # The kind first: checking a signature of a huge RSA key is work for nothing.
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
            raise IntegrityError("certificate request: a key on P-256 or P-384 was expected")
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IntegrityError("certificate request: it is malformed") from error
    if not signed:
        raise IntegrityError("certificate request: it is not signed by its own key")
    return key


def general_name(host: str) -> x509.GeneralName:
    """A host as a certificate names it."""
    return x509.IPAddress(ipaddress.ip_address(host)) if is_address(host) else x509.DNSName(host)


def names(certificate: x509.Certificate) -> Sequence[x509.GeneralName]:
    """The alternative names of a certificate."""
    return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)


def _when(now: float) -> datetime:
    return datetime.fromtimestamp(int(now), UTC)


def _name(federation: str, common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: float,
    life: timedelta,
    not_after: datetime | None = None,
) -> x509.CertificateBuilder:
    ends = _when(now) + life
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_when(now) - SKEW)
        .not_valid_after(min(ends, not_after) if not_after else ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _issued(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: Authority, now: float, life: timedelta
) -> x509.CertificateBuilder:
    above = issuer.certificate
    if not credentials.valid_at(above, now):
        raise ConsortiumError(
            f"the certificate '{credentials.common_name(above)}' is not valid now (its last day is "
            f"{above.not_valid_after_utc.date()}), so nothing can be issued by it; is this machine's clock right? "
            "If it is, type: consortium server rotate --dir DIR"
        )
    identifier = above.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = _builder(subject, above.subject, key, now, life, above.not_valid_after_utc)
    return builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
    )


def _authority(builder: x509.CertificateBuilder, path_length: int) -> x509.CertificateBuilder:
    return builder.add_extension(
        x509.BasicConstraints(ca=True, path_length=path_length), critical=True
    ).add_extension(_usage(signs_certificates=True), critical=True)


def _leaf(
    builder: x509.CertificateBuilder, names: Sequence[x509.GeneralName], usage: x509.ObjectIdentifier
) -> x509.CertificateBuilder:
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
