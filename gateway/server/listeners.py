"""The two public listeners of one front door: HTTP by uvicorn and gRPC by grpc.aio, both on its event loop."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import TYPE_CHECKING, Final

import grpc
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import ConfigInvalid

if TYPE_CHECKING:
    from starlette.types import ASGIApp

MAX_HEAD_BYTES: Final = 64 << 10
"""Of a request's line and headers, or of its trailers; one read of the socket may pass it."""
HEAD_S: Final = 30.0
"""How long a request's line and headers may take to arrive, and a new connection to bring any."""
_HEAD_TOO_LARGE: Final = b"431 Request Header Fields Too Large"
_HEAD_TOO_LATE: Final = b"408 Request Timeout"
_BACKLOG: Final = 2048


def bind_http(host: str, port: int, *, shared: bool) -> socket.socket:
    """A bound TCP socket; `shared` lets several front doors of this machine take the same port.

    Raises `ConfigInvalid` when the port is taken or may not be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted sockets inherit it. asyncio would set it, but not on a socket made elsewhere: events then wait 40 ms.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise port_error("http", host, port, error) from error
    return sock


def bind_grpc(server: grpc.aio.Server, host: str, port: int) -> int:
    """Add a plain-text port to a server that has not started, and return it. Raises `ConfigInvalid`.

    Whether several front doors may share it is the server's own option `grpc.so_reuseport`.
    """
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return server.add_insecure_port(target)
    except RuntimeError as error:
        raise port_error("grpc", host, port, error) from error


def port_error(name: str, host: str, port: int, error: Exception) -> ConfigInvalid:
    """Says why a listener could not be had, and what to do."""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        why = "another process listens there"
    else:
        why = str(error)
    param = f"server.{name}_port"
    return ConfigInvalid(f"cannot listen on {host}:{port}: {why}. Choose another {param} (0: any).", param=param)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's faster protocol, which closes a connection whose head or trailers pass `MAX_HEAD_BYTES` (431), or whose
    head is not there within `HEAD_S` (408).

    Its parser has no limits and joins what it has of a URL or header with each piece that comes, so one without end
    would take all memory and, before that, the event loop. uvicorn's other protocol, h11, has limits, but is written in
    Python, and streamed chunks are what a gateway sends most.
    """

    _num_pending = 0  # bytes since the last complete head or piece of a body
    _head_timer: asyncio.TimerHandle | None = None  # while a head is awaited

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        self._num_pending += len(data)
        super().data_received(data)
        if self._num_pending > MAX_HEAD_BYTES:
            self._refuse(_HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Called by the parser."""
        super().on_message_begin()
        if self._head_timer is None:  # else it is the connection's first request, awaited already
            self._await_head()

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._num_pending = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._num_pending = 0
        super().on_body(body)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._refuse, _HEAD_TOO_LATE)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()


class HttpListener:
    """A running uvicorn server on this event loop, which handles no signals."""

    def __init__(self, app: ASGIApp, sock: socket.socket, drain_s: float) -> None:
        config = uvicorn.Config(
            app,
            http=BoundedHttp,
            lifespan="off",
            log_config=None,
            access_log=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=round(drain_s),
        )
        self._server = uvicorn.Server(config)
        self._socket = sock
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The TCP port."""
        port: int = self._socket.getsockname()[1]
        return port

    @property
    def alive(self) -> bool:
        """Whether it accepts connections."""
        return self._task is not None and not self._task.done() and self._server.started

    async def start(self) -> None:
        """Accept connections."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                await self._task
                raise RuntimeError("the HTTP application did not start")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Accept no more; wait for running responses, at most the drain time."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
