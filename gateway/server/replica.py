"""One engine as a Ray Serve replica: requests come, and tokens leave, by the links to the front doors."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from ray import serve

from adapters_store.errors import StoreError
from gateway.config import GatewayConfig
from gateway.engine.request import GenerateRequest
from gateway.errors import EngineUnavailable, GatewayError
from gateway.metrics import EngineMetrics, new_registry, render
from gateway.server.delivery import DeliveryAddress
from gateway.server.delivery_client import DeliveryClient, RequestStream
from gateway.server.logs import configure_logging
from gateway.server.router import EngineInfo

if TYPE_CHECKING:
    from gateway.engine.stats import StepOutput

logger = logging.getLogger(__name__)

DRAIN_S: Final = 30.0


class EngineReplica:
    """Holds one `AsyncEngine`. Serve starts, watches and replaces it; requests come by the links to the front doors."""

    async def __init__(self, config: GatewayConfig) -> None:  # type: ignore[misc]
        # The engine's imports (torch) belong to this process alone.
        from adapters_store.blobs import BlobStore
        from gateway.engine.async_engine import AsyncEngine
        from gateway.engine.interpreter import favour_steps

        name = serve.get_replica_context().replica_id.unique_id
        configure_logging(f"replica-{name}")
        self._loop = asyncio.get_running_loop()
        self._registry = new_registry()
        blobs = BlobStore(config.store.blobs, config.store.cache, config.store.cache_bytes)
        self._engine = await asyncio.to_thread(AsyncEngine, config.engine, blobs, self._on_step, self._on_failure)
        self._metrics = EngineMetrics(self._registry, self._engine.model_name, name, self._engine.stats)
        self._delivery = DeliveryClient(name, self._generate, self._metrics_text)
        favour_steps()
        await self._engine.start()
        if config.server.replica_metrics_port is not None:
            self._serve_metrics(config.server.replica_metrics_port)

    async def attach(self, address: DeliveryAddress) -> None:
        """Connect to a front door before its first request. A failure is left to the next try."""
        try:
            await self._delivery.connect(address)
        except EngineUnavailable as error:
            logger.warning("%s", error)

    async def info(self) -> EngineInfo:
        """What this replica serves."""
        engine = self._engine
        spec = engine.base_spec
        return EngineInfo(engine.model_name, spec, engine.max_model_len, spec.fingerprint)

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises here."""
        if not self._engine.healthy:
            raise EngineUnavailable("the engine thread has stopped")

    async def __del__(self) -> None:
        """Called by Serve at shutdown: take no more requests, let the running ones end, then stop."""
        await self._delivery.drain(DRAIN_S)
        await self._engine.stop()
        await self._delivery.close()

    async def _generate(self, request: GenerateRequest, stream: RequestStream) -> None:
        """Run one request to its end; cancelled when its front door gave it up."""
        try:
            await self._engine.submit(request)
        except (GatewayError, StoreError) as error:
            stream.refuse(error)
            return
        try:
            await stream.wait_ended()
        finally:
            if not stream.ended:
                self._engine.cancel(request.request_id)

    def _on_step(self, step: StepOutput) -> None:
        """On the engine thread: hand the step over, once."""
        self._loop.call_soon_threadsafe(self._step_done, step)

    def _on_failure(self) -> None:
        """On the engine thread: to the front doors a replica that refuses everything would be the least busy one."""
        self._loop.call_soon_threadsafe(self._delivery.withdraw)

    def _step_done(self, step: StepOutput) -> None:
        self._delivery.deliver(step.deltas)
        self._metrics.observe_step(step)

    def _metrics_text(self) -> bytes:
        return render(self._registry)

    def _serve_metrics(self, port: int) -> None:
        from prometheus_client import start_http_server

        try:
            start_http_server(port, registry=self._registry)
        except OSError as error:
            logger.warning("no metrics on port %d of this replica: %s", port, error)
