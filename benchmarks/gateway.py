"""What the gateway costs on top of the engine, on one machine: throughput, time to first token, start-up.

    python -m benchmarks.gateway

First the bare engine in this process (64 requests of 64 in, 128 out; then single requests), then the same load as 64
concurrent HTTP streams through the whole gateway, the clients on the same cores.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from adapters_store.blobs import BlobStore
from benchmarks.record import record
from benchmarks.sse_client import stream_completion
from gateway.config import EngineConfig, GatewayConfig, ServerConfig, StoreConfig, TrainerConfig
from gateway.engine.async_engine import AsyncEngine
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.stats import StepOutput

NUM_STREAMS, PROMPT, OUTPUT, SINGLES, REPEATS = 64, 64, 128, 40, 3
ENGINE = EngineConfig(device="cpu", enable_prefix_caching=False, kv_cache_tokens=32_768)


def prompts(count: int, seed: int) -> list[list[int]]:
    """Random prompts that share no prefix."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 1500, (PROMPT,), generator=generator).tolist() for _ in range(count)]


class BareEngine:
    """The engine as a replica holds it, its tokens handed to this process's event loop once a step."""

    def __init__(self, blobs: BlobStore) -> None:
        self.loop = asyncio.get_running_loop()
        self.engine = AsyncEngine(ENGINE, blobs, self._on_step)
        self.first: dict[str, asyncio.Future[None]] = {}
        self.ended: dict[str, asyncio.Future[None]] = {}

    def _on_step(self, step: StepOutput) -> None:
        self.loop.call_soon_threadsafe(self._deliver, step)

    def _deliver(self, step: StepOutput) -> None:
        for delta in step.deltas:
            if not self.first[delta.request_id].done():
                self.first[delta.request_id].set_result(None)
            if delta.finish_reason is not None:
                self.ended[delta.request_id].set_result(None)

    async def run(self, prompt: list[int], output: int) -> float:
        """One request. Returns its time to first token."""
        name = f"r{len(self.ended)}"
        self.first[name], self.ended[name] = self.loop.create_future(), self.loop.create_future()
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        start = time.perf_counter()
        await self.engine.submit(GenerateRequest(name, params, prompt=prompt))
        await self.first[name]
        first = time.perf_counter() - start
        await self.ended[name]
        return first


async def bare(folder: Path) -> tuple[float, float]:
    """(tokens/s at 64 requests, median time to first token alone) of the engine itself."""
    engine = BareEngine(BlobStore(f"file://{folder / 'bare'}"))
    await engine.engine.start()
    rates = []
    for seed in range(REPEATS + 1):
        start = time.perf_counter()
        await asyncio.gather(*(engine.run(prompt, OUTPUT) for prompt in prompts(NUM_STREAMS, seed)))
        rates.append(NUM_STREAMS * OUTPUT / (time.perf_counter() - start))
    firsts = [await engine.run(prompt, 4) for prompt in prompts(SINGLES, 99)]
    await engine.engine.stop()
    return statistics.median(rates[1:]), statistics.median(firsts[5:])


async def through(url: str, key: str, model: str) -> tuple[float, float]:
    """The same through the gateway's HTTP front door."""

    def body(prompt: list[int], output: int) -> dict[str, Any]:
        return {"model": model, "prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}

    rates = []
    for seed in range(REPEATS + 1):
        start = time.perf_counter()
        bodies = [body(prompt, OUTPUT) for prompt in prompts(NUM_STREAMS, seed)]
        streams = await asyncio.gather(*(stream_completion(url, key, one) for one in bodies))
        assert all(s.tokens == OUTPUT for s in streams), [s.status for s in streams if s.tokens != OUTPUT]
        rates.append(NUM_STREAMS * OUTPUT / (time.perf_counter() - start))
    firsts = [(await stream_completion(url, key, body(prompt, 4))).first for prompt in prompts(SINGLES, 99)]
    return statistics.median(rates[1:]), statistics.median(f for f in firsts[5:] if f is not None)


def main() -> None:
    """Measure and record."""
    with tempfile.TemporaryDirectory() as name:
        engine_rate, engine_first = asyncio.run(bare(Path(name)))
        from gateway.server import app

        config = GatewayConfig(
            engine=ENGINE,
            store=StoreConfig(data_dir=str(Path(name) / "data")),
            server=ServerConfig(http_port=0, grpc_port=0),
            trainer=TrainerConfig(),
        )
        start = time.perf_counter()
        running = app.start(config)
        ready = time.perf_counter() - start
        try:
            key = running.admin_key_path.read_text().strip()
            headers = {"authorization": f"Bearer {key}"}
            httpx.post(f"{running.http_url}/v1/tenants", json={"id": "bench"}, headers=headers)
            made = httpx.post(
                f"{running.http_url}/v1/keys", json={"tenant": "bench", "role": "tenant"}, headers=headers
            )
            rate, first = asyncio.run(through(running.http_url, made.json()["key"], "patchbay-embedded"))
        finally:
            app.stop()
    note = f"median of {REPEATS}; {PROMPT} in, {OUTPUT} out, greedy"
    record("gateway", "64 streams", "tokens_per_s", engine_rate, "1/s", system="bare engine", note=note)
    record("gateway", "64 streams", "tokens_per_s", rate, "1/s", note=note)
    record("gateway", "64 streams", "share_of_engine", rate / engine_rate, "x", target=0.65, note=note)
    note = f"median of {SINGLES - 5}, concurrency 1"
    record("gateway", "1 stream", "ttft", engine_first * 1e3, "ms", system="bare engine", note=note)
    record("gateway", "1 stream", "ttft", first * 1e3, "ms", note=note)
    record("gateway", "1 stream", "added_ttft", (first - engine_first) * 1e3, "ms", target=8.0, note=note)
    record("gateway", "start to ready", "seconds", ready, "s", target=40.0)


if __name__ == "__main__":
    main()
