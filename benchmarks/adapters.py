"""Adapters on their way to the device: how long one takes, and what the steps of others feel of it.

    python -m benchmarks.adapters [--layers 32] [--steps 200] [--adapter-dtype int8]

On one GPU a base of Llama-3.1-8B's shape, elsewhere the embedded one; adapters of rank 16 on all seven linears.

"load": from the call of `acquire`, with the adapter in host memory and the device idle, to a slot that the next step
can use; the floor is the page's bytes over the rate of the link from the host, measured here. "steps": an engine that
decodes 32 rows of 4 adapters, alone, and while other adapters come in one after another, evicting each other, from
host memory or from the disk; the longest step is held against the median of the steps alone. "dora": what the first
step of such an adapter takes more, the first of all and others.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import bench_config, drain, make_requests, write_adapter, write_base
from benchmarks.record import record
from gateway.engine.interpreter import favour_steps
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef

RANK, NUM_ROWS = 16, 32
NUM_RUNNING, NUM_IN_HOST, NUM_ON_DISK = 4, 4, 24  # adapters
NUM_SLOTS = NUM_RUNNING + 2
HOST_PAGES = 12  # less than what comes from the disk in turn
ROUNDS = 5
LOAD_TARGET, STEP_TARGET = 3.0, 1.5  # ms at 32 layers; times the median of the steps alone


def main() -> None:
    """Build the base and the adapters, then measure and record both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200, help="timed steps of each case")
    parser.add_argument("--adapter-dtype", choices=("auto", "int8"), default="auto")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        blobs = BlobStore(f"file://{folder / 'blobs'}")
        base = write_base(folder / "base", args.layers) if on_gpu else Path("embedded")
        # A page of a layer of the 8B shape takes 2.62 MB in bf16; on the CPU all adapters stay in host memory.
        page_bytes = args.layers * (2_621_440 if args.adapter_dtype == "auto" else 1_311_616)
        config = replace(
            bench_config(base),
            kv_cache_tokens=32_768,
            num_adapter_slots=NUM_SLOTS,
            host_cache_bytes=HOST_PAGES * page_bytes,
            adapter_dtype=args.adapter_dtype,
        )
        engine = LLMEngine(config, blobs, lambda: None)
        favour_steps()  # as a replica does
        count = NUM_RUNNING + NUM_IN_HOST + NUM_ON_DISK
        refs = [write_adapter(blobs, folder, engine.model.spec, RANK, i) for i in range(count)]
        suffix = f"{'8B' if on_gpu else 'embedded'}{' int8' if args.adapter_dtype == 'int8' else ''}"
        target = LOAD_TARGET if on_gpu and args.layers == 32 else None
        measure_loads(engine, refs[: NUM_SLOTS + 2], f"load r{RANK} {suffix}", target)
        measure_steps(engine, refs, args.steps, suffix)
        dora = write_adapter(blobs, folder, engine.model.spec, RANK, count, use_dora=True)
        measure_magnitudes(engine, dora, f"dora r{RANK} {suffix}")
        engine.close()


def measure_loads(engine: LLMEngine, refs: Sequence[AdapterRef], case: str, target: float | None) -> None:
    """Loads of adapters that are in host memory; more of them than slots, so that each is a copy."""
    residency = engine.residency
    for ref in refs:
        engine.host_cache.get(ref.digest).result()
    ready, started = [], []
    for ref in list(refs) * ROUNDS:
        begin = time.perf_counter()
        slot = residency.acquire(ref)
        started.append(time.perf_counter() - begin)
        while slot is None:
            residency.poll()
            slot = residency.acquire(ref)
        ready.append(time.perf_counter() - begin)
        residency.release(ref.digest)
    num_bytes = engine.host_cache.get(refs[0].digest).result().num_bytes
    rate = link_rate(num_bytes, engine.model.decoder.device)
    warm = len(refs)  # the first round
    note = f"{num_bytes / 1e6:.1f} MB, link {rate / 1e9:.1f} GB/s, median of {len(ready) - warm}"
    floor = round(num_bytes / rate * 1e3, 4)
    record(
        "adapters", case, "ready_ms", statistics.median(ready[warm:]) * 1e3, "ms", floor=floor, target=target, note=note
    )
    note = f"the host's part, median; at most {max(started[warm:]) * 1e6:.0f} us"
    record("adapters", case, "start_us", statistics.median(started[warm:]) * 1e6, "us", note=note)


