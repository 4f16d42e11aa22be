"""The REST door: Open Inference Protocol, version 2, with lineage, feedback, metrics and a page for people.

    GET  /                                             a page that explains the model and lets a person try it
    GET  /v2   /v2/health/live   /v2/health/ready      open, for probes
    GET  /v2/models/NAME[/versions/V][/ready]          what it takes and gives
    POST /v2/models/NAME[/versions/V]/infer            predictions
    GET  /v2/models/NAME[/versions/V]/lineage          what made the model that is live
    GET  /v2/models/NAME[/versions/V]/contract
    POST /v2/models/NAME/feedback                      {prediction, row, label}
    POST /v2/repository/index                          all models and versions
    GET  /metrics                                      Prometheus

Everything but the page and the probes wants a token (`Authorization: Bearer`). A mistake of the caller is answered
with 4xx and {"error": what and where}.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from consortium.protocol.errors import ConsortiumError
from consortium.server.serving import page, service, tokens, wire
from consortium.server.serving.counters import CONTENT_TYPE
from consortium.server.serving.engine import Loaded
from consortium.server.serving.service import Service
from consortium.server.serving.tokens import Caller

MAX_BODY = 1 << 25
"""Bytes of a request."""
MAX_FEEDBACK = 1 << 13
_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_LENGTH = b"inference-header-content-length"

_log = logging.getLogger(__name__)
Handler = Callable[[Request, Caller], Awaitable[Response]]


def app(served: Service) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The ASGI application: predictions first, as nine in ten requests are such; Starlette has the rest."""
    door = _Door(served)
    others = _others(door)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        place = (
            _INFER.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        )
        if place is None:
            await others(scope, receive, send)
            return
        request = Request(scope, receive)
        request.scope["path_params"] = {"name": place[1], "version": place[2] or ""}
        try:
            response = await predictions(request)
        except HTTPException as error:
            response = await _refused(request, error)
        except Exception as error:  # noqa: BLE001 - told as Starlette tells its own
            response = await _fault(request, error)
        await response(scope, receive, send)

    predictions = door.guarded(tokens.INFER, door.infer)
    return serve


def _others(door: _Door) -> Starlette:
    model = "/v2/models/{name}"
    one = (model, model + "/versions/{version}")
    return Starlette(
        routes=[
            Route("/", door.page),
            Route("/v2", door.server),
            Route("/v2/health/live", door.live),
            Route("/v2/health/ready", door.ready),
            *(Route(path + "/ready", door.guarded(tokens.ABOUT, door.model_ready)) for path in one),
            *(Route(path + "/lineage", door.guarded(tokens.LINEAGE, door.lineage)) for path in one),
            *(Route(path + "/contract", door.guarded(tokens.ABOUT, door.contract)) for path in one),
            *(Route(path, door.guarded(tokens.ABOUT, door.metadata)) for path in one),
            Route(model + "/feedback", door.guarded(tokens.FEEDBACK, door.feedback), methods=["POST"]),
            Route("/v2/repository/index", door.guarded(tokens.ABOUT, door.index), methods=["POST"]),
            Route("/metrics", door.guarded(tokens.METRICS, door.metrics)),
            *(
                Route(path + "/infer", door.guarded(tokens.INFER, door.infer), methods=["POST"])
                for path in one
            ),
        ],
        exception_handlers={HTTPException: _refused, Exception: _fault},
    )


