"""One HTTPS connection to a door of the server, directly or through an HTTP proxy (CONNECT).

TLS 1.3 only; the server is whoever the pinned root certificate vouches for, under the name that was asked for. Bodies
stream: a model is never in memory as a whole.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from consortium.protocol.causes import cause, mistrust, shut_out
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.wire import CHUNK, MAX_DOCUMENT


class UnreachableError(ConsortiumError):
    """The server cannot be reached now; trying again later may help."""


class ShutOutError(UnreachableError):
    """The server took the connection, and then ended it unanswered or refused the certificate that it was shown."""


class StatusError(ConsortiumError):
    """The server answered with an error: `status` is HTTP's."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(reason)


def trusting(root: Path) -> ssl.SSLContext:
    """TLS 1.3 towards a server that the root certificate in a PEM file vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cafile=str(root))
    return context


def proxy_for(host: str, environment: Mapping[str, str] = os.environ) -> str:
    """The URL of the proxy that the environment names for https to `host`, or ""."""
    exceptions = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    names = [one.strip().lstrip(".") for one in exceptions.split(",") if one.strip()]
    if "*" in names or any(host == name or host.endswith("." + name) for name in names):
        return ""
    return environment.get("https_proxy") or environment.get("HTTPS_PROXY") or ""


class Connection:
    """Requests to one door, one after the other. Not for several threads at once.

    proxy: the URL of an HTTP proxy, or "". timeout: seconds without a byte before a request fails.
    """

    def __init__(
        self, host: str, port: int, context: ssl.SSLContext, *, proxy: str = "", timeout: float = 60.0
    ) -> None:
        self._host, self._port, self._context = host, port, context
        self._proxy, self._timeout = proxy, timeout
        self._http: http.client.HTTPSConnection | None = None

    def request(
        self,
        method: str,
        path: str,
        document: Mapping[str, Any] | None = None,
        *,
        body: Iterable[bytes | memoryview] | None = None,
        length: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one request; its reply must be read or closed before the next.

        document: a JSON body. body, length: a streamed one and its bytes.

        Raises:
            UnreachableError: no connection, or it broke; ShutOutError: the server broke it.
            StatusError: the server's answer is an error.
            IntegrityError: the server is not the one that is trusted.
        """
        sent = dict(headers or {})
        content: bytes | Iterable[bytes | memoryview] | None = body
        if document is not None:
            content = json.dumps(document).encode()
            length = len(content)
            sent["Content-Type"] = "application/json"
        if content is not None:
            sent["Content-Length"] = str(length)
        try:
            connection = self._open()
            connection.request(method, path, content, sent)
            reply = Reply(connection.getresponse(), self)
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise IntegrityError(
                f"{self._host}:{self._port}: is not the server that is trusted ({mistrust(error)})"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            kind = ShutOutError if shut_out(error) else UnreachableError
            way = f" through the proxy {self._proxy}" if self._proxy else ""
            raise kind(f"{self._host}:{self._port}: cannot be reached{way} ({cause(error)})") from error
        if reply.status >= 400:
            raise StatusError(reply.status, reply.reason())
        return reply

    def _open(self) -> http.client.HTTPSConnection:
        if self._http is None:
            if self._proxy:
                self._http = _through(self._proxy, self._host, self._port, self._context, self._timeout)
            else:
                self._http = http.client.HTTPSConnection(
                    self._host, self._port, timeout=self._timeout, context=self._context, blocksize=CHUNK
                )
        return self._http

    def interrupt(self) -> None:
        """Break what is under way in another thread, which then fails as `UnreachableError`."""
        connection = self._http
        if connection is not None and connection.sock is not None:
            try:
                connection.sock.shutdown(2)
            except OSError:
                return

    def close(self) -> None:
        """End the connection; the next request opens another."""
        if self._http is not None:
            self._http.close()
            self._http = None


def _through(
    proxy: str, host: str, port: int, context: ssl.SSLContext, timeout: float
) -> http.client.HTTPSConnection:
    parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    if parts.scheme != "http" or not parts.hostname:
        raise InputError("proxy: an address such as http://proxy.clinic.example:3128 would be right")
    if parts.username or parts.password:
        raise InputError("proxy: a URL with a password is refused; use a proxy that knows this machine")
    connection = http.client.HTTPSConnection(
        parts.hostname, parts.port or 3128, timeout=timeout, context=context, blocksize=CHUNK
    )
    connection.set_tunnel(host, port)
    return connection


class Reply:
    """A reply whose body is read piece by piece."""

    def __init__(self, response: http.client.HTTPResponse, connection: Connection) -> None:
        self._response, self._connection = response, connection
        self.status = response.status

    def header(self, name: str) -> str:
        """A header's value, or ""."""
        return self._response.headers.get(name, "")

    def read(self, length: int) -> bytes:
        """Up to so many bytes; fewer only at the end.

        Raises:
            UnreachableError: the connection broke.
        """
        try:
            return self._response.read(length)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise UnreachableError(f"the connection broke ({cause(error)})") from error

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer`; the number of bytes, 0 at the end. Raises as `read`."""
        try:
            return self._response.readinto(buffer)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise UnreachableError(f"the connection broke ({cause(error)})") from error

    def document(self, limit: int = MAX_DOCUMENT * 16) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            IntegrityError: it is none, or longer than `limit` bytes.
        """
        content = self.read(limit + 1)
        try:
            document = json.loads(content) if len(content) <= limit else None
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise IntegrityError("the server's answer is not a JSON object of this version")
        return document

    def reason(self) -> str:
        """What an error says, for people."""
        text = self.read(4096).decode(errors="replace")
        try:
            said = json.loads(text)["error"]
        except (ValueError, KeyError, TypeError):
            said = f"the server answered {self.status} {self._response.reason}"
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in str(said)[:2000])

    def close(self) -> None:
        """Skip what is left of the body."""
        if not self._response.isclosed():
            self._connection.close()
