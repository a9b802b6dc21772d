"""The product with an NF4 weight on a GPU, beside cuBLAS on the same weight in bf16.

    python -m benchmarks.nf4_matmul [--tokens 1,16,64,256]

The four fused linears of a Llama-3.1-8B layer. Weights are rotated past the L2 cache, launches replayed from a CUDA
graph; the time is the median of replays over the launches in one. Prints and records microseconds, the floor (the
packed bytes over the machine's copy bandwidth) and how many times cuBLAS's speed that is, shape by shape and in sum.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.record import record
from lora_kernels.nf4 import block_major, nf4_matmul

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROTATED_BYTES = 300_000_000
BANDWIDTH = 4.29e12  # bytes/s, a device copy on one H200 (read + write)
REPLAYS = 7


def microseconds(launches: list[Callable[[], torch.Tensor]]) -> float:
    """Median time of one launch."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times[1:])


def nf4_weights(out_features: int, in_features: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random packed weights, as many as pass the L2 cache together."""
    blocks = in_features // 64
    count = max(3, ROTATED_BYTES // (out_features * blocks * 36))
    return [
        (
            block_major(torch.randint(0, 256, (out_features, blocks, 32), dtype=torch.uint8, device="cuda")),
            block_major(torch.rand(out_features, blocks, device="cuda") * 0.05),
        )
        for _ in range(count)
    ]


def measure(name: str, num_tokens: int) -> tuple[float, float]:
    """(cuBLAS on bf16, ours), microseconds."""
    out_features, in_features = SHAPES[name]
    x = torch.randn(num_tokens, in_features, device="cuda", dtype=torch.bfloat16)
    count = max(3, ROTATED_BYTES // (out_features * in_features * 2))
    dense = [torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    peer = microseconds([lambda w=w: F.linear(x, w) for w in dense])  # type: ignore[misc]
    del dense
    packed = nf4_weights(out_features, in_features)
    return peer, microseconds([lambda w=w: nf4_matmul(x, *w) for w in packed])  # type: ignore[misc]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,256,1024,4096")
    for num_tokens in map(int, parser.parse_args().tokens.split(",")):
        results = {name: measure(name, num_tokens) for name in SHAPES}
        for name, (peer, ours) in results.items():
            report(f"{name}, {num_tokens} rows", peer, ours, SHAPES[name][0] * SHAPES[name][1])
        sums = [sum(column) for column in zip(*results.values(), strict=True)]
        report(f"layer, {num_tokens} rows", sums[0], sums[1], sum(o * i for o, i in SHAPES.values()))


def report(case: str, peer: float, ours: float, numel: int) -> None:
    """Record both times and their ratio."""
    note = f"median of {REPLAYS - 1} graph replays, weights rotated"
    record("nf4_matmul", case, "time", peer, "us", system="cuBLAS bf16", floor=numel * 2 / BANDWIDTH * 1e6, note=note)
    record("nf4_matmul", case, "time", ours, "us", floor=numel * 0.5625 / BANDWIDTH * 1e6, note=note)
    record("nf4_matmul", case, "speedup_vs_cublas", peer / ours, "x", note=note)


if __name__ == "__main__":
    main()
