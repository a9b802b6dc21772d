"""The engine on its own thread, for callers on an event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from adapters_store.base_spec import BaseSpec
from adapters_store.blobs import BlobStore
from gateway.config import EngineConfig
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import GenerateRequest
from gateway.engine.stats import EngineStats, StepOutput
from gateway.engine.workers import STEP_S
from gateway.errors import EngineUnavailable, InternalError, Overloaded

logger = logging.getLogger(__name__)

_STATS_INTERVAL = 0.1  # seconds between snapshots
_LONG_PROMPT = 32_768  # characters; shorter ones do not wait until those of a longer one are tokens


@dataclass(frozen=True, slots=True)
class _Add:
    request: GenerateRequest
    prompt: list[int]


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


class AsyncEngine:
    """Owns the engine thread. Requests go in by an inbox, tokens leave through `on_step`, once per step.

    `on_step` is called on the engine thread and must be quick. Every request that `submit` accepted ends in exactly
    one final delta per sequence, also when the engine fails or stops. `on_failure` is called there when it has failed.
    """

    def __init__(
        self,
        config: EngineConfig,
        blobs: BlobStore,
        on_step: Callable[[StepOutput], None],
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        if config.torch_threads is not None:
            torch.set_num_threads(config.torch_threads)
        self._config = config
        self._on_step = on_step
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[_Add | _Cancel] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stopping = False
        self._open = True
        self._gate = threading.Lock()  # an item put while the inbox is open is drained before it closes
        self._failure: BaseException | None = None
        self._num_unfinished = 0
        self._num_encoding = 0
        self._step_began = math.inf
        self._stats = EngineStats()
        self._next_snapshot = 0.0
        self._engine = LLMEngine(config, blobs, on_adapter_ready=self._wake.set)
        self._encode_short = ThreadPoolExecutor(1, thread_name_prefix="encode-short")
        self._encode_long = ThreadPoolExecutor(1, thread_name_prefix="encode-long")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def model_name(self) -> str:
        """What clients call the base."""
        return self._engine.model.name

    @property
    def base_spec(self) -> BaseSpec:
        """What adapters for this base are checked against."""
        return self._engine.model.spec

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens that one sequence may have."""
        return self._engine.max_model_len

    @property
    def healthy(self) -> bool:
        """Whether the engine thread runs, and neither it nor another rank has failed or hangs in a step."""
        hangs = time.monotonic() - self._step_began > STEP_S
        return self._failure is None and not hangs and self._thread.is_alive() and self._engine.healthy

    async def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    async def stop(self) -> None:
        """End every request in flight as cancelled, then stop the thread."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._encode_short.shutdown(wait=False)
        self._encode_long.shutdown(wait=False)
        self._engine.close()

    async def submit(self, request: GenerateRequest) -> int:
        """Accept a request. Returns its number of prompt tokens; its deltas come by `on_step`.

        Raises `InvalidRequest` or `ContextLengthExceeded` for a bad prompt, `Overloaded` when the queue is full and
        `EngineUnavailable` when the engine is stopping or has failed.
        """
        self._check_open()
        if self._num_unfinished + self._num_encoding >= self._config.max_waiting:
            raise Overloaded(f"{self._config.max_waiting} requests are waiting; retry in a moment.", retry_after=1.0)
        prompt = await self._encode(request)
        with self._gate:
            self._check_open()
            self._inbox.put(_Add(request, prompt))
        self._wake.set()
        return len(prompt)

    def cancel(self, request_id: str) -> None:
        """End a request as cancelled, at whatever stage it is. Unknown and ended ids are ignored."""
        self._inbox.put(_Cancel(request_id))
        self._wake.set()

    def stats(self) -> EngineStats:
        """The engine's last snapshot."""
        return self._stats

    async def _encode(self, request: GenerateRequest) -> list[int]:
        thread = self._encode_long if request.num_chars > _LONG_PROMPT else self._encode_short
        self._num_encoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, self._engine.encode, request)
        finally:
            self._num_encoding -= 1

    def _check_open(self) -> None:
        if self._stopping or not self._open:
            raise EngineUnavailable("This replica takes no requests now; retry.")

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception as error:
            logger.exception("the engine failed; every request in flight ends")
            self._failure = error
        self._close_inbox()
        if self._failure is None:
            self._emit(self._engine.abort_all("cancelled", None))
        else:
            self._on_failure()
            ended = InternalError("The engine failed on this batch. Retry the request.")
            self._emit(self._engine.abort_all("error", ended))

    def _close_inbox(self) -> None:
        with self._gate:
            self._open = False
        self._emit(self._drain_inbox())

    def _turn(self) -> None:
        self._wake.clear()
        self._emit(self._drain_inbox())
        if not self._engine.has_work:
            self._snapshot()
            if not self._stopping:
                self._wake.wait()
            return
        self._step_began = time.monotonic()
        output = self._engine.step()
        self._step_began = math.inf
        self._emit(output)
        self._snapshot_if_due()
        if output.num_tokens == 0 and self._engine.has_work:
            self._wake.wait(self._engine.poll_interval)

    def _drain_inbox(self) -> StepOutput:
        output = StepOutput()
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, _Add):
                self._engine.add(item.request, item.prompt)
            else:
                self._engine.cancel(item.request_id, output)
        self._num_unfinished = self._engine.num_unfinished
        return output

    def _emit(self, output: StepOutput) -> None:
        if output.deltas or output.num_tokens:
            self._num_unfinished = self._engine.num_unfinished
            self._on_step(output)

    def _snapshot_if_due(self) -> None:
        if time.monotonic() >= self._next_snapshot:
            self._snapshot()

    def _snapshot(self) -> None:
        self._stats = self._engine.stats()
        self._next_snapshot = time.monotonic() + _STATS_INTERVAL
