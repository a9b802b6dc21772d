"""More live adapters than slots: the time to the first token under Zipf traffic, against slots for all.

    python -m benchmarks.zipf [--slots 32] [--load 0.6] [--rate N] [--requests 400] [--rounds 5] [--layers 32]
        [--scratch /dev/shm]

On one GPU a base of Llama-3.1-8B's shape, elsewhere the embedded one; adapters of rank 16 on all seven linears, twice
as many as slots, all in host memory after a first round. Requests of 64 tokens in and 64 out arrive at random
(Poisson), at `--load` of what an engine with slots for all ends when it always has work; each draws its adapter by
Zipf's law (exponent 1). `--rate` gives the requests a second instead. The same arrivals go to that engine and to the
one that has half of the slots, in as many rounds each: of every percentile and mean the median of the rounds is
recorded, and the note has the least and the most.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import bench_config, free_device, write_adapters, write_base
from benchmarks.record import record
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams

RANK, PROMPT, OUTPUT = 16, 64, 64
PAGE_BYTES = 2_621_440  # of one of the 8B shape's layers, in bf16
TARGET = 2.0  # times the median of the engine with slots for all


@dataclass(frozen=True)
class Arrival:
    """When a request comes, in seconds from the start (of `load` 1), and the adapter's place in popularity."""

    at: float
    adapter: int


def main() -> None:
    """Build both engines in turn, and record what they do with the same arrivals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--load", type=float, default=0.6)
    parser.add_argument("--rate", type=float, help="requests a second, whatever the capacity")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scratch", type=Path, help="where the base and the adapters are written")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    live = 2 * args.slots
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        blobs = BlobStore(f"file://{folder / 'blobs'}")
        base = write_base(folder / "base", args.layers) if on_gpu else Path("embedded")
        config = replace(
            bench_config(base), num_adapter_slots=live, host_cache_bytes=(live + 2) * args.layers * PAGE_BYTES
        )
        engine = LLMEngine(config, blobs, lambda: None)
        refs = write_adapters(blobs, folder, engine.model.spec, [RANK] * live)
        rate = args.rate or args.load * measure_capacity(engine, refs)
        arrivals = draw(args.requests, rate, live)
        serve(engine, refs, arrivals)  # kernels are compiled, and adapters are in host memory
        resident = [serve(engine, refs, arrivals) for _ in range(args.rounds)]
        engine.close()
        del engine
        free_device()
        engine = LLMEngine(replace(config, num_adapter_slots=args.slots), blobs, lambda: None)
        serve(engine, refs, arrivals)
        half = [serve(engine, refs, arrivals) for _ in range(args.rounds)]
        engine.close()
    shape, note = "8B" if on_gpu else "embedded", f"{args.requests} requests at {rate:.1f}/s, zipf 1"
    of_all = record_rounds(f"{live} live, {live} slots, {shape}", resident, None, note)
    record_rounds(f"{live} live, {args.slots} slots, {shape}", half, TARGET * of_all, note)


def record_rounds(case: str, rounds: Sequence[Sequence[float]], target: float | None, note: str) -> float:
    """Record what the rounds say of the time to the first token, in ms; the median of their medians."""
    median = 0.0
    for metric, of in (("p50", 50), ("p99", 99), ("mean", None)):
        values = [float(np.mean(r) if of is None else np.percentile(r, of)) * 1e3 for r in rounds]
        spread = f"{note}; median of {len(values)} rounds, from {min(values):.0f} to {max(values):.0f}"
        limit = round(target, 4) if target is not None and metric == "p50" else None
        record("zipf", case, f"ttft_{metric}", statistics.median(values), "ms", target=limit, note=spread)
        median = statistics.median(values) if metric == "p50" else median
    return median


def measure_capacity(engine: LLMEngine, refs: Sequence[AdapterRef]) -> float:
    """Requests a second that the engine ends when all are there at once, the second time."""
    at_once = [Arrival(0.0, i % len(refs)) for i in range(2 * len(refs))]
    serve(engine, refs, at_once)
    begin = time.perf_counter()
    serve(engine, refs, at_once)
    return len(at_once) / (time.perf_counter() - begin)


def draw(count: int, rate: float, live: int) -> list[Arrival]:
    """Random arrivals, so many a second on average."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, live + 1)
    times = np.cumsum(random.exponential(1 / rate, count))
    return [
        Arrival(at, int(adapter))
        for at, adapter in zip(times, random.choice(live, count, p=weights / weights.sum()), strict=True)
    ]


def serve(engine: LLMEngine, refs: Sequence[AdapterRef], arrivals: Sequence[Arrival]) -> list[float]:
    """Seconds from each arrival to its first token."""
    random = np.random.default_rng(1)
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    start, coming, first = time.perf_counter(), iter(enumerate(arrivals)), {}
    following = next(coming, None)
    while following is not None or engine.has_work:
        now = time.perf_counter() - start
        while following is not None and following[1].at <= now:
            number, arrival = following
            prompt = random.integers(10, 1000, PROMPT).tolist()  # the embedded base has few tokens
            request = GenerateRequest(f"{start}-{number}", params, prompt=prompt, adapter=refs[arrival.adapter])
            engine.add(request, prompt)
            following = next(coming, None)
        if not engine.has_work:
            assert following is not None
            time.sleep(max(0.0, following[1].at - now))
            continue
        output = engine.step()
        now = time.perf_counter() - start
        for delta in output.deltas:
            assert delta.error is None, delta.error
            number = int(delta.request_id.rpartition("-")[2])
            first.setdefault(number, now - arrivals[number].at)
        if output.num_tokens == 0:
            time.sleep(engine.poll_interval)
    return list(first.values())


if __name__ == "__main__":
    main()
