"""The TCP sockets of a door: listening, turning away, and whom a connection is counted against."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct

from consortium.protocol.errors import InputError

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - they are compared
"""What stands for every address of this machine."""
BACKLOG = 1024
UNSENT = 1 << 17
"""Bytes that may wait in the kernel to be sent: so a slow peer shows progress often, and takes little memory."""
KEEPALIVE = (20, 10, 3)
"""Seconds of silence before the kernel asks whether the peer's machine is still there, between asking, and times."""

_ALIVE = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
_NO_LINGER = struct.pack("ii", 1, 0)


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Nagle's delay is off, dead peers are found; accepted sockets inherit both."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if not 0 <= port <= 65535:
        raise InputError(f"{where}: a port from 1 to 65535 would be right, or 0 for a free one")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listening = socket.socket(found[0][0], socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{where}: is no address to listen on; 0.0.0.0 or :: would be right") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listening.family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in zip(_ALIVE, KEEPALIVE, strict=True):
            listening.setsockopt(socket.IPPROTO_TCP, option, value)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        listening.bind(found[0][4])
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise InputError(f"{where}: cannot be listened on: {_cannot(error)}") from error
    return listening


def _cannot(error: OSError) -> str:
    code = error.errno
    if code == errno.EADDRINUSE:
        return "it is in use; end the program that listens there, or choose another port"
    if code == errno.EADDRNOTAVAIL:
        return "this machine has no such address; 0.0.0.0 or :: would listen on all that it has"
    if code == errno.EACCES:
        return "this user may not; ports below 1024 are for root, choose a higher one"
    return error.strerror or str(error)


def counted(host: str) -> tuple[str, str]:
    """An address for people, and what is counted: itself, or its /64, as one machine has a whole one."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address), str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped), str(address.ipv4_mapped)
    return str(address), str(ipaddress.IPv6Network((address, 64), strict=False))


def reset(connection: socket.socket) -> None:
    """Close a socket at once, leaving nothing behind in the kernel: no state, no bytes that nobody takes."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    connection.close()
