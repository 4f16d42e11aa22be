"""The admin door: what people and their scripts ask of a running server, by token.

    viewer       sees status, studies, runs, events, metrics
    researcher   submits studies, too
    admin        everything: invites, revokes, starts, stops, rotates

A token is compared by its digest in constant time; requests without one, or beyond its role, learn nothing.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from consortium.protocol import bundle, wire
from consortium.protocol.code import is_own
from consortium.protocol.errors import InputError
from consortium.protocol.study import Study
from consortium.server.archive import Archive
from consortium.server.exchange import Exchange
from consortium.server.federation import Federation
from consortium.server.listener import Request, Response, error_response, json_response
from consortium.server.metrics import CONTENT_TYPE, Metrics
from consortium.server.roster import Roster
from consortium.server.runs import Runs

Role = Literal["viewer", "researcher", "admin"]
RANK: Mapping[str, int] = {"viewer": 0, "researcher": 1, "admin": 2}
MAX_SUBMITTED = bundle.MAX_BUNDLE * 4 // 3 + 4096
"""Bytes of a request with a bundle in base64."""
WATCH_SECONDS = 20.0
LONGEST_PATH = 300
MOST_FAILURES = 30
"""Wrong tokens a minute; whoever sends another is told to wait. A right one is served all the same."""

_TOKEN_NAME = re.compile(r"[\w.-]{1,63}", re.ASCII)
_log = logging.getLogger(__name__)


class Host(Protocol):
    """What the admin door asks of the whole server (`server/serve.py`)."""

    federation: Federation

    def status(self) -> dict[str, Any]: ...
    def invite(self, site: str, hours: float) -> dict[str, Any]: ...
    def revoke(self, site: str) -> None: ...
    def rotate(self, sites: bool) -> dict[str, Any]: ...
    def gate(self, name: str, document: dict[str, Any]) -> dict[str, Any]: ...
    def gated(self, name: str) -> dict[str, Any]: ...
    def note(self, kind: str, body: Mapping[str, Any]) -> object: ...
    def refused(self, door: str, why: str) -> None: ...


@dataclass(frozen=True)
class _Route:
    method: str
    path: str
    role: Role
    answer: Callable[[Request, str], dict[str, Any] | Response]


class AdminDoor:
    """Answers the requests of people. A path's `*` stands for one name, which the answer is given."""

    def __init__(self, host: Host, roster: Roster, archive: Archive, exchange: Exchange, runs: Runs) -> None:
        self._host, self._roster, self._archive = host, roster, archive
        self._exchange, self._runs = exchange, runs
        self._failures: deque[float] = deque(maxlen=MOST_FAILURES)
        self._lock = threading.Lock()
        series = Metrics(host.federation.config.name, roster, archive, exchange, runs)
        self._routes = (
            _Route("GET", "/v1/status", "viewer", lambda _, __: host.status()),
            _Route("GET", "/v1/sites", "viewer", lambda _, __: {"sites": host.status()["sites"]}),
            _Route("GET", "/v1/studies", "viewer", lambda _, __: {"studies": archive.studies()}),
            _Route("GET", "/v1/studies/*", "viewer", lambda _, name: self._show(name)),
            _Route("GET", "/v1/studies/*/events", "viewer", self._events),
            _Route("POST", "/v1/studies", "researcher", lambda request, _: self._submit(request)),
            _Route("POST", "/v1/studies/*/start", "admin", lambda _, name: {"run": runs.start(name)}),
            _Route("POST", "/v1/studies/*/rerun", "admin", self._rerun),
            _Route("POST", "/v1/studies/*/stop", "admin", lambda _, name: self._tell(runs.stop, name)),
            _Route("POST", "/v1/studies/*/pause", "admin", lambda _, name: self._tell(runs.pause, name)),
            _Route("POST", "/v1/studies/*/resume", "admin", lambda _, name: self._tell(runs.resume, name)),
            _Route("POST", "/v1/sites/*/invite", "admin", self._invite),
            _Route("POST", "/v1/sites/*/revoke", "admin", lambda _, name: self._revoke(name)),
            _Route("POST", "/v1/rotate", "admin", self._rotate),
            _Route("POST", "/v1/tokens/*", "admin", self._token),
            _Route("POST", "/v1/models/*/gate", "admin", self._gate),
            _Route("GET", "/v1/models/*/gate", "viewer", lambda _, name: host.gated(name)),
            _Route("GET", "/metrics", "viewer", lambda _, __: Response(200, series.text(), CONTENT_TYPE)),
        )

    def handle(self, request: Request) -> Response:
        """One request of whoever holds a token."""
        found = self._who(request)
        if found is None:
            self._host.refused("admin", "no such token")
            if self._too_many():
                return error_response(429, "too many wrong tokens; try again in a minute, with the right one")
            return error_response(
                401, "a token is needed: --dir on the server's machine, or CONSORTIUM_TOKEN"
            )
        name, role = found
        for route in self._routes:
            star = _match(route.path, request.path)
            if star is None or route.method != request.method:
                continue
            if RANK[role] < RANK[route.role]:
                self._host.refused("admin", f"beyond the role {role}")
                return error_response(403, f"token '{name}' has the role {role}; {route.role} is needed")
            if route.method != "GET":
                _log.info("%s %s by token '%s'", route.method, request.path, name)
                self._host.note("command", {"by": name, "role": role, "what": request.path[:LONGEST_PATH]})
            answer = route.answer(request, star)
            return answer if isinstance(answer, Response) else json_response(answer)
        return error_response(404, "there is no such route on the admin door")

    def _who(self, request: Request) -> tuple[str, str] | None:
        """Name and role of the request's token."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return self._roster.role_of(token) if scheme.lower() == "bearer" and token else None

    def _too_many(self) -> bool:
        """Note a wrong token; whether `MOST_FAILURES` came within the minute before it."""
        now = time.monotonic()
        with self._lock:
            many = len(self._failures) == MOST_FAILURES and now - self._failures[0] < 60.0
            self._failures.append(now)
        return many

    def _submit(self, request: Request) -> dict[str, Any]:
        document = _document(request, MAX_SUBMITTED)
        found = bundle.read(_decoded(document)) if "bundle" in document else _without_code(document)
        study = found.study
        found.check_needs()
        self._archive.submit(found)
        about = {"study": study.name, "digest": study.digest, "bundle": found.digest}
        self._host.note("submitted", about)
        self._exchange.rouse()
        return about

    def _rerun(self, request: Request, name: str) -> dict[str, Any]:
        without = _document(request).get("without")
        if not isinstance(without, list) or not all(isinstance(site, str) for site in without):
            raise InputError("without: a list of names of sites would be right")
        return self._runs.rerun(name, without, self._roster.joined())

    def _show(self, name: str) -> dict[str, Any]:
        return self._runs.show(name)

    def _events(self, request: Request, name: str) -> dict[str, Any]:
        """Events of a study's latest run after the one that is known; waits for some."""
        after = request.query.get("after", "0")
        if not after.isdecimal() or len(after) > 15:
            raise InputError("after: the number of an event would be right")
        wait = request.query.get("wait", "")
        if wait and (not wait.isdecimal() or len(wait) > 3):
            raise InputError("wait: a whole number of seconds would be right")
        return self._runs.events(name, int(after), min(float(wait), WATCH_SECONDS) if wait else WATCH_SECONDS)

    def _tell(self, action: Callable[[str], None], name: str) -> dict[str, Any]:
        action(name)
        return self._runs.show(name)

    def _invite(self, request: Request, name: str) -> dict[str, Any]:
        hours = _document(request).get("hours", 72.0)
        if not isinstance(hours, int | float) or isinstance(hours, bool) or not 0 < hours <= 24 * 30:
            raise InputError("hours: a number above 0 and at most 720 would be right")
        return self._host.invite(wire.site_name(name), float(hours))

    def _revoke(self, name: str) -> dict[str, Any]:
        self._host.revoke(name)
        return {"site": name, "status": "revoked"}

    def _rotate(self, request: Request, _: str) -> dict[str, Any]:
        return self._host.rotate(_document(request).get("sites") is True)

    def _gate(self, request: Request, name: str) -> dict[str, Any]:
        document = _document(request)
        for key, kinds in (("version", (int,)), ("margin", (int, float)), ("minimum", (int, float))):
            if document.get(key) is not None and type(document[key]) not in kinds:
                raise InputError(f"{key}: a number would be right")
        return self._host.gate(name, document)

    def _token(self, request: Request, name: str) -> dict[str, Any]:
        role = _document(request).get("role")
        if role not in RANK:
            raise InputError(f"role: got {str(role)[:40]!r}; one of {', '.join(RANK)} would be right")
        if _TOKEN_NAME.fullmatch(name) is None:
            raise InputError(
                f"token name: got {name[:80]!r}; at most 63 letters, digits, '.', '_', '-' would be right"
            )
        return {"name": name, "role": role, "token": self._roster.new_token(name, str(role))}


