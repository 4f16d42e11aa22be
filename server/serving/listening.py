"""Where a served model is reached: its sockets, and the certificate that it shows."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from consortium.protocol import credentials
from consortium.protocol.errors import InputError
from consortium.protocol.files import write_private
from consortium.server import pki


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, or asyncio does not see TCP, leaves Nagle's algorithm on, and answers wait for 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise InputError(
            f"{host}:{port}: cannot be listened on ({error.strerror}); give another --host or --port"
        ) from error
    return listening


def bracketed(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host


def tls(
    folder: Path, host: str, certificate: tuple[Path, Path] | None, client_ca: Path | None
) -> tuple[ssl.SSLContext, grpc.ServerCredentials]:
    """For both doors: TLS 1.3 at the REST door, and callers' certificates where a `client_ca` is given.

    folder: where a certificate for `host` is made if none is given. certificate: chain and key, as PEM files.

    Raises:
        InputError: a file cannot be read, or is not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with _naming_files():
        if certificate is not None:
            chain, key = certificate
            context.load_cert_chain(chain, key)
            pair = key.read_bytes(), chain.read_bytes()
        else:
            pair = _own(folder, host, context)
        ca = None
        if client_ca is not None:
            ca = client_ca.read_bytes()
            context.load_verify_locations(cadata=ca.decode())
            context.verify_mode = ssl.CERT_REQUIRED
    return context, grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


@contextlib.contextmanager
def _naming_files() -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        raise InputError(
            f"--cert, --key or --client-ca: is no PEM as expected, or key and certificate differ ({error.reason})"
        ) from error
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error


def key_file(folder: Path) -> Path:
    """Where the key lies that private keys and features in a serving program's folder are encrypted under."""
    return folder.with_name(folder.name + ".key")


def _own(folder: Path, host: str, context: ssl.SSLContext) -> tuple[bytes, bytes]:
    """Key and chain of the certificate in the folder, made where it is missing, over or for another host."""
    now = time.time()
    path = folder / "server.pem"
    lock = credentials.lock_at(key_file(folder))
    if path.exists():
        _, chain = credentials.load(path, lock)
        stale = credentials.due(chain[0], now) or pki.general_name(host) not in pki.names(chain[0])
    if not path.exists() or stale:
        root_key, key = pki.new_key(), pki.new_key()
        root = pki.root(root_key, "served models", now)
        issuer = pki.Authority(
            root_key, root
        )  # its key is not kept: the next certificate has a root of its own
        leaf = pki.server_leaf(key.public_key(), issuer, "served models", host, now)
        write_private(folder / "root.pem", credentials.pem([root]))
        credentials.save(path, key, [leaf], lock)
    key, chain = credentials.load(path, lock)
    credentials.present(context, path, lock)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private, credentials.pem(chain)
