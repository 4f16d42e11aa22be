"""Documents and open files over a local socket: between a parent process and the child that it started.

A message is a JSON object, preceded by its length (4 bytes, big-endian), and perhaps open files, which travel as file
descriptors (SCM_RIGHTS): a model of 400 MB is handed over without being copied. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from consortium.protocol.errors import ConsortiumError, IntegrityError

MAX_MESSAGE = 1 << 24
"""Bytes of one JSON object; models are not in it. A thousand sites' instructions take 2 MiB, and the lineage of a model
after a thousand rounds of a hundred sites 5."""
MOST_VALUES = 1 << 20
"""Values in one JSON object, which take up to a hundred bytes of memory each."""
MAX_FILES = 4


class ClosedError(ConsortiumError):
    """The process at the other end has ended or closed the socket."""


def send(connection: socket.socket, document: Mapping[str, Any], files: Sequence[int] = ()) -> None:
    """Send one message; `files` are descriptors, which stay open here.

    Raises:
        ClosedError: the other end is gone.
        ConsortiumError: the document is longer than what is read of one.
    """
    content = json.dumps(document, separators=(",", ":")).encode()
    if len(content) > MAX_MESSAGE:
        raise ConsortiumError(f"local message: {len(content)} bytes, of which at most {MAX_MESSAGE} are read")
    first = len(content).to_bytes(4, "big")
    try:
        socket.send_fds(connection, [first], list(files))
        connection.sendall(content)
    except OSError as error:
        raise ClosedError("the process at the other end has ended") from error


def receive(connection: socket.socket, most: int = MAX_MESSAGE) -> tuple[dict[str, Any], list[int]]:
    """One message: its document, and descriptors that the caller must close. most: bytes of the document.

    Raises:
        ClosedError: the other end is gone, perhaps in the middle of a message.
        IntegrityError: what came is no message.
    """
    try:
        first, files, flags, _ = socket.recv_fds(connection, 4, MAX_FILES)
    except OSError as error:
        raise ClosedError("the process at the other end has ended") from error
    try:
        if flags & socket.MSG_CTRUNC:
            raise IntegrityError("local message: more files than a message may have")
        length = int.from_bytes(first + _exactly(connection, 4 - len(first)), "big")
        if length > most:
            raise IntegrityError(f"local message: {length} bytes; at most {most} are read")
        try:
            document = _parsed(_exactly(connection, length))
        except (ValueError, RecursionError) as error:
            raise IntegrityError("local message: is not JSON") from error
        if not isinstance(document, dict):
            raise IntegrityError("local message: is not a JSON object")
    except BaseException:
        close(files)
        raise
    return document, files


def _parsed(content: bytes) -> Any:
    """JSON, once what it can take of memory is known to be little."""
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise IntegrityError(f"local message: more than {MOST_VALUES} values")
    return json.loads(content)


def _exactly(connection: socket.socket, length: int) -> bytes:
    pieces = []
    while length:
        try:
            piece = connection.recv(min(length, 1 << 20))
        except OSError as error:
            raise ClosedError("the process at the other end has ended") from error
        if not piece:
            raise ClosedError("the process at the other end has ended")
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def close(files: Sequence[int]) -> None:
    """Close descriptors that `receive` gave."""
    for file in files:
        with contextlib.suppress(OSError):
            os.close(file)
