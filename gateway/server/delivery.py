"""The front door's end of the links to the replicas: one long-lived call from each (DESIGN, decision 4)."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

import grpc

from gateway.engine.request import GenerateRequest
from gateway.errors import Conflict, EngineUnavailable
from gateway.rpc import delivery_pb2 as pb
from gateway.rpc import delivery_pb2_grpc as pb_grpc
from gateway.server.delivery_codec import decode_delta, encode_request
from gateway.server.mailbox import Mailbox

logger = logging.getLogger(__name__)

_STOP_GRACE_S: Final = 1.0
TOKEN_METADATA: Final = "patchbay-delivery-token"
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
    # A peer that vanished without closing is noticed within 20 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, slots=True)
class DeliveryAddress:
    """Where a replica connects to a front door. `target` is "host:port"; `token` proves that Ray gave it."""

    target: str
    token: str = field(repr=False)


@dataclass(eq=False, slots=True)
class Connection:
    """One replica's call: the requests that it runs for this front door, and what waits to be sent down to it.

    name: unique to this call. replica: the same for every call of a replica.
    """

    name: str
    replica: str
    draining: bool = False
    mailboxes: dict[str, Mailbox] = field(default_factory=dict)
    outbox: asyncio.Queue[pb.DoorMessage] = field(default_factory=asyncio.Queue)


class DeliveryServer:
    """Sends requests and cancels to the replicas, and puts each delta of their steps into its request's mailbox.

    Lives on one event loop. host: an IP address of this machine that the replicas reach.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._token = secrets.token_hex(32)
        self._server: grpc.aio.Server | None = None
        self._port = 0
        self._running: dict[str, Connection] = {}
        self._connections: dict[str, Connection] = {}
        self._collects: dict[int, asyncio.Future[pb.Report]] = {}
        self._collect_ids = itertools.count(1)

    async def start(self) -> None:
        """Listen on a free port of `host`."""
        self._server = grpc.aio.server(options=CHANNEL_OPTIONS)
        pb_grpc.add_DeliveryServicer_to_server(_Servicer(self), self._server)  # type: ignore[no-untyped-call]
        self._port = self._server.add_insecure_port(_target(self._host, 0))
        await self._server.start()

    async def stop(self) -> None:
        """Ask the replicas to end their calls; requests that still run end with `EngineUnavailable`."""
        for connection in self._connections.values():
            connection.outbox.put_nowait(pb.DoorMessage(closing=True))
        if self._server is not None:
            await self._server.stop(_STOP_GRACE_S)

    @property
    def address(self) -> DeliveryAddress:
        """What a replica needs to connect."""
        return DeliveryAddress(_target(self._host, self._port), self._token)

    @property
    def connections(self) -> list[Connection]:
        """The live connections that take requests."""
        return [connection for connection in self._connections.values() if not connection.draining]

    @property
    def num_running(self) -> int:
        """Requests of this front door that run in a replica."""
        return len(self._running)

    def submit(self, request: GenerateRequest, connection: Connection) -> Mailbox:
        """Send a request to a replica; its deltas come into the mailbox.

        Raises `InvalidRequest` for what cannot be sent, and `Conflict` when the id is in use.
        """
        name = request.request_id
        if name in self._running:
            raise Conflict(f"A request with the id {name} is running. Use another id.", param="request_id")
        message = pb.DoorMessage(submitted=encode_request(request))
        mailbox = Mailbox(name, request.sampling.n)
        self._running[name] = connection
        connection.mailboxes[name] = mailbox
        connection.outbox.put_nowait(message)
        return mailbox

    def close(self, mailbox: Mailbox) -> None:
        """Forget a request, and cancel it in its replica unless all its sequences finished."""
        connection = self._running.pop(mailbox.request_id)
        del connection.mailboxes[mailbox.request_id]
        if not mailbox.finished:
            connection.outbox.put_nowait(pb.DoorMessage(cancelled=[mailbox.request_id]))

    async def collect(self, timeout_s: float = 2.0) -> tuple[list[pb.Report], bool]:
        """The reports of the connected replicas that answer within `timeout_s` seconds, and whether all did."""
        collects = {next(self._collect_ids): connection for connection in self._connections.values()}
        loop = asyncio.get_running_loop()
        futures = {number: loop.create_future() for number in collects}
        self._collects.update(futures)
        for number, connection in collects.items():
            connection.outbox.put_nowait(pb.DoorMessage(collect=number))
        try:
            if futures:
                await asyncio.wait(futures.values(), timeout=timeout_s)
        finally:
            for number in futures:
                del self._collects[number]
        reports = [future.result() for future in futures.values() if future.done()]
        return reports, len(reports) == len(futures)

    def authorized(self, metadata: grpc.aio.Metadata | tuple[tuple[str, str | bytes], ...] | None) -> bool:
        """Whether a call's metadata carries this front door's token."""
        given = dict(metadata or ()).get(TOKEN_METADATA, "")
        return isinstance(given, str) and hmac.compare_digest(given, self._token)

    def attach(self, hello: pb.Hello) -> Connection:
        """A new connection; its first message down is the empty one."""
        connection = self._connections[hello.connection] = Connection(hello.connection, hello.replica)
        connection.outbox.put_nowait(pb.DoorMessage())
        return connection

    def detach(self, connection: Connection) -> None:
        """The connection is gone: its requests end with `EngineUnavailable`."""
        self._connections.pop(connection.name, None)
        for mailbox in connection.mailboxes.values():
            mailbox.fail(EngineUnavailable("The replica that ran this request was lost. Send the request again."))

    def receive(self, connection: Connection, message: pb.ReplicaMessage) -> None:
        """Take one message of a replica."""
        kind = message.WhichOneof("message")
        if kind == "step":
            for delta in message.step.deltas:
                mailbox = connection.mailboxes.get(delta.request_id)
                if mailbox is not None:
                    mailbox.put(decode_delta(delta))
        elif kind == "draining":
            connection.draining = True
        elif kind == "report":
            future = self._collects.get(message.report.collect)
            if future is not None and not future.done():
                future.set_result(message.report)


class _Servicer(pb_grpc.DeliveryServicer):
    """The wire of `DeliveryServer`."""

    def __init__(self, door: DeliveryServer) -> None:
        self._door = door

    async def Attach(  # noqa: N802 (the name in the proto)
        self,
        request_iterator: AsyncIterator[pb.ReplicaMessage],
        context: grpc.aio.ServicerContext[pb.ReplicaMessage, pb.DoorMessage],
    ) -> None:
        """One replica's connection, for as long as it lives."""
        if not self._door.authorized(context.invocation_metadata()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong delivery token")
        connection = self._door.attach((await anext(request_iterator)).hello)
        logger.info("replica connected: %s", connection.name)
        writer = asyncio.create_task(_write_all(connection, context))
        try:
            async for message in request_iterator:
                self._door.receive(connection, message)
        finally:
            writer.cancel()
            self._door.detach(connection)
            logger.info("replica disconnected: %s", connection.name)


async def _write_all(
    connection: Connection, context: grpc.aio.ServicerContext[pb.ReplicaMessage, pb.DoorMessage]
) -> None:
    while True:
        await context.write(await connection.outbox.get())


def _target(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
