"""Times of launches replayed from a CUDA graph, and the bandwidth that they are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.record import record

ROTATED_BYTES = 400_000_000  # what one launch reads is rotated over buffers of this size: several times the L2
REPLAYS = 9
SUBJECT = "kernels"
Launch = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """us: the median time of one launch over two runs. spread: the two runs' difference as a share of it."""

    us: float
    spread: float


def copies(nbytes: int) -> int:
    """How many buffers of `nbytes` pass the L2 together."""
    return max(2, -(-ROTATED_BYTES // max(nbytes, 1)))


def measure(launches: Sequence[Launch]) -> Timing:
    """Time launches (one a rotated buffer) captured one after the other into a CUDA graph."""
    graph = capture(launches)
    runs = [median_us(graph) / len(launches) for _ in range(2)]
    return Timing(statistics.mean(runs), abs(runs[0] - runs[1]) / max(runs))


def capture(launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
    """A graph of these launches, which have run once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs may still be in the making
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch()
    return graph


def median_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay, the median of `REPLAYS`."""
    times = []
    for _ in range(REPLAYS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[1:])


@cache
def bandwidth() -> float:
    """Bytes a second of a large device copy, read and written, on this machine."""
    source = torch.randint(0, 1 << 30, (1 << 28,), dtype=torch.int32, device="cuda").repeat(4)
    target = torch.empty_like(source)
    timing = measure([lambda: torch.bitwise_not(source, out=target)])  # a kernel: a graph's copies are slower
    return 2 * source.nbytes / timing.us * 1e6


def floor_us(nbytes: float) -> float:
    """Microseconds in which this machine moves so many bytes."""
    return nbytes / bandwidth() * 1e6


def report(
    case: str,
    timing: Timing,
    *,
    nbytes: float,
    system: str = "patchbay",
    target: float | None = None,
    metric: str = "us",
    note: str | None = None,
) -> None:
    """Record a time beside the byte floor of the case. note: how it was taken, where not by `measure` alone."""
    by_measure = f"median of {2 * REPLAYS} graph replays, buffers rotated; two runs differ by {timing.spread:.1%}"
    record(
        SUBJECT,
        case,
        metric,
        timing.us,
        "us",
        floor=round(floor_us(nbytes), 2),
        target=target,
        system=system,
        note=note or by_measure,
    )


def report_ratio(case: str, metric: str, value: float, target: float | None = None) -> None:
    """Record a ratio of two times of one run."""
    record(SUBJECT, case, metric, value, "x", target=target, note="both in this run")
