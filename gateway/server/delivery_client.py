"""The replica's end of the links to the front doors: one to each (DESIGN, decision 4)."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Final

import grpc

from gateway.engine.request import GenerateRequest, TokenDelta
from gateway.errors import Conflict, EngineUnavailable, InternalError
from gateway.rpc import delivery_pb2 as pb
from gateway.rpc import delivery_pb2_grpc as pb_grpc
from gateway.server.delivery import CHANNEL_OPTIONS, TOKEN_METADATA, DeliveryAddress
from gateway.server.delivery_codec import decode_request, encode_step
from gateway.server.mailbox import merge_delta

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S: Final = 5.0
_CLOSE_TIMEOUT_S: Final = 2.0
_POLL_S: Final = 0.05


class RequestStream:
    """One running request: where its deltas go."""

    def __init__(self, request: GenerateRequest, link: Link) -> None:
        self._request_id = request.request_id
        self.adapter: Final = request.adapter.name if request.adapter is not None else None
        self._link = link
        self._unfinished = request.sampling.n
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the last delta of every sequence was handed to the link."""
        return self._unfinished == 0

    async def wait_ended(self) -> None:
        """Wait until the request has ended."""
        await self._ended.wait()

    def push(self, delta: TokenDelta) -> None:
        """Queue a delta for the front door."""
        self._link.queue(delta)
        if delta.finish_reason is not None:
            self._unfinished -= 1
            if self.ended:
                self._ended.set()

    def refuse(self, error: BaseException) -> None:
        """End the request with `error`, all its sequences together."""
        self._unfinished = 1
        self.push(TokenDelta(self._request_id, 0, "", [], finish_reason="error", error=error))


class Link:
    """One long-lived call to one front door. Steps that wait for a slow door are merged into one message."""

    def __init__(self, address: DeliveryAddress, client: DeliveryClient) -> None:
        self.name: Final = f"{client.replica}-{uuid.uuid4().hex[:12]}"
        self.address: Final = address
        self.alive = True
        self.requests: Final[dict[str, asyncio.Task[None]]] = {}
        self._closing = False
        self._client = client
        self._pending: dict[tuple[str, int], TokenDelta] = {}
        self._others: list[pb.ReplicaMessage] = []
        self._wake = asyncio.Event()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run())

    async def wait_ready(self) -> None:
        """Wait until the front door knows this link. Raises `EngineUnavailable` when it does not answer."""
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), _CONNECT_TIMEOUT_S)
        except TimeoutError as error:
            self._task.cancel()
            raise _unreachable(self.address) from error

    def drain(self) -> None:
        """Ask the front door for no more requests."""
        self._send(pb.ReplicaMessage(draining=pb.Draining()))

    async def close(self) -> None:
        """Send what waits, then end the call; a front door that does not take it within 2 s is left."""
        self._finish()
        await asyncio.wait([self._task], timeout=_CLOSE_TIMEOUT_S)
        self._task.cancel()
        await asyncio.wait([self._task])

    def queue(self, delta: TokenDelta) -> None:
        """Add a delta to the next message."""
        key = (delta.request_id, delta.index)
        earlier = self._pending.get(key)
        if earlier is None:
            self._pending[key] = delta
        else:
            merge_delta(earlier, delta)
        self._wake.set()

    def _send(self, message: pb.ReplicaMessage) -> None:
        self._others.append(message)
        self._wake.set()

    def _finish(self) -> None:
        self._closing = True
        self._wake.set()

    async def _run(self) -> None:
        try:
            async with grpc.aio.insecure_channel(self.address.target, options=CHANNEL_OPTIONS) as channel:
                stub = pb_grpc.DeliveryStub(channel)  # type: ignore[no-untyped-call]
                call = stub.Attach(metadata=((TOKEN_METADATA, self.address.token),))
                hello = pb.Hello(connection=self.name, replica=self._client.replica)
                await call.write(pb.ReplicaMessage(hello=hello))
                writer = asyncio.create_task(self._write_all(call))
                try:
                    await self._read_all(call)
                finally:
                    writer.cancel()
                    await asyncio.gather(writer, return_exceptions=True)
        except grpc.aio.AioRpcError as error:
            logger.warning("the link to the front door %s broke: %s", self.address.target, error.details())
        finally:
            self._lost()

    async def _read_all(self, call: grpc.aio.StreamStreamCall[pb.ReplicaMessage, pb.DoorMessage]) -> None:
        async for message in call:
            if not self._ready.done():
                self._ready.set_result(None)
            if message.HasField("submitted"):
                self._client.accept(decode_request(message.submitted), self)
            for request_id in message.cancelled:
                task = self.requests.get(request_id)
                if task is not None:
                    task.cancel()
            if message.collect:
                self._send(pb.ReplicaMessage(report=self._client.report(message.collect)))
            if message.closing:
                self._finish()

    async def _write_all(self, call: grpc.aio.StreamStreamCall[pb.ReplicaMessage, pb.DoorMessage]) -> None:
        while not self._closing or self._pending or self._others:
            await self._wake.wait()
            self._wake.clear()
            if self._pending:
                message = encode_step(list(self._pending.values()))
                self._pending.clear()
                await call.write(message)
            while self._others:
                await call.write(self._others.pop(0))
        await call.done_writing()

    def _lost(self) -> None:
        """Nobody waits for this link's requests any more."""
        self.alive = False
        self._client.forget(self)
        for task in self.requests.values():
            task.cancel()
        if not self._ready.done():
            self._ready.set_exception(_unreachable(self.address))
            self._ready.exception()  # seen, so that asyncio does not report it as lost


