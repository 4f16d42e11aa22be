"""Talking to the running agent of a folder, over `agent.sock` in it: a JSON object on one line, each way.

    {"call": "status"}   {"call": "pause"}   {"call": "resume"}

Whoever can open the socket may ask; it has mode 0600 in a folder of mode 0700.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from consortium.protocol.errors import ConsortiumError, InputError

LONGEST = 4096
SECONDS = 5.0

_log = logging.getLogger("consortium.agent")


class NotRunning(ConsortiumError):  # noqa: N818 - it is a state, not a mistake
    """No agent runs over this folder."""


class Control:
    """The agent's end. calls: what can be asked, by name; each gives a document."""

    def __init__(self, path: Path, calls: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
        self._path, self._calls = path, calls
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        with _short(path) as address:
            before = os.umask(0o177)
            try:
                self._listener.bind(address)
            finally:
                os.umask(before)
        self._listener.listen(8)
        threading.Thread(target=self._loop, name="control", daemon=True).start()

    def close(self) -> None:
        """Take the socket away."""
        self._path.unlink(missing_ok=True)
        self._listener.close()

    def _loop(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # it was closed
            with connection, contextlib.suppress(OSError):
                connection.settimeout(SECONDS)
                answer = self._answer(_line(connection))
                connection.sendall(json.dumps(answer).encode() + b"\n")

    def _answer(self, line: bytes) -> Mapping[str, Any]:
        try:
            name = json.loads(line)["call"]
            call = self._calls[name]
        except (ValueError, KeyError, TypeError):
            return {"error": "this agent does not know that call"}
        try:
            return call()
        except (ConsortiumError, OSError) as error:
            return {"error": str(error)}


def ask(path: Path, call: str) -> dict[str, Any]:
    """What the running agent answers to a call.

    Raises:
        NotRunning: there is no agent at that socket.
        ConsortiumError: it says no, or nothing.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with connection:
        connection.settimeout(SECONDS)
        try:
            with _short(path) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            folder = path.parent
            raise NotRunning(
                f"{folder}: no agent runs here; type: consortium client start --dir {folder}"
            ) from error
        except OSError as error:
            raise InputError(
                f"{path}: cannot be opened ({error.strerror}); run this as the agent's user"
            ) from error
        try:
            connection.sendall(json.dumps({"call": call}).encode() + b"\n")
            answer = json.loads(_line(connection, 1 << 20))
        except (OSError, ValueError) as error:
            raise ConsortiumError("the agent does not answer; is it ending?") from error
    if not isinstance(answer, dict) or ("error" in answer and "running" not in answer):
        raise ConsortiumError(
            f"the agent says: {answer.get('error') if isinstance(answer, dict) else answer}"
        )
    return answer


def _line(connection: socket.socket, limit: int = LONGEST) -> bytes:
    content = b""
    while not content.endswith(b"\n") and len(content) < limit:
        piece = connection.recv(min(limit, 65536))
        if not piece:
            break
        content += piece
    return content


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """An address for a socket's path, however long the path is (the system takes 107 bytes)."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
