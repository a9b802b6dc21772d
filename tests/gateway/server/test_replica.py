"""One engine replica in a real Ray Serve, reached by the router as a front door reaches it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.handle import DeploymentHandle

from adapters_store.blobs import BlobStore
from gateway.config import EngineConfig, GatewayConfig, StoreConfig
from gateway.engine.async_engine import AsyncEngine
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.stats import StepOutput
from gateway.errors import ContextLengthExceeded
from gateway.server.app import replica_deployment
from gateway.server.delivery import DeliveryServer
from gateway.server.router import Router

pytestmark = pytest.mark.asyncio(loop_scope="module")
APP = "replica-test"
PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> GatewayConfig:
    engine = EngineConfig(base=str(base), kv_cache_tokens=4096, max_model_len=256, torch_threads=1)
    return GatewayConfig(engine=engine, store=StoreConfig(data_dir=str(tmp_path_factory.mktemp("data"))))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def router(local_ray: None, config: GatewayConfig) -> AsyncIterator[Router]:
    application = replica_deployment(config).bind(config)
    await asyncio.to_thread(serve.run, application, name=APP, route_prefix=None)
    door = DeliveryServer()
    await door.start()
    router = Router(DeploymentHandle("EngineReplica", APP), door)
    attaching = asyncio.create_task(router.keep_attached())
    async with asyncio.timeout(30):
        while router.num_replicas == 0:
            await asyncio.sleep(0.02)
    yield router
    attaching.cancel()
    await door.stop()
    await asyncio.to_thread(serve.delete, APP)


def request(**sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True} | sampling)
    return GenerateRequest(uuid.uuid4().hex, params, prompt=PROMPT, tenant="acme")


async def read(router: Router, wanted: GenerateRequest) -> dict[int, list[int]]:
    """The token ids of each sequence."""
    ids: dict[int, list[int]] = {}
    async with asyncio.timeout(60):
        async for deltas in router.generate(wanted):
            for delta in deltas:
                ids.setdefault(delta.index, []).extend(delta.token_ids)
    return ids


async def bare(config: GatewayConfig, wanted: GenerateRequest) -> list[int]:
    """The token ids that an engine in this process gives."""
    ids: list[int] = []
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_step(step: StepOutput) -> None:
        for delta in step.deltas:
            ids.extend(delta.token_ids)
            if delta.finish_reason is not None:
                loop.call_soon_threadsafe(ended.set)

    engine = AsyncEngine(config.engine, BlobStore(config.store.blobs), on_step)
    await engine.start()
    await engine.submit(wanted)
    await asyncio.wait_for(ended.wait(), 60)
    await engine.stop()
    return ids


async def values(router: Router, name: str) -> list[float]:
    """The values of the replica's samples of that name."""
    (text,) = await router.metrics()
    families = text_string_to_metric_families(text.decode())
    return [sample.value for family in families for sample in family.samples if sample.name == name]


async def test_tokens_are_the_engines_own(router: Router, config: GatewayConfig) -> None:
    wanted = request()
    assert await read(router, wanted) == {0: await bare(config, wanted)}


async def test_concurrent_requests_are_each_whole(router: Router) -> None:
    alone = (await read(router, request()))[0]
    results = await asyncio.gather(*(read(router, request(n=1 + i % 2)) for i in range(12)))
    assert all(ids == alone for result in results for ids in result.values())
    assert [len(result) for result in results] == [1 + i % 2 for i in range(12)]


async def test_the_engines_refusal_reaches_the_caller(router: Router) -> None:
    with pytest.raises(ContextLengthExceeded):
        await read(router, request(max_tokens=100_000))


async def test_closing_the_stream_frees_the_engine(router: Router) -> None:
    stream = router.generate(request(max_tokens=200))
    await anext(stream)
    await stream.aclose()
    async with asyncio.timeout(10):
        while await values(router, "vllm:num_requests_running") != [0.0]:
            await asyncio.sleep(0.05)
    assert await values(router, "vllm:kv_cache_usage_perc") == [0.0]


async def test_what_the_replica_serves(router: Router, base: Path) -> None:
    info = await router.info()
    assert info.model_name == base.name
    assert info.max_model_len == 256
    assert len(info.fingerprint) == 64
    assert info.base_spec.num_layers == 2


async def test_requests_are_counted(router: Router) -> None:
    async def counts() -> list[float]:
        names = ("patchbay_tenant_tokens_total", "vllm:e2e_request_latency_seconds_count")
        return [sum(await values(router, name)) for name in names]

    tokens, requests = await counts()
    await read(router, request(max_tokens=10))
    deadline = time.monotonic() + 10
    while (after := await counts()) != [tokens + len(PROMPT) + 10, requests + 1]:
        assert time.monotonic() < deadline, after
        await asyncio.sleep(0.05)
