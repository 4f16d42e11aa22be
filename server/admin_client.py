"""How a command reaches a running server: the folder on the same machine, or an address, a token and the root.

--dir DIR        the server's folder: its admin door, where server.toml says that it is, with the token that `init`
                 wrote there
--server URL     https://host:port; the token from CONSORTIUM_TOKEN or the file that CONSORTIUM_TOKEN_FILE names,
                 the federation's root certificate from the file that CONSORTIUM_ROOT names
"""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from consortium.protocol.connection import Connection, StatusError, UnreachableError, proxy_for, trusting
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.server.sockets import EVERYWHERE
from consortium.server.states import OVER

TIMEOUT = 60.0
AWAY = 600.0
"""Seconds that a server may be away from somebody who watches a run."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 10.0
"""Seconds between two tries to reach it, doubled each time."""


class Admin:
    """A connection to one admin door. hint: what to do where it does not answer."""

    def __init__(self, connection: Connection, token: str, hint: str) -> None:
        self._connection, self._token, self._hint = connection, token, hint

    def get(self, path: str) -> dict[str, Any]:
        """What a GET answers. Raises as `post`."""
        return self._request("GET", path, None)

    def post(self, path: str, **document: Any) -> dict[str, Any]:
        """What a POST of a JSON object answers.

        Raises:
            UnreachableError: the server does not run, or not there.
            InputError, RefusedError: it says why not.
        """
        return self._request("POST", path, document)

    def events(
        self,
        study: str,
        say: Callable[[str], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        *,
        look: float | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Answers of the events route, one after the other, from the first event until the run is over.

        say: gets a line when the server is away (it restarts, or the network is cut), and one when it is back; it is
        waited for, `AWAY` seconds at most, and the events go on after the last that came. Without `say`, nobody waits.
        look: seconds for which the route may wait for news; None: as long as it likes.
        """
        after, known, waited, wait = 0, False, 0.0, 0.0
        bound = "" if look is None else f"&wait={look:g}"
        while True:
            try:
                found = self.get(f"/v1/studies/{name_in_path(study)}/events?after={after}{bound}")
            except (InputError, RefusedError, IntegrityError):
                raise
            except ConsortiumError as error:
                if say is None or not known or waited >= AWAY:
                    raise
                if not waited:
                    say(f"lost the server ({error}); waiting for it, the run goes on when it is back")
                wait = min(max(2 * wait, FIRST_WAIT), LONGEST_WAIT)
                sleep(wait)
                waited += wait
                continue
            if say is not None and waited:
                say("the server is back")
            known, waited, wait = True, 0.0, 0.0
            yield found
            after = max([after, *(event["id"] for event in found["events"])])
            if found["state"] in OVER and not found["events"]:
                return

    def _request(self, method: str, path: str, document: Mapping[str, Any] | None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._token}"}
        try:
            return self._connection.request(method, path, document, headers=headers).document(1 << 28)
        except UnreachableError as error:
            raise UnreachableError(f"{error}; {self._hint}") from error
        except StatusError as error:
            raise _error(error) from error


def _error(error: StatusError) -> ConsortiumError:
    if error.status in (401, 403):
        return RefusedError(str(error))
    if error.status in (400, 404, 409, 413):
        return InputError(str(error))
    return ConsortiumError(str(error))


def name_in_path(name: str) -> str:
    """A name that a person typed, as a part of a path."""
    return quote(name, safe="")


def connect(folder: Path | None, server: str | None, environment: Mapping[str, str] = os.environ) -> Admin:
    """The admin door that a person named.

    Raises:
        InputError: the folder is no server's, or address, token or root are missing.
    """
    if server:
        return _remote(server, environment)
    place = folder or Path(environment.get("CONSORTIUM_SERVER_DIR", "."))
    try:
        settings = tomllib.loads((place / "server.toml").read_text(encoding="utf-8"))
        host, port = str(settings.get("admin_bind", "127.0.0.1")), int(settings["admin_port"])
        token = (place / "admin.token").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InputError(
            f"{place}: is no server's folder ({Path(error.filename).name}: {error.strerror}); give --dir DIR, "
            "or --server URL"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{place / 'server.toml'}: has no admin_port that can be read; correct it, the server says more: "
            f"consortium server start --dir {place}"
        ) from error
    if host in EVERYWHERE:
        host = "127.0.0.1"
    connection = Connection(host, port, trusting(place / "root.pem"), timeout=TIMEOUT)
    return Admin(connection, token, f"is the server running? Start it: consortium server start --dir {place}")


def _remote(server: str, environment: Mapping[str, str]) -> Admin:
    parts = urlsplit(server)
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.password:
        raise InputError(f"--server: got {parts.scheme}://{parts.hostname}; https://HOST:PORT would be right")
    token = environment.get("CONSORTIUM_TOKEN", "")
    if not token and "CONSORTIUM_TOKEN_FILE" in environment:
        token = _text(Path(environment["CONSORTIUM_TOKEN_FILE"]), "CONSORTIUM_TOKEN_FILE").strip()
    if not token:
        raise InputError(
            "a token is needed; set CONSORTIUM_TOKEN, or CONSORTIUM_TOKEN_FILE to the file with it"
        )
    root = environment.get("CONSORTIUM_ROOT", "")
    if not root:
        raise InputError("set CONSORTIUM_ROOT to the file with the federation's root certificate (root.pem)")
    _text(Path(root), "CONSORTIUM_ROOT")
    port = parts.port or 9441
    connection = Connection(
        parts.hostname, port, trusting(Path(root)), proxy=proxy_for(parts.hostname), timeout=TIMEOUT
    )
    return Admin(connection, token, "is the server running there, and are address and port right?")


def _text(path: Path, variable: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{variable}: {path} cannot be read ({error.strerror})") from error
