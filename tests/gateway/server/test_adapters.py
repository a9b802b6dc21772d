"""What uploads may do at once."""

from __future__ import annotations

import asyncio
import threading

from adapters_store.accounts import Principal
from gateway.server.adapters import Upload

from .conftest import TenantClient
from .doors import Doors

WAIT = 30.0


def test_a_check_whose_call_is_cancelled_counts_until_it_ends(doors: Doors, tenant: TenantClient) -> None:
    principal = doors.context.accounts.authenticate(tenant.key)
    assert principal is not None
    doors.run(_cancel_a_check(doors, principal))


async def _cancel_a_check(doors: Doors, principal: Principal) -> None:
    checks, begun, may_end = asyncio.Semaphore(1), threading.Event(), threading.Event()

    def check() -> bool:
        begun.set()
        return may_end.wait(WAIT)

    async with Upload(doors.context, checks, principal) as upload:
        call = asyncio.create_task(upload.check(check))
        assert await asyncio.to_thread(begun.wait, WAIT)
        call.cancel()
        await asyncio.wait([call])
        assert checks.locked()
        may_end.set()
        async with asyncio.timeout(WAIT):
            await checks.acquire()
