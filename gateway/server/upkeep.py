"""What a front door does now and then for the store: it ends abandoned uploads, and purges what nobody runs."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from adapters_store.registry import AdapterRegistry
    from gateway.server.router import Router

logger = logging.getLogger(__name__)

_PERIOD_S: Final = 5.0


class Upkeep:
    """Safe beside that of other front doors. staged_for_s: seconds after which a staged version's tester must be gone.

    A retired version is purged when two rounds in turn saw no request with it in any replica: one alone could miss a
    request that a front door resolved just before the deletion and had not sent yet.
    """

    def __init__(self, registry: AdapterRegistry, router: Router, staged_for_s: float) -> None:
        self._registry = registry
        self._router = router
        self._staged_for_s = staged_for_s
        self._idle: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Keep on until cancelled."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                await self.round()
            except Exception:  # the database may come back
                logger.exception("the store's upkeep failed; it is tried again")

    async def round(self) -> None:
        """One look at the store. Raises `StoreUnavailable`."""
        await asyncio.to_thread(self._registry.expire, int(time.time() - self._staged_for_s))
        retired = {version.ref: version for version in await asyncio.to_thread(self._registry.retired)}
        running = await self._router.running_adapters() if retired else frozenset()
        idle = frozenset(retired.keys() - running) if running is not None else frozenset[str]()
        for ref in idle & self._idle:
            await asyncio.to_thread(self._registry.purge, retired[ref])
            logger.info("purged %s", ref)
        self._idle = idle - self._idle
