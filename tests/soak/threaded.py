"""An engine on its own thread, and its callers."""

from __future__ import annotations

import asyncio
from collections import deque
from random import Random

from gateway.engine.async_engine import AsyncEngine
from gateway.engine.stats import StepOutput
from gateway.errors import EngineUnavailable, GatewayError, Overloaded
from tests.soak.fault import fail_next_step
from tests.soak.ledger import Ledger, Story
from tests.soak.run import Run, check_idle
from tests.soak.traffic import Call, again, may_fail, random_config

NUM_CLIENTS = 12


class Threaded:
    """An `AsyncEngine`, its successors, and clients of whichever lives; all but the engines on one event loop."""

    def __init__(self, run: Run, rng: Random, calls: list[Call]) -> None:
        self._run = run
        self._rng = rng
        self._calls = deque(calls)
        self._num_left = len(calls)
        self._num_submitting = 0
        self._steps: asyncio.Queue[StepOutput] = asyncio.Queue()
        self._ended: dict[str, asyncio.Future[Story]] = {}
        self._loop = asyncio.get_running_loop()

    async def serve(self, num_kills: int) -> None:
        """Serve all calls, by so many engines more than one."""
        await self._begin()
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            delivery = group.create_task(self._deliver())
            async with asyncio.TaskGroup() as clients:
                for _ in range(NUM_CLIENTS):
                    clients.create_task(self._client())
                clients.create_task(self._kill_some(num_kills))
            delivery.cancel()
        await self._end()

    async def _begin(self) -> None:
        self.config = random_config(self._rng, self._run.world, self._run.device)
        self.ledger = Ledger()
        self._engine = AsyncEngine(self.config, self._run.world.blobs, self._on_step)
        await self._engine.start()

    def _on_step(self, output: StepOutput) -> None:
        self._loop.call_soon_threadsafe(self._steps.put_nowait, output)

    async def _deliver(self) -> None:
        while True:
            self._take(await self._steps.get())

    def _take(self, output: StepOutput) -> None:
        for story in self.ledger.take(output):
            self._ended[story.request.request_id].set_result(story)

    async def _end(self) -> None:
        """Stop the engine, take its last words, and hold what it gave against what it should."""
        self.ledger.doom("cancelled")
        await self._engine.stop()
        while self._num_submitting:
            await asyncio.sleep(0.001)
        while not self._steps.empty():
            self._take(self._steps.get_nowait())
        assert not self.ledger.open
        check_idle(self._engine._engine)
        self._run.finish_life(self._engine._engine, self.ledger)
        self._run.check_sample(self._rng, self.config, self.ledger)

    async def _kill_some(self, num_kills: int) -> None:
        for _ in range(num_kills):
            await asyncio.sleep(self._rng.uniform(0, 0.3))
            if self._rng.random() < 0.4:
                self.ledger.doom("error")
                fail_next_step(self._engine._engine)
                await asyncio.sleep(0.02)
            await self._end()
            await self._begin()

    async def _client(self) -> None:
        """One caller after the other, until all calls are done."""
        while self._num_left:
            if not self._calls:
                await asyncio.sleep(0.002)  # another may yet give one back
                continue
            call = self._calls.popleft()
            if await self._is_done(call):
                self._num_left -= 1
            else:
                self._calls.append(again(call, "'"))
                await asyncio.sleep(0.005)
            if self._rng.random() < 0.02:
                self._run.world.toggle()

    async def _is_done(self, call: Call) -> bool:
        """Make a call. Returns False when the engine did not take it, or took it and was killed."""
        request, engine, ledger = call.request, self._engine, self.ledger
        name, can_fail = request.request_id, may_fail(self._run.world, self.config, request)
        ended = self._ended[name] = self._loop.create_future()
        ledger.accept(request, None, can_fail)
        self._num_submitting += 1
        try:
            await engine.submit(request)
        except GatewayError as error:
            ledger.refuse(request)
            self._run.seen["refused"] += 1
            return not isinstance(error, (Overloaded, EngineUnavailable))
        finally:
            self._num_submitting -= 1
        if call.goes is not None:
            await asyncio.sleep(call.goes * 0.002)
            ledger.cancel(name)
            engine.cancel(name)
        story = await ended
        reasons = {story.reason(index) for index in range(request.sampling.n)}
        return call.goes is not None or can_fail or reasons <= {"stop", "length"}
