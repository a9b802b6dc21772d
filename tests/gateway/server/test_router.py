"""The router through a real Ray Serve, to replicas that make tokens without a model."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from ray import serve
from ray.serve.handle import DeploymentHandle

from gateway.engine.request import AdapterRef, GenerateRequest, TokenDelta
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import EngineUnavailable
from gateway.server.delivery import DeliveryServer
from gateway.server.router import Router
from tests.gateway.server.producer import Producer

pytestmark = pytest.mark.asyncio(loop_scope="module")
APP = "router-test"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(local_ray: None) -> AsyncIterator[DeliveryServer]:
    deployment = serve.deployment(
        Producer,
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=1.0,
        health_check_period_s=1.0,
    )
    await asyncio.to_thread(serve.run, deployment.bind(), name=APP, route_prefix=None)
    server = DeliveryServer()
    await server.start()
    yield server
    await server.stop()
    await asyncio.to_thread(serve.delete, APP)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def router(door: DeliveryServer) -> AsyncIterator[Router]:
    router = Router(DeploymentHandle("Producer", APP), door)
    attaching = asyncio.create_task(router.keep_attached())
    await until(lambda: router.num_replicas == 2)
    yield router
    attaching.cancel()


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


def request(prompt: str = "", **sampling: Any) -> GenerateRequest:
    sampling.setdefault("max_tokens", 20)
    return GenerateRequest(uuid.uuid4().hex, SamplingParams(**sampling), prompt=prompt)


async def read(router: Router, wanted: GenerateRequest) -> list[TokenDelta]:
    async with asyncio.timeout(20):
        return [delta async for deltas in router.generate(wanted) for delta in deltas]


async def ask_all(router: Router, method: str) -> list[str]:
    """What all replicas together answer."""
    replies = await router._handle.broadcast(method).results_async()
    return [entry for reply in replies for entry in reply]


async def test_every_token_of_every_sequence_arrives_once_and_in_order(router: Router) -> None:
    deltas = await read(router, request(n=3, max_tokens=50))
    for index in range(3):
        ids = [i for delta in deltas if delta.index == index for i in delta.token_ids]
        assert ids == list(range(50))
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"] * 3
    assert [d.usage.completion_tokens for d in deltas if d.usage] == [150]


async def test_many_requests_run_at_once(router: Router) -> None:
    results = await asyncio.gather(*(read(router, request()) for _ in range(60)))
    assert all([i for d in deltas for i in d.token_ids] == list(range(20)) for deltas in results)


async def test_requests_of_one_adapter_go_to_one_replica_and_adapters_spread(router: Router) -> None:
    homes: set[str] = set()
    for adapter in range(12):
        ref = AdapterRef(f"t/a{adapter}:1", f"{adapter:064x}", 8)
        names = set()
        for _ in range(3):
            wanted = GenerateRequest(uuid.uuid4().hex, SamplingParams(max_tokens=1), prompt="", adapter=ref)
            names |= {delta.text.split(":")[0] for delta in await read(router, wanted)}
        assert len(names) == 1
        homes |= names
    assert len(homes) == 2


async def test_closing_the_iterator_cancels_in_the_replica(router: Router) -> None:
    wanted = request("hang")
    stream = router.generate(wanted)
    assert [d.token_ids for d in await anext(stream)] == [[0]]
    await stream.aclose()
    await expect_cancelled(router, wanted.request_id)


@pytest.mark.parametrize("delay_s", [0.0, 0.0005, 0.002, 0.01])
async def test_cancelling_the_caller_cancels_in_the_replica(router: Router, delay_s: float) -> None:
    wanted = request("hang")
    task = asyncio.create_task(read(router, wanted))
    await asyncio.sleep(delay_s)
    task.cancel()
    await until(lambda: router.num_running == 0)
    assert await read(router, request()) != []  # and the link goes on


async def expect_cancelled(router: Router, request_id: str) -> None:
    async with asyncio.timeout(10):
        while request_id not in await ask_all(router, "cancelled"):
            await asyncio.sleep(0.05)


async def test_the_replicas_say_what_they_serve_and_their_metrics(router: Router) -> None:
    assert (await router.info()).model_name == "producer"
    texts = await router.metrics()
    assert len(texts) == 2
    assert all(text.startswith(b"# HELP produced") for text in texts)


async def test_a_lost_replica_fails_its_requests_once_and_the_others_go_on(router: Router) -> None:
    async def outcome(prompt: str, **sampling: Any) -> list[TokenDelta] | Exception:
        try:
            return await read(router, request(prompt, **sampling))
        except Exception as error:
            return error

    dying = asyncio.create_task(outcome("die", max_tokens=5))
    others = await asyncio.gather(*(outcome("", max_tokens=100) for _ in range(20)))
    assert isinstance(await dying, EngineUnavailable)
    await until(lambda: router.num_replicas == 1, 5)
    for result in others:
        # On the dead replica it failed, on the other it is whole; never cut short without an error.
        if not isinstance(result, EngineUnavailable):
            assert not isinstance(result, Exception)
            assert [i for d in result for i in d.token_ids] == list(range(100))
    assert any(not isinstance(result, Exception) for result in others)
    await until(lambda: router.num_replicas == 2, 30)
    assert len(await asyncio.gather(*(read(router, request()) for _ in range(10)))) == 10


async def test_without_a_replica_a_request_fails_at_once() -> None:
    server = DeliveryServer()
    await server.start()
    lonely = Router(DeploymentHandle("Producer", APP), server)
    with pytest.raises(EngineUnavailable, match="No engine replica"):
        await read(lonely, request())
    await server.stop()
