"""What uploads may do at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import httpx
import pytest

from adapters_store.accounts import Principal
from gateway.rpc import patchbay_pb2 as pb
from gateway.rpc import patchbay_pb2_grpc as pb_grpc
from gateway.server.adapters import Upload
from tests.gateway.server.conftest import TenantClient
from tests.gateway.server.doors import Doors, bearer, channel

WAIT = 30.0


def test_a_check_whose_call_is_cancelled_counts_until_it_ends(doors: Doors, tenant: TenantClient) -> None:
    doors.run(_cancel_a_check(doors, _principal(doors, tenant)))


async def _cancel_a_check(doors: Doors, principal: Principal) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def check() -> bool:
        begun.set()
        return may_end.wait(WAIT)

    async with Upload(doors.context, principal) as upload, asyncio.timeout(WAIT):
        call = asyncio.create_task(upload.check(check))
        assert await asyncio.to_thread(begun.wait, WAIT)
        call.cancel()
        await asyncio.wait([call])
        turn = asyncio.create_task(doors.context.upload_turns.check(principal.tenant))
        await asyncio.sleep(0.05)
        assert not turn.done()
        may_end.set()
        (await turn)()


def test_a_tenant_s_checks_take_turns_and_leave_room_for_others(
    doors: Doors, new_tenant: Callable[..., TenantClient], adapter: Path
) -> None:
    slow, other = new_tenant(), new_tenant()
    doors.run(_upload_beside_slow_checks(doors, _principal(doors, slow), lambda: other.upload("own", adapter)))


async def _upload_beside_slow_checks(doors: Doors, principal: Principal, upload: Callable[[], httpx.Response]) -> None:
    may_end = threading.Event()
    async with AsyncExitStack() as stack, asyncio.timeout(WAIT):
        own = [await stack.enter_async_context(Upload(doors.context, principal)) for _ in range(3)]
        checks = [asyncio.create_task(each.check(lambda: may_end.wait(WAIT))) for each in own]
        answer = await asyncio.to_thread(upload)
        assert answer.status_code == 200, answer.text
        assert not any(check.done() for check in checks)
        may_end.set()
        assert all(await asyncio.gather(*checks))


def test_a_tenant_has_so_many_uploads_under_way_and_no_more(
    doors: Doors, new_tenant: Callable[..., TenantClient], adapter: Path
) -> None:
    tenant, other = new_tenant(), new_tenant()
    most = doors.context.config.limits.max_uploads

    def use_up() -> None:
        refused = tenant.upload("own", adapter)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert refused.headers["retry-after"] == "5"
        assert f"{most} uploads under way" in refused.json()["error"]["message"]
        start = pb.UploadRequest(start=pb.UploadStart(name="own"))
        with channel(doors) as client:
            stub = pb_grpc.AdaptersStub(client)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.RpcError) as too_many:
                stub.Upload(iter([start]), metadata=bearer(tenant.key), timeout=WAIT)
        assert too_many.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert other.upload("own", adapter).status_code == 200

    doors.run(_beside_uploads(doors, _principal(doors, tenant), most, use_up))
    assert tenant.upload("own", adapter).status_code == 200


async def _beside_uploads(doors: Doors, principal: Principal, count: int, work: Callable[[], None]) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(count):
            await stack.enter_async_context(Upload(doors.context, principal))
        await asyncio.to_thread(work)


def _principal(doors: Doors, tenant: TenantClient) -> Principal:
    principal = doors.context.accounts.authenticate(tenant.key)
    assert principal is not None
    return principal