def link_rate(num_bytes: int, device: torch.device) -> float:
    """Bytes a second from the host's pinned memory (on the CPU: from memory) to the device, best of 5."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)  # the host waits
        seconds.append(time.perf_counter() - begin)
    return num_bytes / min(seconds)


def measure_steps(engine: LLMEngine, refs: Sequence[AdapterRef], num_steps: int, suffix: str) -> None:
    """Steps alone, and while adapters come in."""
    running, in_host = refs[:NUM_RUNNING], refs[NUM_RUNNING : NUM_RUNNING + NUM_IN_HOST]
    on_disk = refs[NUM_RUNNING + NUM_IN_HOST :]
    steps_beside(engine, running, [], num_steps)
    alone = steps_beside(engine, running, [], num_steps)
    median = statistics.median(alone)
    record_steps(f"steps alone {suffix}", alone, median, "")
    for case, coming in (("host", in_host), ("disk", on_disk)):
        steps_beside(engine, running, coming, num_steps)  # brings the first ones into host memory
        loads = engine.residency.stats.loads
        seconds = steps_beside(engine, running, coming, num_steps)
        note = f", {engine.residency.stats.loads - loads} adapters came in"
        record_steps(f"steps during loads from {case} {suffix}", seconds, median, note)


def steps_beside(
    engine: LLMEngine, running: Sequence[AdapterRef], coming: Sequence[AdapterRef], num_steps: int
) -> list[float]:
    """Seconds of each of `num_steps` steps of decoding rows, while adapters are asked for one after another."""
    for request, prompt in make_requests(list(running), NUM_ROWS, num_steps + 8):
        engine.add(request, [10 + token % 1000 for token in prompt])  # the embedded base has few tokens
    while engine.step().num_tokens != NUM_ROWS:
        time.sleep(engine.poll_interval)
    asked = ask_for(engine, coming)
    seconds = []
    for _ in range(num_steps):
        begin = time.perf_counter()
        next(asked)
        engine.step()
        seconds.append(time.perf_counter() - begin)
    drain(engine)
    return seconds


def ask_for(engine: LLMEngine, coming: Sequence[AdapterRef]) -> Iterator[None]:
    """Asks, once a turn, for an adapter as the scheduler does, until it is there; then for the next one."""
    for ref in cycle(coming):
        while engine.residency.acquire(ref) is None:
            yield
        engine.residency.release(ref.digest)
        yield
    while True:
        yield


@torch.inference_mode()
def measure_magnitudes(engine: LLMEngine, ref: AdapterRef, case: str) -> None:
    """How long it takes to put an adapter's magnitudes over the norms, the device idle before."""
    while (slot := engine.residency.acquire(ref)) is None:
        engine.residency.poll()
    vectors, raw = engine.runner.slots.vectors, engine.runner.raw_vectors
    assert vectors is not None
    assert raw is not None
    whole, host = [], []
    for _ in range(1 + ROUNDS):
        vectors.raw[slot] = frozenset({"magnitude"})
        begin = time.perf_counter()
        raw.resolve(slot)
        host.append(time.perf_counter() - begin)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        whole.append(time.perf_counter() - begin)
    engine.residency.release(ref.digest)
    record("adapters", case, "first_resolve_ms", whole[0] * 1e3, "ms", note="the first since the start")
    note = f"median of {ROUNDS}, of which the host {statistics.median(host[1:]) * 1e3:.2f} ms"
    record("adapters", case, "resolve_ms", statistics.median(whole[1:]) * 1e3, "ms", note=note)


def record_steps(case: str, seconds: list[float], median_alone: float, note: str) -> None:
    """The median and the longest of the steps."""
    note = f"{len(seconds)} steps of {NUM_ROWS} rows of {NUM_RUNNING} adapters{note}"
    target = round(STEP_TARGET * median_alone * 1e3, 4)
    record("adapters", case, "median_step_ms", statistics.median(seconds) * 1e3, "ms", note=note)
    record("adapters", case, "max_step_ms", max(seconds) * 1e3, "ms", target=target, note=f"{note}; the longest")


if __name__ == "__main__":
    main()
