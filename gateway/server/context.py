"""What one front door holds, handed whole to the HTTP and gRPC servers that it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from grpc_health.v1.health import aio as grpc_health  # type: ignore[attr-defined]

    from adapters_store.accounts import Accounts
    from adapters_store.blobs import BlobStore
    from adapters_store.database import Database
    from adapters_store.registry import AdapterRegistry
    from gateway.config import GatewayConfig
    from gateway.metrics import FrontDoorMetrics
    from gateway.server.router import Router
    from gateway.server.self_test import SelfTest
    from gateway.server.upload_turns import UploadTurns
    from gateway.trainer.files import TrainingFiles
    from gateway.trainer.jobs import FineTuningJobs

_LOOKUP_THREADS: Final = 4
_TRANSFER_THREADS: Final = 4


class Readiness:
    """Whether this front door takes new requests. Written by the `FrontDoor` only.

    `reason` is None when ready, else a short text for people ("starting", "draining", "no replica").
    """

    def __init__(self) -> None:
        self.reason: str | None = "starting"

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.reason is None


@dataclass(frozen=True, slots=True)
class ServerContext:
    """The objects behind both wires of one front door; every one is safe to use from its event loop.

    The store's and the jobs' methods block on the database: call them in a thread (`asyncio.to_thread`).
    health: the servicer to add to the gRPC server; its statuses are set by the `FrontDoor`.
    metrics_text: the Prometheus text of /metrics, in the version 0.0.4 text format (UTF-8), this process's own and,
        with server.metrics_aggregate, all replicas'.
    lookups: the threads that check keys and resolve names, which every request needs; nothing else runs in them.
    transfers: those that read or write whole blobs, which may take seconds each. The loop's own threads do what is
        short.
    """

    config: GatewayConfig
    router: Router
    database: Database
    accounts: Accounts
    registry: AdapterRegistry
    self_test: SelfTest
    upload_turns: UploadTurns
    blobs: BlobStore
    training_files: TrainingFiles
    jobs: FineTuningJobs
    metrics: FrontDoorMetrics
    readiness: Readiness
    health: grpc_health.HealthServicer
    metrics_text: Callable[[], Awaitable[bytes]]
    lookups: Executor = field(default_factory=lambda: ThreadPoolExecutor(_LOOKUP_THREADS, "patchbay-lookup"))
    transfers: Executor = field(default_factory=lambda: ThreadPoolExecutor(_TRANSFER_THREADS, "patchbay-transfer"))
