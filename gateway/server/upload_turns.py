"""How many uploads are under way at once, on both wires, so that no tenant's keep out another's."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from gateway.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable

_CONCURRENT_CHECKS: Final = 2
_RETRY_AFTER_S: Final = 5.0


class UploadTurns:
    """Counts the uploads of one front door; of its event loop.

    A tenant has at most `most_of_a_tenant` under way and one of them unpacked or validated at a time. All tenants
    together have two of these, each in a process of its own. None stands for admins, whom no count of their own bounds.
    """

    def __init__(self, most_of_a_tenant: int) -> None:
        self._most = most_of_a_tenant
        self._under_way: Counter[str] = Counter()
        self._checks = asyncio.Semaphore(_CONCURRENT_CHECKS)
        self._own_checks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def begin(self, tenant: str | None) -> None:
        """An upload begins. Raises `Overloaded` where the tenant has as many under way as it may."""
        if tenant is None:
            return
        if self._under_way[tenant] >= self._most:
            raise Overloaded(
                f"{tenant} has {self._most} uploads under way here, as many as a tenant may; wait until one has ended.",
                retry_after=_RETRY_AFTER_S,
            )
        self._under_way[tenant] += 1

    def end(self, tenant: str | None) -> None:
        """What `begin` counted has ended."""
        if tenant is not None:
            self._under_way -= Counter({tenant: 1})

    async def check(self, tenant: str | None) -> Callable[[], None]:
        """Wait for the turn to unpack or validate. Call what this returns, in the event loop, when that has ended."""
        if tenant is None:
            await self._checks.acquire()
            return self._checks.release
        own = self._own_checks.setdefault(tenant, asyncio.Lock())
        await own.acquire()
        try:
            await self._checks.acquire()
        except BaseException:
            own.release()
            raise

        def release() -> None:
            self._checks.release()
            own.release()

        return release
