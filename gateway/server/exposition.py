"""The text of /metrics: this front door's own metrics and, where asked for, all replicas'."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from adapters_store.errors import StoreUnavailable
from adapters_store.tables import fine_tuning_jobs
from gateway.metrics import FrontDoorMetrics, merge_texts, render

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from adapters_store.database import Database
    from gateway.server.context import Readiness
    from gateway.server.router import Router


class Exposition:
    """Brings the front door's gauges up to date, then renders. aggregate: with the replicas' metrics."""

    def __init__(
        self,
        registry: CollectorRegistry,
        metrics: FrontDoorMetrics,
        router: Router,
        database: Database,
        readiness: Readiness,
        *,
        aggregate: bool,
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._router = router
        self._database = database
        self._readiness = readiness
        self._aggregate = aggregate

    async def text(self) -> bytes:
        """Prometheus' text format 0.0.4, without the number of jobs while the database does not answer."""
        try:
            jobs = await asyncio.to_thread(self._count_jobs)
        except StoreUnavailable:
            jobs = {}
        self._metrics.set_jobs(jobs)
        self._metrics.set_state(
            running_requests=self._router.num_running,
            connected_replicas=self._router.num_replicas,
            ready=self._readiness.ready,
        )
        replicas = await self._router.metrics() if self._aggregate else []
        return merge_texts([render(self._registry), *replicas])

    def _count_jobs(self) -> dict[str, int]:
        status = fine_tuning_jobs.c.status
        with self._database.read() as connection:
            rows = connection.execute(select(status, func.count()).group_by(status)).all()
        return Counter({row[0]: row[1] for row in rows})