class DeliveryClient:
    """Takes requests from the front doors, and sends each engine step's tokens to the front doors of their requests.

    Lives on one event loop.
    replica: names this replica to the front doors. run: runs a request to its end, or refuses it; cancelled when its
    front door gave it up or went away. metrics_text: makes this replica's Prometheus text.
    """

    def __init__(
        self,
        replica: str,
        run: Callable[[GenerateRequest, RequestStream], Awaitable[None]],
        metrics_text: Callable[[], bytes],
    ) -> None:
        self.replica: Final = replica
        self._metrics_text = metrics_text
        self._run = run
        self._is_withdrawn = False
        self._links: dict[str, Link] = {}
        self._streams: dict[str, RequestStream] = {}

    @property
    def num_running(self) -> int:
        """Requests whose last delta was not handed over yet."""
        return len(self._streams)

    def report(self, collect: int) -> pb.Report:
        """The answer to a front door's `collect`."""
        adapters = {stream.adapter for stream in self._streams.values() if stream.adapter is not None}
        return pb.Report(collect=collect, metrics=self._metrics_text(), adapters=sorted(adapters))

    async def connect(self, address: DeliveryAddress) -> Link:
        """The live link to a front door, made on first use. Raises `EngineUnavailable` when it does not answer."""
        link = self._links.get(address.target)
        if link is None or link.address != address or not link.alive:
            link = self._links[address.target] = Link(address, self)
            if self._is_withdrawn:
                link.drain()
        await link.wait_ready()
        return link

    def accept(self, request: GenerateRequest, link: Link) -> None:
        """Run a request that came by `link`."""
        stream = RequestStream(request, link)
        if request.request_id in self._streams:
            stream.refuse(Conflict(f"A request with the id {request.request_id} is running.", param="request_id"))
            return
        task = asyncio.create_task(self._serve(request, stream))
        self._streams[request.request_id] = stream
        link.requests[request.request_id] = task
        task.add_done_callback(lambda _: self._ended(request.request_id, link))

    def deliver(self, deltas: list[TokenDelta]) -> None:
        """Queue what one engine step made; the deltas belong to this client from then on."""
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                stream.push(delta)

    def withdraw(self) -> None:
        """Ask the front doors, also those that are yet to come, for no more requests."""
        self._is_withdrawn = True
        for link in self._links.values():
            link.drain()

    async def drain(self, timeout_s: float) -> None:
        """Withdraw, and wait for the requests that run, at most `timeout_s` seconds."""
        self.withdraw()
        deadline = time.monotonic() + timeout_s
        await asyncio.sleep(_POLL_S)  # what was sent before the front doors knew has come then
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        """End all links, after what waits was sent."""
        await asyncio.gather(*(link.close() for link in list(self._links.values())))

    def forget(self, link: Link) -> None:
        """Drop a link that broke; the next `connect` makes a new one."""
        if self._links.get(link.address.target) is link:
            del self._links[link.address.target]

    async def _serve(self, request: GenerateRequest, stream: RequestStream) -> None:
        try:
            await self._run(request, stream)
        except Exception:
            logger.exception("request %s failed", request.request_id)
            stream.refuse(InternalError("The replica failed on this request. Retry it."))

    def _ended(self, request_id: str, link: Link) -> None:
        del self._streams[request_id]
        del link.requests[request_id]


def _unreachable(address: DeliveryAddress) -> EngineUnavailable:
    return EngineUnavailable(f"The replica cannot reach the front door at {address.target}.")
