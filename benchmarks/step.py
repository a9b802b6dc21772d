"""Where the time of a decode step goes on one GPU, kernel by kernel, at Llama-3.1-8B's shape.

    python -m benchmarks.step [--layers 32] [--cases 64x0,64x64] [--adapter-dtype int8]

Prints, for each case of `benchmarks.engine`, the step's wall time, how long the device was busy and idle in it, and the
kernels by their time. Kernels may overlap (programmatic dependent launch), so that theirs add up to more than the step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from adapters_store.blobs import BlobStore
from benchmarks.engine import OUTPUT, bench_config, drain, make_requests, run, write_adapter, write_base
from gateway.engine.llm_engine import LLMEngine

WARM, TIMED, PROFILED = 100, 20, 6  # steps: by then all rows decode, and half of the output is left
SHOWN = 16


def main() -> None:
    """Build the base and the adapters, then profile each case in the middle of its output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--cases", default="64x0,64x64")
    parser.add_argument("--adapter-dtype", default="auto")
    args = parser.parse_args()
    cases = [tuple(map(int, case.split("x"))) for case in args.cases.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        blobs = BlobStore(f"file://{folder / 'blobs'}")
        config = replace(bench_config(write_base(folder / "base", args.layers)), adapter_dtype=args.adapter_dtype)
        engine = LLMEngine(config, blobs, lambda: None)
        most = max(num_adapters for _, num_adapters in cases)
        refs = [write_adapter(blobs, folder, engine.model.spec, 16, i) for i in range(most)]
        for num_requests, num_adapters in cases:
            chosen = list(refs[:num_adapters]) or [None]
            run(engine, chosen, num_requests, 2)  # the adapters come in
            for request, prompt in make_requests(chosen, num_requests, OUTPUT):
                engine.add(request, prompt)
            _profile(engine, f"{num_requests}x{num_adapters}")
        engine.close()


def _profile(engine: LLMEngine, case: str) -> None:
    for _ in range(WARM):
        engine.step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(TIMED):
        engine.step()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / TIMED * 1e3
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            engine.step()
        torch.cuda.synchronize()
    drain(engine)
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events() or []
        if event.device_type == DeviceType.CUDA and not event.name.startswith("ProfilerStep")
    )
    _print(case, wall, spans)


def _print(case: str, wall: float, spans: list[tuple[float, float, str]]) -> None:
    busy, reached = 0.0, spans[0][0]
    for begin, end, _ in spans:
        busy += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    idle = reached - spans[0][0] - busy
    title = f"{case}: {wall:.2f} ms a step; profiled: busy {busy / PROFILED:.0f} us, idle {idle / PROFILED:.0f} us"
    table = Table("kernel", "times", "us", title=title)
    times, counts = Counter[str](), Counter(name for _, _, name in spans)
    for begin, end, name in spans:
        times[name] += end - begin
    for name, total in times.most_common(SHOWN):
        table.add_row(name[:80], f"{counts[name] / PROFILED:.1f}", f"{total / PROFILED:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
