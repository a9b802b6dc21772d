"""One front door: a process with one event loop, its own HTTP and gRPC listeners, and the way to the replicas."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as grpc_health  # type: ignore[attr-defined]
from ray import serve
from ray.util import get_node_ip_address

from adapters_store.accounts import Accounts
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.registry import AdapterRegistry
from adapters_store.reports import VersionReport
from adapters_store.upload import clean_staging
from adapters_store.versions import AdapterVersion
from gateway.config import GatewayConfig
from gateway.errors import EngineUnavailable
from gateway.metrics import FrontDoorMetrics, new_registry
from gateway.rpc import patchbay_pb2
from gateway.server.context import Readiness, ServerContext
from gateway.server.delivery import DeliveryServer
from gateway.server.exposition import Exposition
from gateway.server.listeners import HttpListener, bind_grpc, bind_http
from gateway.server.logs import configure_logging
from gateway.server.router import Router
from gateway.server.self_test import SelfTest
from gateway.server.upkeep import Upkeep
from gateway.server.upload_turns import UploadTurns
from gateway.trainer.files import TrainingFiles
from gateway.trainer.jobs import FineTuningJobs

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

DRAIN_S: Final = 30.0
_WATCH_PERIOD_S: Final = 0.25
_STAGING_GRACE_S: Final = 60.0
_HEALTH_SERVICES: Final = (
    "",
    *(service.full_name for service in patchbay_pb2.DESCRIPTOR.services_by_name.values()),
)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where one front door listens. `grpc` is "host:port"."""

    http_url: str
    grpc: str


class FrontDoor:
    """The Serve deployment. Serve starts, watches and replaces it; no request passes through Serve's own proxies.

    replicas: the handle of the replicas' deployment. trainer: that of the trainer's, which is never called: jobs go
    through the database; naming it here makes it part of the application.
    """

    async def __init__(  # type: ignore[misc]
        self,
        config: GatewayConfig,
        replicas: DeploymentHandle[Any],
        trainer: DeploymentHandle[Any] | None = None,
    ) -> None:
        name = serve.get_replica_context().replica_id.unique_id
        configure_logging(f"front-door-{name}")
        self._config = config
        self._readiness = Readiness()
        self._health = grpc_health.HealthServicer()
        self._delivery = DeliveryServer(_delivery_host(config))
        await self._delivery.start()
        self._router = Router(replicas, self._delivery)
        self._background = [asyncio.create_task(self._router.keep_attached())]
        self._context = await asyncio.to_thread(self._make_context, name)
        await self._set_health()
        await self._listen()
        self._background.append(asyncio.create_task(self._watch()))
        staged_for_s = 2 * config.store.self_test_timeout_s + _STAGING_GRACE_S
        upkeep = Upkeep(self._context.registry, self._router, staged_for_s)
        self._background.append(asyncio.create_task(upkeep.run()))

    async def addresses(self) -> Addresses:
        """Where this front door listens."""
        host = self._config.server.host
        shown = f"[{host}]" if ":" in host else host
        return Addresses(f"http://{shown}:{self._http.port}", f"{shown}:{self._grpc_port}")

    async def self_test(self, version: AdapterVersion) -> VersionReport:
        """Test a version that the trainer made. Raises `EngineUnavailable` when no replica could."""
        return await self._context.self_test.run(version)

    async def ready(self) -> str | None:
        """Why new requests are not taken yet, or None when they are."""
        return self._readiness.reason

    def check_health(self) -> None:
        """Called by Serve, which replaces a front door that raises here."""
        if self._readiness.reason != "draining" and not self._http.alive:
            raise RuntimeError("the HTTP listener has stopped")
        for task in self._background:
            if task.done():
                raise RuntimeError("a background task of the front door has stopped") from task.exception()

    async def __del__(self) -> None:
        """Called by Serve at shutdown: refuse new requests, let the running ones end, then close."""
        self._readiness.reason = "draining"
        await self._health.enter_graceful_shutdown()
        for task in self._background:
            task.cancel()
        await asyncio.gather(self._http.stop(), self._grpc.stop(DRAIN_S))
        await self._delivery.stop()
        self._context.database.dispose()

    def _make_context(self, name: str) -> ServerContext:
        """Open the store; blocks."""
        config = self._config
        database = Database(config.store.database)
        database.upgrade()
        clean_staging(config.store.staging)
        accounts = Accounts(database)
        _ensure_admin_key(accounts, Path(config.store.data_dir))
        blobs = BlobStore(config.store.blobs, config.store.cache, config.store.cache_bytes)
        registry = new_registry()
        metrics = FrontDoorMetrics(registry, name)
        exposition = Exposition(
            registry,
            metrics,
            self._router,
            database,
            self._readiness,
            aggregate=config.server.metrics_aggregate,
        )
        return ServerContext(
            config=config,
            router=self._router,
            database=database,
            accounts=accounts,
            registry=AdapterRegistry(database, blobs),
            self_test=SelfTest(self._router, metrics, config.store.self_test_timeout_s),
            upload_turns=UploadTurns(config.limits.max_uploads),
            blobs=blobs,
            training_files=TrainingFiles(database, blobs),
            jobs=FineTuningJobs(database),
            metrics=metrics,
            readiness=self._readiness,
            health=self._health,
            metrics_text=exposition.text,
        )

    async def _listen(self) -> None:
        from gateway.server.grpc_server import create_grpc_server
        from gateway.server.http_server import create_http_app

        server = self._config.server
        sock = bind_http(server.host, server.http_port, shared=server.num_front_doors > 1)
        self._http = HttpListener(create_http_app(self._context), sock, DRAIN_S)
        self._grpc: grpc.aio.Server = create_grpc_server(self._context)
        self._grpc_port = bind_grpc(self._grpc, server.host, server.grpc_port)
        await self._grpc.start()
        await self._http.start()

    async def _watch(self) -> None:
        """Keep readiness and the gRPC health service true, until cancelled."""
        while True:
            reason = await self._not_ready()
            if reason != self._readiness.reason:
                self._readiness.reason = reason
                logger.info("ready" if reason is None else f"not ready: {reason}")
                await self._set_health()
            await asyncio.sleep(_WATCH_PERIOD_S)

    async def _not_ready(self) -> str | None:
        if self._router.num_replicas == 0:
            return "no engine replica is ready"
        try:
            await self._router.info()
        except EngineUnavailable as error:
            return error.message
        return None

    async def _set_health(self) -> None:
        response = health_pb2.HealthCheckResponse
        status = response.SERVING if self._readiness.ready else response.NOT_SERVING
        for service in _HEALTH_SERVICES:
            await self._health.set(service, status)


def _delivery_host(config: GatewayConfig) -> str:
    """Where replicas reach this process: loopback when nothing leaves this machine, else the node's address."""
    host = config.server.host
    local = host == "localhost" or (_is_ip(host) and ipaddress.ip_address(host).is_loopback)
    return "127.0.0.1" if local and config.server.ray_address is None else get_node_ip_address()


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _ensure_admin_key(accounts: Accounts, data_dir: Path) -> None:
    """On the first start of all: make an admin key and write it to a file that only this user reads."""
    key = accounts.create_first_admin_key()
    if key is None:
        return
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / "admin.key"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{key}\n")
    logger.warning("made the first admin key: %s", path)