def _decoded(document: dict[str, Any]) -> bytes:
    try:
        return b64decode(wire.field(document, "bundle", str), validate=True)
    except ValueError as error:
        raise InputError("field 'bundle': base64 of a bundle was expected") from error


def _without_code(document: dict[str, Any]) -> bundle.Bundle:
    """The bundle of the text of a study that has no code of its own."""
    text = wire.field(document, "text", str)
    if len(text) > bundle.MAX_STUDY:
        raise InputError(f"the study has more than {bundle.MAX_STUDY} characters")
    study = Study.parse(text, source="the study")
    if is_own(study.task) or is_own(study.strategy.name):
        raise InputError(
            f"study '{study.name}': brings code of its own; submit it as a bundle: consortium study submit STUDY"
        )
    return bundle.of(study)


def _match(pattern: str, path: str) -> str | None:
    """What `*` stands for in `path`, "" where the pattern has none; None where the path is another."""
    wanted, found = pattern.split("/"), path.split("/")
    if len(wanted) != len(found) or any(w not in ("*", f) for w, f in zip(wanted, found, strict=True)):
        return None
    return next((f for w, f in zip(wanted, found, strict=True) if w == "*"), "")


def _document(request: Request, limit: int = wire.MAX_DOCUMENT) -> dict[str, Any]:
    try:
        document = json.loads(request.read(limit) or b"{}")
    except (ValueError, RecursionError) as error:
        raise InputError("the request is not JSON") from error
    if not isinstance(document, dict):
        raise InputError("the request is not a JSON object")
    return document
