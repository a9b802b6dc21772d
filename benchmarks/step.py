"""Where the time of a decode step goes on one GPU, part by part, at Llama-3.1-8B's shape.

    python -m benchmarks.step [--cases "64x64 nf4,64x64 nf4 adapters8"] [--layers 32] [--scratch DIR]

For each case of `benchmarks.engine`, in the middle of its output: the step's wall time, what of it each part takes, how
long the device is idle in it, and the floor of each part's bytes. Kernels overlap (programmatic dependent launch): a
moment is the kernel's that began first, so that the parts and the idle time add up to the step as it was profiled. The
kernels are printed by their own time, overlaps included. `python -m benchmarks.plots` draws the parts.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine import (
    BANDWIDTH,
    OUTPUT,
    Case,
    drain,
    label,
    make_parser,
    make_requests,
    run,
    serve_all,
    step_bytes,
)
from benchmarks.record import record
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef

CASES: Final = "64x0 nf4,64x64 nf4,256x0 nf4,1x1 nf4,64x64 nf4 adapters8"
WARM, TIMED, PROFILED = 100, 20, 6  # steps: by then all rows decode, and half of the output is left
SHOWN = 16
# The bytes of adapters are those of the second, though A x may be beside the first.
PARTS: Final = {
    "base products": r"nf4_matmul|nf4_unpack",
    "shrinks and expands": r"_shrink_kernel|_expand_kernel|_columns_kernel",
    "attention": r"_decode_kernel|_plan_kernel|_prefill_kernel|_tiles_kernel",
    "norms, rotary, gate": r"_rms_norm_kernel|_rotary_store_kernel|_silu_mul_kernel|_apply_vectors_kernel",
    "dense products": r"nvjet|gemm|cutlass|splitKreduce",
    "copies, argmax and others": r"",
}
"""What a part's kernels are called; a kernel is the first part's that fits. Dense are lm_head and a base in bf16."""
Span = tuple[float, float, str]


def main() -> None:
    """Profile each case."""
    args = make_parser(__doc__, CASES).parse_args()
    serve_all(
        args,
        {},
        build=lambda config, blobs, kind: LLMEngine(config, blobs, lambda: None),
        measure=lambda engine, refs, case: _profile(engine, refs, case, label(args)),
    )


def _profile(engine: LLMEngine, refs: Sequence[AdapterRef | None], case: Case, suffix: str) -> None:
    run(engine, refs, case.num_requests, 2)  # the adapters come in
    for request, prompt in make_requests(refs, case.num_requests, OUTPUT):
        engine.add(request, prompt)
    for _ in range(WARM):
        engine.step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(TIMED):
        engine.step()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / TIMED * 1e6
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
    _record(f"{case}{suffix}", wall, spans, _floors(step_bytes(engine, case), case))
    Console(width=120).print(_kernels(str(case), spans))


def _floors(num_bytes: dict[str, float], case: Case) -> dict[str, float]:
    """What the bytes of each part take, in us."""
    parts = {"cache": "attention", "adapters": "shrinks and expands", "lm_head": "dense products"}
    parts["base"] = "base products" if case.base == "nf4" else "dense products"
    floors = Counter[str]()
    for what, count in num_bytes.items():
        floors[parts[what]] += count / BANDWIDTH * 1e6
    return {part: round(floor, 1) for part, floor in floors.items()}


def _record(case: str, wall: float, spans: Sequence[Span], floors: dict[str, float]) -> None:
    """One line for the step, one for each part that it has, and one for what is idle."""
    record("step", case, "step_us", wall, "us", floor=round(sum(floors.values()), 1))
    times = Counter[str]()
    for name, own in own_times(spans):
        times[part_of(name)] += own
    for part in (part for part in PARTS if times[part]):
        record("step", case, part, times[part] / PROFILED, "us", floor=floors.get(part))
    idle = spans[-1][1] - spans[0][0] - times.total()
    record("step", case, "idle", idle / PROFILED, "us")


def part_of(kernel: str) -> str:
    """The part of a step that a kernel of this name is."""
    return next(part for part, names in PARTS.items() if re.search(names, kernel))


def own_times(spans: Sequence[Span]) -> Iterator[tuple[str, float]]:
    """Of each span, in order of their starts, what no span before it covers."""
    reached = spans[0][0]
    for begin, end, name in spans:
        yield name, max(end - max(begin, reached), 0.0)
        reached = max(reached, end)


def _kernels(title: str, spans: Sequence[Span]) -> Table:
    table = Table("kernel", "times", "us", title=title)
    times, counts = Counter[str](), Counter(name for _, _, name in spans)
    for begin, end, name in spans:
        times[name] += end - begin
    for name, total in times.most_common(SHOWN):
        table.add_row(name[:80], f"{counts[name] / PROFILED:.1f}", f"{total / PROFILED:.1f}")
    return table


if __name__ == "__main__":
    main()
