"""Find the NF4 kernels' plans for the GPU at hand and write them into `lora_kernels/nf4_plans.json`.

    python -m benchmarks.tune

Every candidate of a number of rows is timed on the four fused linears of a Llama-3.1-8B layer; the fastest is kept, or
none where unpacking the weight and a dense product is faster. Plans of other cards stay as they are. Serving reads the
table and never measures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lora_kernels
from benchmarks.kernels.nf4 import SHAPES, random_tiles
from benchmarks.kernels.timing import copies, measure
from lora_kernels.cuda_nf4 import nf4_matmul_by, unpack_nf4_tiles
from lora_kernels.nf4 import NF4Tiles
from lora_kernels.nf4_plans import NarrowPlan, Plan, WidePlan

TABLE = Path(lora_kernels.__path__[0]) / "nf4_plans.json"
NUM_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# (tokens, row groups, groups that share rows, blocks decoded at a time, stages) of nf4_wide.cu
WIDE = (
    (16, 1, 4, 2, 4), (16, 2, 1, 2, 6), (16, 4, 1, 1, 8), (32, 1, 4, 2, 3), (32, 2, 1, 2, 5), (32, 4, 1, 1, 7),
    (64, 1, 2, 2, 3), (64, 2, 1, 2, 4), (64, 2, 2, 1, 4), (64, 4, 1, 1, 5), (128, 2, 1, 1, 5), (128, 4, 1, 1, 4),
    (256, 2, 1, 1, 4),
)  # fmt: skip


def candidates(num_tokens: int, capability: tuple[int, int]) -> Iterator[Plan]:
    """What may be fast for so many rows of x on a card."""
    is_hopper, is_small = capability[0] == 9, capability in ((8, 6), (8, 9))  # 100 KB of shared memory
    if num_tokens <= 32:
        tokens = max(8, num_tokens)
        for warps, depth, blocks in ((8, 1, 2), (8, 2, 2), (4, 1, 3), (4, 2, 2), (4, 2, 3), (4, 1, 1), (8, 1, 1)):
            if warps * tokens <= 128 and not (is_small and blocks > 1):
                yield NarrowPlan(tokens, warps, depth, blocks, 4 if is_hopper else 0)
    if is_hopper:
        for tokens, row_groups, in_groups, span, stages in WIDE:
            if min(num_tokens // 8, 256) <= tokens <= max(num_tokens, 16):
                for share in (True, False):
                    yield WidePlan(tokens, row_groups, in_groups, span, stages, share)


def best(num_tokens: int, weights: list[NF4Tiles], capability: tuple[int, int]) -> Plan | None:
    """The fastest candidate; None when unpacking is faster than all of them."""
    x = torch.randn(num_tokens, weights[0].shape[1], device="cuda").bfloat16()
    unpacked = measure([partial(_by_unpacking, x, weight) for weight in weights]).us
    times: dict[Plan | None, float] = {None: unpacked}
    for plan in candidates(num_tokens, capability):
        if plan.fitted(x.shape[1] // 64) == plan:
            times[plan] = measure([partial(nf4_matmul_by, plan, x, weight) for weight in weights]).us
    fastest = min(times, key=lambda one: times[one])
    took = f"{times[fastest]:.1f} us by {fastest}; unpacked {unpacked:.1f} us"
    print(f"{num_tokens} rows, {weights[0].shape}: {took}", flush=True)
    return fastest


def _by_unpacking(x: torch.Tensor, weight: NF4Tiles) -> torch.Tensor:
    return F.linear(x, unpack_nf4_tiles(weight, x.dtype))


def entry(plan: Plan | None, num_tokens: int, shape: tuple[int, int], capability: tuple[int, int]) -> dict[str, Any]:
    """A line of the table."""
    line: dict[str, Any] = {"capability": list(capability), "tokens_up_to": num_tokens, "out": shape[0], "in": shape[1]}
    if plan is not None:
        line["narrow" if isinstance(plan, NarrowPlan) else "wide"] = asdict(plan)
    return line


def main() -> None:
    """Measure every case and rewrite the card's part of the table."""
    capability = torch.cuda.get_device_capability()
    lines = [line for line in json.loads(TABLE.read_text()) if tuple(line["capability"]) != capability]
    for shape in SHAPES.values():
        weights = [random_tiles(shape) for _ in range(copies(shape[0] * shape[1] // 2))]
        lines += [entry(best(n, weights, capability), n, shape, capability) for n in NUM_TOKENS]
    lines.sort(key=lambda line: (line["capability"], line["tokens_up_to"]))
    TABLE.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")


if __name__ == "__main__":
    main()
