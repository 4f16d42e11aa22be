"""The gRPC door: `inference.GRPCInferenceService`, over TLS, with the tokens of the REST door in `authorization`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from consortium.protocol.errors import ConsortiumError
from consortium.server.serving import service, tokens, wire
from consortium.server.serving.rpc_messages import MESSAGES, SERVICE
from consortium.server.serving.service import Service
from consortium.server.serving.tensors import Given, RequestError
from consortium.server.serving.tokens import Caller
from consortium.server.serving.web import MAX_BODY

_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_CONTENTS = {
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "BYTES": "bytes_contents",
}
_log = logging.getLogger(__name__)
Handler = Callable[[Any, Caller | None], Awaitable[Any]]


def server(served: Service, address: str, credentials: grpc.ServerCredentials, most: int) -> tuple[Any, int]:
    """A gRPC server that is not started yet, and its port. most: calls at a time.

    Raises:
        ConsortiumError: the address is taken.
    """
    door = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_BODY),
            ("grpc.max_metadata_size", 1 << 14),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        ],
        maximum_concurrent_rpcs=most,
    )
    door.add_generic_rpc_handlers((_handlers(served),))
    try:
        port = door.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConsortiumError(f"{address}: the port is taken; give another --grpc-port") from error
    return door, port


def _handlers(served: Service) -> grpc.GenericRpcHandler:
    door = _Door(served)
    methods: Mapping[str, tuple[str, Handler]] = {
        "ServerLive": ("", door.live),
        "ServerReady": ("", door.ready),
        "ServerMetadata": ("", door.server),
        "ModelReady": (tokens.ABOUT, door.model_ready),
        "ModelMetadata": (tokens.ABOUT, door.metadata),
        "ModelInfer": (tokens.INFER, door.infer),
    }
    # Without a deserializer a call's bytes come as they are: what is no message is the caller's mistake, not a fault.
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            name: grpc.unary_unary_rpc_method_handler(
                door.guarded(name, right, handler), response_serializer=lambda one: one.SerializeToString()
            )
            for name, (right, handler) in methods.items()
        },
    )


class _Door:
    def __init__(self, served: Service) -> None:
        self._served = served

    def guarded(self, name: str, right: str, handler: Handler) -> Callable[[bytes, Any], Awaitable[Any]]:
        """The handler, for callers who have the right ("": anybody); errors as statuses."""
        message = MESSAGES[f"{name}Request"]

        async def guarded(content: bytes, context: Any) -> Any:
            caller = None
            if right:
                given = dict(context.invocation_metadata() or ())
                header = given.get("authorization")
                caller = tokens.find(self._served.callers, header if isinstance(header, str) else None)
                if caller is None or right not in caller.rights:
                    self._served.counters.denied.inc()
                    status = (
                        grpc.StatusCode.UNAUTHENTICATED
                        if caller is None
                        else grpc.StatusCode.PERMISSION_DENIED
                    )
                    await context.abort(
                        status, "a token with the right is needed: authorization: Bearer TOKEN"
                    )
            try:
                request = message.FromString(content)
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"this is no {name}Request")
            try:
                return await handler(request, caller)
            except ConsortiumError as error:
                await context.abort(_STATUS[service.status_of(error)], str(error))

        return guarded

    async def live(self, _: Any, __: Caller | None) -> Any:
        return MESSAGES["ServerLiveResponse"](live=True)

    async def ready(self, _: Any, __: Caller | None) -> Any:
        return MESSAGES["ServerReadyResponse"](ready=self._served.engine.ready)

    async def server(self, _: Any, __: Caller | None) -> Any:
        return MESSAGES["ServerMetadataResponse"](
            name=service.SERVER, version=version("consortium"), extensions=service.EXTENSIONS
        )

    async def model_ready(self, request: Any, _: Caller | None) -> Any:
        self._served.engine.find(request.name, request.version)
        return MESSAGES["ModelReadyResponse"](ready=True)

    async def metadata(self, request: Any, _: Caller | None) -> Any:
        found = self._served.engine.find(request.name, request.version)
        about = service.metadata(found, list(self._served.engine.offered[found.name].versions))
        return MESSAGES["ModelMetadataResponse"](**about)

    async def infer(self, request: Any, caller: Caller | None) -> Any:
        assert caller is not None
        if len(request.id) > wire.MAX_ID:
            raise RequestError(f"'id': a text of at most {wire.MAX_ID} letters is expected")
        wanted = list(dict.fromkeys(one.name for one in request.outputs))
        found = await self._served.predict(
            caller, "grpc", request.model_name, request.model_version, _given(request), wanted
        )
        answer = MESSAGES["ModelInferResponse"](
            model_name=found.by.name, model_version=found.by.version, id=request.id
        )
        for key, text in service.parameters(found).items():
            answer.parameters[key].string_param = text
        for name, array in found.outputs.items():
            answer.outputs.add(name=name, datatype=wire.datatype_of(array), shape=array.shape)
            answer.raw_output_contents.append(wire.bytes_of(array))
        return answer


def _given(request: Any) -> list[Given]:
    """The tensors of a request: all raw, or all by field."""
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"raw_input_contents: has {len(raw)} parts for {len(request.inputs)} inputs")
    given = []
    for place, one in enumerate(request.inputs):
        if raw:
            if one.HasField("contents"):
                raise RequestError(f"'{one.name[:80]}': has contents besides raw_input_contents")
            data: list[Any] | bytes = raw[place]
        else:
            data = _listed(one)
        if any(n < 0 for n in one.shape):
            raise RequestError(f"'{one.name[:80]}': has a negative number in its shape")
        given.append(Given(one.name, one.datatype, tuple(one.shape), data))
    return given


def _listed(one: Any) -> list[Any]:
    field = _CONTENTS.get(one.datatype)
    if field is None:
        raise RequestError(f"'{one.name[:80]}': has datatype {one.datatype[:20]!r}, which is not served")
    values = list(getattr(one.contents, field))
    if one.datatype == "BYTES":
        try:
            return [value.decode() for value in values]
        except UnicodeDecodeError as error:
            raise RequestError(f"'{one.name[:80]}': a text is not UTF-8") from error
    return values
