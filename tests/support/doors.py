"""Certificates and plain TLS clients for tests of doors."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HERE = "127.0.0.1"


@dataclass(frozen=True)
class Certificates:
    """A throw-away authority with a server and clients, as PEM files in a folder."""

    folder: Path

    def serving(self, *, clients: bool = True) -> ssl.SSLContext:
        """TLS 1.3 for a server; clients: it asks for a certificate of this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.folder / "server.pem")
        if clients:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.folder / "root.pem")
        return context

    def calling(self, name: str = "") -> ssl.SSLContext:
        """A client that trusts the server; name: whose certificate it shows, "" for none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.folder / "root.pem")
        if name:
            context.load_cert_chain(self.folder / f"{name}.pem")
        return context


def certificates(folder: Path, *names: str) -> Certificates:
    """Make the authority, the server's certificate for 127.0.0.1 and ::1, and one for each name."""
    key = ec.generate_private_key(ec.SECP256R1())
    root = _certificate("root", key, "root", key, x509.BasicConstraints(ca=True, path_length=None))
    (folder / "root.pem").write_bytes(root)
    for name in ("server", *names):
        own = ec.generate_private_key(ec.SECP256R1())
        private = own.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        addresses = [x509.IPAddress(ipaddress.ip_address(one)) for one in (HERE, "::1")]
        leaf = _certificate(name, own, "root", key, x509.SubjectAlternativeName(addresses))
        (folder / f"{name}.pem").write_bytes(private + leaf)
    return Certificates(folder)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    signer: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> bytes:
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        .sign(signer, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def common_name(der: bytes) -> str:
    """The name in a certificate."""
    value = x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    assert isinstance(value, str)
    return value


def plain(port: int, source: str = HERE) -> socket.socket:
    """A TCP connection from an address of this machine."""
    return socket.create_connection((HERE, port), timeout=10, source_address=(source, 0))


def secured(port: int, context: ssl.SSLContext, source: str = HERE) -> ssl.SSLSocket:
    """A TLS connection, its handshake done."""
    return context.wrap_socket(plain(port, source), server_hostname=HERE)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes or breaks the connection."""
    pieces: list[bytes] = []
    while True:
        try:
            piece = connection.recv(65536)
        except (ConnectionError, ssl.SSLError):
            piece = b""
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def soon(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - no path is wanted


def threads() -> int:
    """How many threads this process has."""
    return threading.active_count()


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
