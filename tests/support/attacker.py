"""What an attacker on the network does: raw lines to a door, with any certificate or none, and any bytes."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.client
import json
import socket
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from consortium.protocol import credentials

HERE = "127.0.0.1"


@dataclass(frozen=True)
class Said:
    """What a door answered. status: 0 where the connection ended without an answer."""

    status: int = 0
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def document(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


NOTHING = Said()


def blind() -> ssl.SSLContext:
    """TLS of an attacker, who trusts everybody and shows nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def showing(key: ec.EllipticCurvePrivateKey, chain: list[x509.Certificate]) -> ssl.SSLContext:
    """TLS of whoever shows this certificate."""
    context = blind()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with tempfile.NamedTemporaryFile() as file:
        file.write(private + credentials.pem(chain))
        file.flush()
        context.load_cert_chain(file.name)
    return context


def self_signed(name: str) -> ssl.SSLContext:
    """TLS of whoever made a certificate of that name for himself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
    )
    return showing(key, [builder.sign(key, hashes.SHA256())])


class Line:
    """One connection to a door; what is sent over it is the test's."""

    def __init__(self, port: int, context: ssl.SSLContext | None, source: str = HERE) -> None:
        plain = socket.create_connection((HERE, port), timeout=20, source_address=(source, 0))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.socket = plain if context is None else context.wrap_socket(plain, server_hostname=HERE)
        except BaseException:
            plain.close()
            raise

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it without a word."""
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Send it all; False where the other side does not take it."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def flood(self, length: int) -> int:
        """Send so many bytes; how many were taken."""
        piece, sent = bytes(1 << 20), 0
        with contextlib.suppress(OSError):
            while sent < length:
                self.socket.sendall(piece)
                sent += len(piece)
        return sent

    def reply(self, method: str = "POST") -> Said:
        """The answer that comes."""
        response = http.client.HTTPResponse(self.socket, method=method)
        try:
            response.begin()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return NOTHING
        return Said(response.status, body, {name.lower(): value for name, value in response.getheaders()})

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Said:
        """One request as anybody would send it, and its answer."""
        self.send(head(method, path, len(body), headers) + body)
        return self.reply(method)

    def ended(self, seconds: float) -> bool:
        """Whether the other side ends the connection in time."""
        self.socket.settimeout(seconds)
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True


def head(method: str, path: str, length: int = 0, headers: Mapping[str, str] | None = None) -> bytes:
    """Request line and headers."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {HERE}", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def once(port: int, context: ssl.SSLContext | None, method: str, path: str, **more: Any) -> Said:
    """One request over a line of its own; `NOTHING` where it ended without an answer."""
    try:
        with Line(port, context) as line:
            return line.ask(method, path, **more)
    except OSError:
        return NOTHING


def closed(port: int) -> bool:
    """Whether nobody listens on a port."""
    try:
        socket.create_connection((HERE, port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def resident(pid: int) -> int:
    """Bytes of memory that a process has to itself."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the process is gone")
