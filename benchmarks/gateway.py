"""What the gateway costs on top of the engine, on one machine: throughput, time to first token, start-up.

    python -m benchmarks.gateway

The bare engine in this process and the whole gateway take turns: 64 requests at once of 64 in and 128 out (to the
gateway as concurrent HTTP streams, the clients on the same cores), then single requests.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

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

NUM_STREAMS, PROMPT, OUTPUT, SINGLES, REPEATS = 64, 64, 128, 60, 7
MODEL = "patchbay-embedded"
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


class Gateway:
    """The same through the gateway's HTTP front door."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.key = key

    async def run(self, prompt: list[int], output: int) -> float:
        """One request. Returns its time to first token."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}
        stream = await stream_completion(self.url, self.key, body)
        assert stream.tokens == output, f"HTTP {stream.status}, {stream.tokens} tokens of {output}"
        assert stream.first is not None
        return stream.first


async def measure(bare: BareEngine, gateway: Gateway) -> tuple[list[list[float]], list[list[float]]]:
    """([tokens/s of the engine, of the gateway] round by round, the same of times to first token alone).

    The two take turns after a warm-up of each, so that a machine that slows down slows both.
    """
    await bare.engine.start()
    rates = [[await rate(system, seed) for system in (bare, gateway)] for seed in range(REPEATS + 1)]
    firsts = [[await system.run(prompt, 4) for system in (bare, gateway)] for prompt in prompts(SINGLES + 5, 99)]
    await bare.engine.stop()
    return rates[1:], firsts[5:]


async def rate(system: BareEngine | Gateway, seed: int) -> float:
    """Tokens/s of 64 requests at once."""
    start = time.perf_counter()
    await asyncio.gather(*(system.run(prompt, OUTPUT) for prompt in prompts(NUM_STREAMS, seed)))
    return NUM_STREAMS * OUTPUT / (time.perf_counter() - start)


async def run(folder: Path, gateway: Gateway) -> None:
    """Measure both and record."""
    rates, firsts = await measure(BareEngine(BlobStore(f"file://{folder / 'bare'}")), gateway)
    engine_rate, gateway_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    shares = [ours / engine for engine, ours in rates]
    note = f"median of {REPEATS} rounds, both in turn; {PROMPT} in, {OUTPUT} out, greedy"
    record("gateway", "64 streams", "tokens_per_s", engine_rate, "1/s", system="bare engine", note=note)
    record("gateway", "64 streams", "tokens_per_s", gateway_rate, "1/s", note=note)
    spread = f"{note}; from {min(shares):.2f} to {max(shares):.2f}"
    record("gateway", "64 streams", "share_of_engine", statistics.median(shares), "x", target=0.65, note=spread)
    engine_first, gateway_first = (statistics.median(column) * 1e3 for column in zip(*firsts, strict=True))
    added = statistics.median(ours - engine for engine, ours in firsts) * 1e3
    note = f"median of {SINGLES}, both in turn, concurrency 1"
    record("gateway", "1 stream", "ttft", engine_first, "ms", system="bare engine", note=note)
    record("gateway", "1 stream", "ttft", gateway_first, "ms", note=note)
    record("gateway", "1 stream", "added_ttft", added, "ms", target=8.0, note=note)


def tenant_key(url: str, admin_key: str) -> str:
    """A key of a new tenant."""
    headers = {"authorization": f"Bearer {admin_key}"}
    httpx.post(f"{url}/v1/tenants", json={"id": "bench"}, headers=headers).raise_for_status()
    made = httpx.post(f"{url}/v1/keys", json={"tenant": "bench", "role": "tenant"}, headers=headers)
    key: str = made.raise_for_status().json()["key"]
    return key


def main() -> None:
    """Measure and record."""
    from gateway.server import app

    with tempfile.TemporaryDirectory() as name:
        config = GatewayConfig(
            engine=ENGINE,
            store=StoreConfig(data_dir=str(Path(name) / "data")),
            server=ServerConfig(http_port=0, grpc_port=0),
            trainer=TrainerConfig(),
        )
        start = time.perf_counter()
        running = app.start(config)
        record("gateway", "start to ready", "seconds", time.perf_counter() - start, "s", target=40.0)
        try:
            key = tenant_key(running.http_url, running.admin_key_path.read_text().strip())
            asyncio.run(run(Path(name), Gateway(running.http_url, key)))
        finally:
            app.stop()


if __name__ == "__main__":
    main()
