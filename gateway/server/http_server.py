"""The HTTP front door: OpenAI's wire shapes, adapters, administration and health, as one FastAPI app."""

from __future__ import annotations

import logging
import time
import uuid
from importlib.metadata import version
from typing import Final

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.metrics import CONTENT_TYPE, FrontDoorMetrics
from gateway.server.context import ServerContext
from gateway.server.http_adapters import adapter_routes, admin_routes
from gateway.server.http_fine_tuning import file_routes, fine_tuning_routes
from gateway.server.http_inference import inference_routes
from gateway.server.http_routes import PolicyRoute, error_response
from gateway.server.http_vllm import vllm_routes

logger = logging.getLogger(__name__)

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def create_http_app(context: ServerContext) -> FastAPI:
    """The app of one front door. It serves no documentation pages: those would load scripts from elsewhere."""
    app = FastAPI(
        title="Patchbay",
        version=version("patchbay"),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: _http_error},
    )
    app.state.context = context
    for routes in (
        _service_routes(context, app),
        inference_routes(context),
        adapter_routes(context),
        vllm_routes(context),
        admin_routes(context),
        file_routes(context),
        fine_tuning_routes(context),
    ):
        app.include_router(routes)
    app.add_middleware(_Envelope, metrics=context.metrics)
    return app


def _service_routes(context: ServerContext, app: FastAPI) -> APIRouter:
    router = APIRouter(route_class=PolicyRoute)

    @router.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @router.get("/readyz")
    async def readyz() -> Response:
        reason = context.readiness.reason
        return JSONResponse({"status": reason or "ready"}, 200 if reason is None else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(await context.metrics_text(), media_type=CONTENT_TYPE)

    @router.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(app.openapi())

    return router


async def _http_error(request: Request, error: Exception) -> Response:
    return error_response(error, request.state.request_id)


class _Envelope:
    """Around every request: its id, in and out, one line of metrics, and an answer when all else fails.

    The id is always made here: the engine knows calls by it, so a client must not be able to choose another's.
    """

    def __init__(self, app: ASGIApp, metrics: FrontDoorMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call_id = uuid.uuid4().hex
        request_id = f"req_{call_id}"
        scope.setdefault("state", {}).update(call_id=call_id, request_id=request_id)
        started, status = time.monotonic(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            if status:
                logger.error("request %s failed after its head was sent", request_id, exc_info=error)
                raise
            await error_response(error, request_id)(scope, receive, send_named)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            self._metrics.http_request(method, _route_of(scope), status or 499, time.monotonic() - started)


def _route_of(scope: Scope) -> str:
    route = scope.get("route")
    return route.path if isinstance(route, PolicyRoute) else "none"
