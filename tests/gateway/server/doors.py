"""Both front doors of one process over a real engine, store and database, without Ray between them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import torch
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from adapters_store.accounts import Accounts
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.registry import AdapterRegistry
from gateway.config import EngineConfig, GatewayConfig, LimitsConfig, StoreConfig
from gateway.engine.async_engine import AsyncEngine
from gateway.engine.request import GenerateRequest, TokenDelta
from gateway.engine.stats import RequestTimings, StepOutput
from gateway.metrics import FrontDoorMetrics, new_registry
from gateway.server.context import Readiness, ServerContext
from gateway.server.exposition import Exposition
from gateway.server.grpc_server import SERVICE_NAMES, create_grpc_server
from gateway.server.http_server import create_http_app
from gateway.server.listeners import HttpListener, bind_grpc, bind_http
from gateway.server.mailbox import Mailbox
from gateway.server.router import EngineInfo
from gateway.server.self_test import SelfTest
from gateway.server.upload_turns import UploadTurns
from gateway.trainer.files import TrainingFiles
from gateway.trainer.jobs import FineTuningJobs

T = TypeVar("T")


class LocalRouter:
    """The router's interface over an engine of this process, with the router's own mailboxes.

    asked: the requests as they came; finished: what became of each, as the engine tells it.
    """

    def __init__(self, config: EngineConfig, blobs: BlobStore) -> None:
        self._loop = asyncio.get_running_loop()
        self._mailboxes: dict[str, Mailbox] = {}
        self.engine = AsyncEngine(config, blobs, self._on_step)
        self.asked: list[GenerateRequest] = []
        self.finished: list[RequestTimings] = []
        self.num_replicas = 1

    @property
    def num_running(self) -> int:
        return len(self._mailboxes)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenDelta], None]:
        self.asked.append(request)
        mailbox = self._mailboxes[request.request_id] = Mailbox(request.request_id, request.sampling.n)
        try:
            await self.engine.submit(request)
            while deltas := await mailbox.take():
                yield deltas
        finally:
            del self._mailboxes[request.request_id]
            self.engine.cancel(request.request_id)

    async def info(self) -> EngineInfo:
        spec = self.engine.base_spec
        return EngineInfo(self.engine.model_name, spec, self.engine.max_model_len, spec.fingerprint)

    async def fail(self, error: Exception) -> None:
        """End every request that runs, as when its replica is lost."""
        for mailbox in self._mailboxes.values():
            mailbox.fail(error)

    async def running_adapters(self) -> frozenset[str] | None:
        running = self.asked if self._mailboxes else []
        names = {r.adapter.name for r in running if r.adapter is not None and r.request_id in self._mailboxes}
        return frozenset(names)

    async def metrics(self) -> list[bytes]:
        return [b"# HELP vllm:num_requests_running x\n# TYPE vllm:num_requests_running gauge\n"]

    def _on_step(self, output: StepOutput) -> None:
        self._loop.call_soon_threadsafe(self._deliver, output)

    def _deliver(self, output: StepOutput) -> None:
        self.finished += output.finished
        for delta in output.deltas:
            mailbox = self._mailboxes.get(delta.request_id)
            if mailbox is not None:
                mailbox.put(delta)


class Doors:
    """The running front doors, on a thread of their own. `admin` is an admin's key."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder = folder
        self.base = base
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        torch.set_num_threads(1)
        self._thread.start()
        self.run(self._start())

    def stop(self) -> None:
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the front doors' loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def new_tenant(self, tenant: str, max_rank: int | None = None) -> str:
        """A new tenant's key."""
        self.context.accounts.create_tenant(tenant, max_rank)
        return self.context.accounts.create_key(tenant)

    @contextmanager
    def not_ready(self, reason: str) -> Any:
        self.context.readiness.reason = reason
        try:
            yield
        finally:
            self.context.readiness.reason = None

    async def _start(self) -> None:
        self.context = await self._make_context()
        await self.router.engine.start()
        self.model = self.router.engine.model_name
        self.http_app = create_http_app(self.context)
        self._http = HttpListener(self.http_app, bind_http("127.0.0.1", 0, shared=False), 1.0)
        self._grpc = create_grpc_server(self.context)
        self.target = f"127.0.0.1:{bind_grpc(self._grpc, '127.0.0.1', 0)}"
        await self._grpc.start()
        await self._http.start()
        self.url = f"http://127.0.0.1:{self._http.port}"
        for service in ("", *SERVICE_NAMES):
            await self.context.health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self.context.readiness.reason = None

    async def _stop(self) -> None:
        await asyncio.gather(self._http.stop(), self._grpc.stop(1.0))
        await self.router.engine.stop()
        self.context.database.dispose()

    async def _make_context(self) -> ServerContext:
        config = GatewayConfig(
            engine=EngineConfig(
                base=str(self.base), quantization="none", device="cpu", kv_cache_tokens=16384, max_lora_rank=32
            ),
            store=StoreConfig(data_dir=str(self.folder), import_roots=(str(self.folder / "imports"),)),
            limits=LimitsConfig(
                max_upload_bytes=1 << 20,
                max_training_file_bytes=1 << 18,
                max_request_bytes=1 << 16,
                max_priority_boost=2,
                tenant_weights={"heavy": 3.0},
            ),
        )
        self.folder.mkdir(parents=True)
        database = Database(config.store.database)
        database.upgrade()
        blobs = BlobStore(config.store.blobs)
        self.router = LocalRouter(config.engine, blobs)
        accounts = Accounts(database)
        self.admin = accounts.create_key(None, "admin")
        registry, readiness = new_registry(), Readiness()
        metrics = FrontDoorMetrics(registry, "door-1")
        router: Any = self.router
        exposition = Exposition(registry, metrics, router, database, readiness, aggregate=True)
        return ServerContext(
            config=config,
            router=router,
            database=database,
            accounts=accounts,
            registry=AdapterRegistry(database, blobs),
            self_test=SelfTest(router, metrics, config.store.self_test_timeout_s),
            upload_turns=UploadTurns(config.limits.max_uploads),
            blobs=blobs,
            training_files=TrainingFiles(database, blobs),
            jobs=FineTuningJobs(database),
            metrics=metrics,
            readiness=readiness,
            health=health_aio.HealthServicer(),
            metrics_text=exposition.text,
        )


def channel(doors: Doors) -> grpc.Channel:
    """A plain client channel."""
    return grpc.insecure_channel(doors.target)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    """The metadata that carries a key."""
    return (("authorization", f"Bearer {key}"),)
