"""What all HTTP routes share: the policy row, the caller, the size of the body, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from adapters_store.accounts import Principal
from adapters_store.errors import SelfTestFailed
from gateway.errors import (
    AuthenticationFailed,
    EngineUnavailable,
    GatewayError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PermissionDenied,
    RequestCancelled,
    RequestTooLarge,
    public_message,
    wire_error,
)
from gateway.server.auth import HTTP_POLICY, Access, authorize
from gateway.server.context import ServerContext
from gateway.server.openai_schema import invalid_request

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FORMS: Final = frozenset({("POST", "/v1/adapters"), ("POST", "/v1/files")})
"""The routes that read a form as it arrives; what others are sent is held in memory, whatever its content type."""

_FORM_ROOM: Final = 1 << 20
"""Bytes of a multipart body beside its files."""


class PolicyRoute(APIRoute):
    """A route that nobody reaches without a row in `HTTP_POLICY`; the key is checked before the body is read."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        denied = [method for method in self.methods or () if (method, path) not in HTTP_POLICY]
        if denied:
            raise LookupError(f"{denied} {path} has no row in HTTP_POLICY")

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler inside ours."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            route = request.method, self.path
            try:
                await _admit(request, HTTP_POLICY[route])
                request = _bounded(request, is_form=route in _FORMS)
                if route not in _FORMS:
                    await request.body()
                return await handle(request)
            except Exception as error:
                return error_response(error, request.state.request_id)

        return handler


async def _principal(request: Request) -> Principal:
    principal = request.state.principal
    assert isinstance(principal, Principal), "a public route asks for the caller"
    return principal


Caller = Annotated[Principal, Depends(_principal)]
"""The caller of a route that is not public."""


def context_of(request: Request) -> ServerContext:
    """The context that the app was made with."""
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


async def _admit(request: Request, access: Access) -> None:
    header = request.headers.get("authorization")
    request.state.principal = await authorize(context_of(request), header, access)


def _bounded(request: Request, *, is_form: bool) -> Request:
    """The request, whose body raises `RequestTooLarge` where it passes the limit of its kind."""
    limits = context_of(request).config.limits
    limit = limits.max_request_bytes
    if is_form:
        limit = max(limits.max_upload_bytes, limits.max_training_file_bytes) + _FORM_ROOM
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > limit:
        raise _too_large(limit)
    return Request(request.scope, _bounded_receive(request.receive, limit))


def _bounded_receive(receive: Receive, limit: int) -> Receive:
    left = limit

    async def bounded() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise _too_large(limit)
        return message

    return bounded


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body of the request is larger than the limit of {limit:,} bytes.")


def error_response(error: Exception, request_id: str) -> JSONResponse:
    """The answer that tells of `error`; an unexpected one is logged under the request's id, and not shown."""
    if isinstance(error, ClientDisconnect):
        error = RequestCancelled("The client went away.")
    headers = dict(getattr(error, "headers", None) or {})  # of Starlette's own: `Allow`
    error = _known(error)
    wire = wire_error(error)
    if wire.http >= 500 and not isinstance(error, EngineUnavailable):
        logger.error("request %s failed", request_id, exc_info=error)
    return JSONResponse(error_body(error), wire.http, headers | _headers_of(error))


def error_body(error: BaseException) -> dict[str, Any]:
    """OpenAI's error object."""
    wire = wire_error(error)
    param = getattr(error, "param", None)
    body = {"message": public_message(error), "type": wire.type, "param": param, "code": wire.code}
    if isinstance(error, SelfTestFailed):
        body |= {"version": error.ref, "report": error.report.as_json}
    return {"error": body}


def _headers_of(error: Exception) -> dict[str, str]:
    """What a client does about it: when to try again, or what to send (RFC 9110 asks for it beside a 401)."""
    if isinstance(error, AuthenticationFailed):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, Overloaded):
        milliseconds = math.ceil(error.retry_after * 1000)
        return {"retry-after": str(math.ceil(error.retry_after)), "retry-after-ms": str(milliseconds)}
    if isinstance(error, EngineUnavailable):
        return {"retry-after": "1"}
    return {}


def _known(error: Exception) -> Exception:
    """FastAPI's and Starlette's own errors as ours."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return InvalidRequest(f"The body is not valid JSON: {first['ctx']['error']}.")
        return invalid_request(first["type"], first["loc"][1:], first["msg"])
    if isinstance(error, HTTPException):
        return _http_error(error)
    return error


def _http_error(error: HTTPException) -> GatewayError:
    match error.status_code:
        case 404:
            return NotFound("There is no such route. The API is described at /openapi.json.")
        case 405:
            return MethodNotAllowed("This route does not take this method.")
        case 413:
            return RequestTooLarge("The body of the request is too large.")
        case 401 | 403:
            return PermissionDenied("This is not allowed.")
        case status if 400 <= status < 500:
            return InvalidRequest("The body of the request cannot be read.")
    return InternalError("The server failed on this request.")


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first. Raises `ClientDisconnect` then."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