def _json(
    document: Mapping[str, Any] | list[Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    content = json.dumps(document, separators=(",", ":")).encode()
    return Response(content, status, dict(headers or {}), "application/json")


def _header(request: Request, name: bytes) -> str | None:
    """A header of the request, by its name in small letters, without Starlette's copy of them: it is asked for four."""
    for key, value in request.scope["headers"]:
        if key == name:
            found: str = value.decode("latin-1")
            return found
    return None


class _Answer(Response):
    """JSON with status 200, as nearly every answer is: its head is two headers."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        length = str(len(self._content)).encode()
        head = [(b"content-length", length), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": self._content})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code, error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    _log.error("a fault in Consortium: %s", type(error).__name__, exc_info=error)
    return _json({"error": "a fault of the server; its log says more"}, 500)


async def body(request: Request, most: int) -> bytes:
    """The body, of at most `most` bytes. One that is late is cut off by `bounded.py`.

    Raises:
        HTTPException: it is larger, compressed, or cut off.
    """
    if (_header(request, b"content-encoding") or "identity") != "identity":
        raise HTTPException(415, "the body is compressed; send it as it is")
    length = _header(request, b"content-length") or "0"
    if length.isdigit() and int(length) > most:
        raise HTTPException(
            413, f"the body has {length[:20]} bytes; at most {most} are read", {"Connection": "close"}
        )
    pieces, size, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "the body was cut off")
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size > most:
            raise HTTPException(413, f"the body has more than {most} bytes", {"Connection": "close"})
        pieces.append(piece)
    return b"".join(pieces)


class _Door:
    def __init__(self, served: Service) -> None:
        self._served = served

    def guarded(self, right: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """The handler, for callers who have the right; errors as statuses."""

        async def guarded(request: Request) -> Response:
            caller = tokens.find(self._served.callers, _header(request, b"authorization"))
            if caller is None:
                self._served.counters.denied.inc()
                return _json(
                    {"error": "a token is needed: Authorization: Bearer TOKEN"},
                    401,
                    {"WWW-Authenticate": "Bearer"},
                )
            if right not in caller.rights:
                self._served.counters.denied.inc()
                return _json({"error": f"the token of '{caller.name}' has not the right '{right}'"}, 403)
            try:
                return await handler(request, caller)
            except ConsortiumError as error:
                status = service.status_of(error)
                if status >= 500:
                    _log.error("%s", error)
                return _json({"error": str(error)}, status)

        return guarded

    # For anybody

    async def page(self, request: Request) -> Response:
        kept = self._served.features
        return Response(
            page.html(None if kept is None else kept.days), headers=page.HEADERS, media_type="text/html"
        )

    async def live(self, request: Request) -> Response:
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        ready = self._served.engine.ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def server(self, request: Request) -> Response:
        return _json(
            {"name": service.SERVER, "version": version("consortium"), "extensions": service.EXTENSIONS}
        )

    # For callers

    def _find(self, request: Request) -> Loaded:
        return self._served.engine.find(request.path_params["name"], request.path_params.get("version", ""))

    async def infer(self, request: Request, caller: Caller) -> Response:
        content = await body(request, MAX_BODY)
        asked = wire.parse(content, _header(request, _LENGTH))
        place = request.path_params
        name, wanted = place["name"], place.get("version", "")
        found = await self._served.predict(caller, "rest", name, wanted, asked.given, list(asked.outputs))
        head = {
            "model_name": found.by.name,
            "model_version": found.by.version,
            "id": asked.id,
            "parameters": service.parameters(found),
        }
        answer, length = wire.answer(found.outputs, asked, head)
        if length is None:
            return _Answer(answer)
        return Response(
            answer, headers={_LENGTH.decode(): str(length)}, media_type="application/octet-stream"
        )

    async def metadata(self, request: Request, caller: Caller) -> Response:
        found = self._find(request)
        return _json(service.metadata(found, list(self._served.engine.offered[found.name].versions)))

    async def contract(self, request: Request, caller: Caller) -> Response:
        return _json(self._find(request).contract)

    async def model_ready(self, request: Request, caller: Caller) -> Response:
        found = self._find(request)
        return _json({"name": found.name, "ready": True})

    async def lineage(self, request: Request, caller: Caller) -> Response:
        found = self._find(request)
        return _json({"version": found.version, "bundle_digest": found.digest, **found.lineage})

    async def index(self, request: Request, caller: Caller) -> Response:
        await body(request, MAX_FEEDBACK)
        return _json(
            [
                {"name": name, "version": number, "state": "READY", "reason": ""}
                for name, offered in sorted(self._served.engine.offered.items())
                for number in sorted(offered.versions)
            ]
        )

    async def feedback(self, request: Request, caller: Caller) -> Response:
        document = wire.document(await body(request, MAX_FEEDBACK))
        found = self._find(request)
        self._served.desk.feedback(caller.name, found.name, document, found.contract)
        made_by = self._served.desk.version_of(found.name, document["prediction"])
        self._served.counters.feedback.labels(found.name, made_by).inc()
        return _json({"kept": True})

    async def metrics(self, request: Request, caller: Caller) -> Response:
        return Response(self._served.counters.text(), media_type=CONTENT_TYPE)
