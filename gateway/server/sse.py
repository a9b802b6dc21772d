"""Server-sent events: a response that ends its source as soon as the client goes away."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from gateway.server.http_routes import unless_gone


class EventStream(Response):
    """Sends what `events` yields, already encoded, each as one piece of the body.

    `events` must raise nothing: the status has been sent by then. It is closed when the client goes away.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await unless_gone(receive, self._pump(send))
            except (ClientDisconnect, OSError):
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        async for piece in self._events:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
