"""What every gRPC call has in common: its policy row, the caller, its id, its metrics, and errors as rich status."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from adapters_store.errors import SelfTestFailed
from gateway.errors import EngineUnavailable, Overloaded, PermissionDenied, public_message, wire_error
from gateway.server.auth import GRPC_POLICY, Access, authorize

if TYPE_CHECKING:
    from adapters_store.accounts import Principal
    from gateway.server.context import ServerContext

logger = logging.getLogger(__name__)

DOMAIN: Final = "patchbay"
_STATUS_KEY: Final = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class Call:
    """What a method of ours gets as its second argument. id: of the request, in hex; made here, never the client's."""

    id: str
    principal: Principal


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Stands before every method: without a row in `GRPC_POLICY` nobody reaches it."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """grpc's hook: the handler of a method, wrapped."""
        handler = await continuation(details)
        access = GRPC_POLICY.get(details.method)
        if handler is None or access is Access.PUBLIC:
            return handler
        return self._wrapped(handler, details.method, access)

    def _wrapped(self, handler: Any, method: str, access: Access | None) -> Any:
        if handler.response_streaming:
            behaviour, make = self._streaming(handler, method, access), _stream_maker(handler)
        else:
            behaviour, make = self._single(handler, method, access), _single_maker(handler)
        return make(
            behaviour,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _single(self, handler: Any, method: str, access: Access | None) -> Callable[..., Any]:
        inner = handler.stream_unary or handler.unary_unary

        async def single(request: Any, context: Any) -> Any:
            async with self._call(method, access, context) as call:
                return await inner(request, call)

        return single

    def _streaming(self, handler: Any, method: str, access: Access | None) -> Callable[..., Any]:
        inner = handler.stream_stream or handler.unary_stream

        async def streaming(request: Any, context: Any) -> Any:
            async with self._call(method, access, context) as call, aclosing(inner(request, call)) as messages:
                async for message in messages:
                    yield message

        return streaming

    @asynccontextmanager
    async def _call(self, method: str, access: Access | None, context: Any) -> AsyncGenerator[Call, None]:
        call_id = uuid.uuid4().hex
        context.set_trailing_metadata((("x-request-id", f"req_{call_id}"),))
        started, code = time.monotonic(), "OK"
        try:
            yield Call(call_id, await self._admit(access, context))
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as error:
            code = wire_error(error).grpc
            await _abort(context, error, f"req_{call_id}")
        finally:
            service, _, name = method[1:].rpartition("/")
            self._context.metrics.grpc_request(service, name, code, time.monotonic() - started)

    async def _admit(self, access: Access | None, context: Any) -> Principal:
        if access is None:
            raise PermissionDenied("This method is not open to callers.")
        metadata = dict(context.invocation_metadata() or ())
        principal = await authorize(self._context, metadata.get("authorization"), access)
        assert principal is not None, "public methods are not wrapped"
        return principal


def _stream_maker(handler: Any) -> Callable[..., Any]:
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler
    return grpc.unary_stream_rpc_method_handler


def _single_maker(handler: Any) -> Callable[..., Any]:
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler
    return grpc.unary_unary_rpc_method_handler


async def _abort(context: Any, error: Exception, request_id: str) -> NoReturn:
    """End the call with the status of `error`; an unexpected one is logged under the request's id, and not shown."""
    wire = wire_error(error)
    if wire.http >= 500 and not isinstance(error, EngineUnavailable):
        logger.error("request %s failed", request_id, exc_info=error)
    code = grpc.StatusCode[wire.grpc]
    status = rich_status(error)
    metadata = (("x-request-id", request_id), (_STATUS_KEY, status.SerializeToString()))
    await context.abort(code, status.message, metadata)
    raise AssertionError("abort returns never")


def rich_status(error: BaseException) -> status_pb2.Status:
    """google.rpc.Status of an error: ErrorInfo always, BadRequest and RetryInfo where they say something."""
    wire = wire_error(error)
    status = status_pb2.Status(code=grpc.StatusCode[wire.grpc].value[0], message=public_message(error))
    metadata = {}
    if isinstance(error, SelfTestFailed):
        metadata = {"version": error.ref, "report": json.dumps(error.report.as_json)}
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=wire.code, domain=DOMAIN, metadata=metadata))
    param = getattr(error, "param", None)
    if param is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=param, description=status.message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    seconds = error.retry_after if isinstance(error, Overloaded) else 1.0
    if isinstance(error, Overloaded | EngineUnavailable):
        delay = Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status
