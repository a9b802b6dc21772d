"""The engine's thread, seen by callers on an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from gateway.config import EngineConfig
from gateway.engine import async_engine
from gateway.engine.async_engine import AsyncEngine
from gateway.engine.request import GenerateRequest, TokenDelta
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.stats import StepOutput
from gateway.errors import EngineUnavailable, InternalError, Overloaded
from tests.gateway.engine.conftest import TinyWorld

WAIT = 30.0
Start = Callable[..., Awaitable[AsyncEngine]]


class Heard:
    """What an engine told its caller: the last deltas of requests, and that it has failed."""

    def __init__(self) -> None:
        self.ends: dict[str, TokenDelta] = {}
        self.failed = threading.Event()

    def on_step(self, step: StepOutput) -> None:
        self.ends |= {delta.request_id: delta for delta in step.deltas if delta.finish_reason is not None}


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest_asyncio.fixture
async def start(world: TinyWorld, heard: Heard) -> AsyncIterator[Start]:
    engines: list[AsyncEngine] = []

    async def start(**settings: Any) -> AsyncEngine:
        defaults = {"base": str(world.base), "quantization": "none", "device": "cpu", "kv_cache_tokens": 2048}
        config = EngineConfig(**(defaults | settings))
        engines.append(AsyncEngine(config, world.blobs, heard.on_step, heard.failed.set))
        await engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        await engine.stop()


def request(name: str, prompt: str = "Once upon", max_tokens: int = 4) -> GenerateRequest:
    return GenerateRequest(name, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True), prompt=prompt)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_failure_ends_what_runs_and_is_told(
    start: Start, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start()

    def execute(*_: object) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(engine._engine.runner, "execute", execute)
    await engine.submit(request("a"))
    await until(lambda: "a" in heard.ends)
    assert isinstance(heard.ends["a"].error, InternalError)
    assert heard.failed.is_set()
    assert not engine.healthy
    with pytest.raises(EngineUnavailable):
        await engine.submit(request("b"))


async def test_an_engine_that_is_stopped_has_not_failed(start: Start, heard: Heard) -> None:
    engine = await start()
    await engine.submit(request("a", max_tokens=100))
    await engine.stop()
    assert heard.ends["a"].finish_reason in ("cancelled", "length")
    assert not heard.failed.is_set()


async def test_a_step_that_never_ends_is_unhealthy(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start()
    execute, begun, goes_on = engine._engine.runner.execute, threading.Event(), threading.Event()

    def hang(*given: Any) -> Any:
        begun.set()
        assert goes_on.wait(WAIT)
        return execute(*given)

    monkeypatch.setattr(engine._engine.runner, "execute", hang)
    await engine.submit(request("a"))
    await until(begun.is_set)
    assert engine.healthy
    monkeypatch.setattr(async_engine, "STEP_S", 0.0)
    assert not engine.healthy
    goes_on.set()
    await until(lambda: engine.healthy)


async def test_short_prompts_do_not_wait_for_long_ones_to_be_tokenized(start: Start) -> None:
    engine = await start()
    order: list[str] = []

    async def submit(name: str, prompt: str) -> None:
        try:
            await engine.submit(request(name, prompt))
        except Exception:
            assert name != "short"  # the long ones pass the context, which is known when they are tokens
        order.append(name)

    long = "to be or not to be " * 20_000
    await asyncio.gather(*(submit(f"long{i}", long) for i in range(4)), submit("short", "Once"))
    assert order.index("short") < order.index("long1")


async def test_prompts_that_are_being_tokenized_wait_as_others_do(start: Start) -> None:
    engine = await start(max_waiting=2)
    long = "to be or not to be " * 20_000
    results = await asyncio.gather(*(engine.submit(request(str(i), long)) for i in range(5)), return_exceptions=True)
    assert [isinstance(result, Overloaded) for result in results] == [False, False, True, True, True]
    assert await engine.submit(request("later")) > 0
