"""A replica that makes tokens without a model: what the router and the delivery links are loaded with."""

from __future__ import annotations

import asyncio
import os

from ray import serve

from adapters_store.base_spec import BaseSpec
from gateway.engine.request import GenerateRequest, TokenDelta, Usage
from gateway.server.delivery import DeliveryAddress
from gateway.server.delivery_client import DeliveryClient, RequestStream
from gateway.server.router import EngineInfo


class Producer:
    """Answers with `max_tokens` numbered tokens a sequence. The prompt says what else happens: "hang" stops after the
    first token, "die" kills the process after it."""

    async def __init__(self) -> None:  # type: ignore[misc]
        self._name = serve.get_replica_context().replica_id.unique_id
        self._cancelled: list[str] = []
        self._delivery = DeliveryClient(self._name, self._run, self._metrics_text)

    async def attach(self, address: DeliveryAddress) -> None:
        await self._delivery.connect(address)

    async def cancelled(self) -> list[str]:
        return self._cancelled

    async def info(self) -> EngineInfo:
        return EngineInfo("producer", BaseSpec("f" * 64, 0, {}), 1024, "f" * 64)

    async def _run(self, request: GenerateRequest, stream: RequestStream) -> None:
        try:
            await self._produce(request)
        except asyncio.CancelledError:
            self._cancelled.append(request.request_id)
            raise

    async def _produce(self, request: GenerateRequest) -> None:
        last = (request.sampling.max_tokens or 1) - 1
        for step in range(last + 1):
            self._delivery.deliver([self._delta(request, index, step, last) for index in range(request.sampling.n)])
            await asyncio.sleep(0.001)
            if request.prompt == "hang":
                await asyncio.sleep(3600)
            if request.prompt == "die":
                await asyncio.sleep(0.2)
                os._exit(1)

    def _delta(self, request: GenerateRequest, index: int, step: int, last: int) -> TokenDelta:
        delta = TokenDelta(request.request_id, index, f"{self._name}:{step} ", [step])
        if step == last:
            delta.finish_reason = "length"
            if index == request.sampling.n - 1:
                delta.usage = Usage(1, (last + 1) * request.sampling.n)
        return delta

    def _metrics_text(self) -> bytes:
        return f"# HELP produced By {self._name}.\n# TYPE produced gauge\n".encode()
