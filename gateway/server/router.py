"""Sends each request to a replica and yields its tokens, all over the delivery links; Ray Serve runs the replicas.

A request does not pass through Serve's handle: with Ray 2.60 on 2 cores a handle call costs 2.9 ms (4.2 ms as an actor
call) before the replica's code runs, and 5 ms of CPU in both processes together; a message on the link a fifth of that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from adapters_store.base_spec import BaseSpec
from gateway.engine.request import GenerateRequest, TokenDelta
from gateway.errors import EngineUnavailable
from gateway.server.affinity import choose_replica
from gateway.server.delivery import DeliveryServer

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_ATTACH_TIMEOUT_S: Final = 5.0
_ATTACH_PERIOD_S: Final = 2.0
_FIRST_ATTACH_PERIOD_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the replicas serve. fingerprint: of the packed base."""

    model_name: str
    base_spec: BaseSpec
    max_model_len: int
    fingerprint: str


class Router:
    """One front door's way to the replicas. Lives on the front door's event loop.

    handle: of the replicas' deployment. server: started.
    """

    def __init__(self, handle: DeploymentHandle[Any], server: DeliveryServer) -> None:
        self._handle = handle
        self._server = server
        self._info: EngineInfo | None = None

    @property
    def num_running(self) -> int:
        """Requests that run in a replica."""
        return self._server.num_running

    @property
    def num_replicas(self) -> int:
        """Replicas that take requests of this front door."""
        return len(self._server.connections)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenDelta], None]:
        """Yield the request's new tokens, at most one delta a sequence at a time, until all sequences have finished.

        Closing the iterator or cancelling its task cancels the request. Raises what ended it early: the engine's
        refusal or failure, or `EngineUnavailable` when no replica is there or the request's replica was lost.
        """
        connections = self._server.connections
        if not connections:
            raise EngineUnavailable("No engine replica is ready. Retry in a few seconds.")
        digest = request.adapter.digest if request.adapter is not None else None
        mailbox = self._server.submit(request, choose_replica(connections, digest))
        try:
            while deltas := await mailbox.take():
                yield deltas
        finally:
            self._server.close(mailbox)

    async def info(self) -> EngineInfo:
        """What the replicas serve; waits for the first replica when none is ready yet."""
        if self._info is None:
            try:
                self._info = await self._handle.info.remote()
            except (RayError, RayServeException) as error:
                raise EngineUnavailable("No engine replica is ready. Retry in a few seconds.") from error
        return self._info

    async def metrics(self) -> list[bytes]:
        """The Prometheus text of each connected replica."""
        reports, _ = await self._server.collect()
        return [report.metrics for report in reports]

    async def running_adapters(self) -> frozenset[str] | None:
        """The versions ("tenant/name:3") that any replica has unfinished requests for, whoever sent them.

        None when it cannot be told: a replica did not answer, or none is connected.
        """
        reports, is_whole = await self._server.collect()
        if not reports or not is_whole:
            return None
        return frozenset(name for report in reports for name in report.adapters)

    async def keep_attached(self) -> None:
        """Tell all replicas this front door's address, again and again, so that new ones connect. Runs until
        cancelled."""
        while True:
            await self._attach()
            await asyncio.sleep(_ATTACH_PERIOD_S if self._server.connections else _FIRST_ATTACH_PERIOD_S)

    async def _attach(self) -> None:
        try:
            broadcast = self._handle.broadcast("attach", self._server.address)
            await broadcast.results_async(timeout_s=_ATTACH_TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.debug("no replica to attach to: %s", error)
