"""The adapters of one layer: the seven linears of Llama-3.1-8B, four of which share an input or stand alone.

`us_per_layer` is what they add to the four NF4 products, as the engine runs them; of system "sgmv", what four shrinks
and four expands take by themselves.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels.nf4 import random_tiles
from benchmarks.kernels.timing import (
    SUBJECT,
    Launch,
    Timing,
    capture,
    copies,
    floor_us,
    measure,
    median_us,
    report,
    report_ratio,
)
from benchmarks.record import record
from lora_kernels.nf4 import NF4Tiles, nf4_matmul
from lora_kernels.nf4_lora import nf4_lora_matmul
from lora_kernels.segments import PAGE_RANK, AdapterPages, LoRASegments
from lora_kernels.sgmv import sgmv_expand, sgmv_shrink

GROUPS = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
"""Linears that share an input: its width, and theirs."""
ITEMSIZE = 2  # bf16
NF4_BYTES = sum(width * sum(widths) for width, widths in GROUPS.values()) * 9 // 16  # of a layer's base
RANK = 16
ROUNDS = 15
DISTINCT = (1, 4, 16, 64, 256)
FEW_ROWS = ((1, 1), (8, 1), (8, 8), (16, 1), (16, 4), (16, 8), (16, 16))
AS_MANY_BYTES = ((64, 32, 64), (64, 64, 32))  # rows, adapters, rank: two rows an adapter, and one
US_TARGETS = {"adapters 64x1 r16": 12.0, "adapters 256x1 r16": 16.0}
FLOOR_TARGETS = {"adapters 64x64 r16": 1.4, "adapters 256x256 mixed": 1.3}
BYTES_A_RANK = ITEMSIZE * sum(len(widths) * width_in + sum(widths) for width_in, widths in GROUPS.values())


@dataclass(frozen=True)
class Step:
    """Rows of one step and who they belong to: the adapter of each row, and each adapter's rank."""

    slots: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The live adapters' weights: what must be read at least (x and y are in the L2, the layer just made them)."""
        return sum(self.ranks) * BYTES_A_RANK

    @property
    def pages(self) -> dict[int, AdapterPages]:
        """Pages of the adapters, one after the other."""
        counts = [math.ceil(rank / PAGE_RANK) for rank in self.ranks]
        starts = np.cumsum([0, *counts]).tolist()
        return {
            slot: AdapterPages(rank, tuple(range(starts[slot], starts[slot + 1])))
            for slot, rank in enumerate(self.ranks)
        }

    def segments(self) -> LoRASegments:
        """The routing of this step."""
        segments = LoRASegments.build(np.array(self.slots, np.int32), self.pages, "cuda")
        assert segments is not None
        return segments


def spread(num_tokens: int, ranks: Sequence[int]) -> Step:
    """`num_tokens` rows shared out evenly over adapters of these ranks."""
    return Step(tuple(row * len(ranks) // num_tokens for row in range(num_tokens)), tuple(ranks))


@dataclass(frozen=True)
class Layer:
    """A step's tensors in one layer: (x, y, a_pages, b_pages) of each group; x and y are shared by all layers."""

    groups: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]


def layers(step: Step) -> list[Layer]:
    """Layers whose weights together pass the L2."""
    num_pages = sum(len(pages) for pages in step.pages.values())
    rows = len(step.slots)
    x = {name: torch.randn(rows, width_in, device="cuda").bfloat16() for name, (width_in, _) in GROUPS.items()}
    y = {name: torch.randn(rows, sum(widths), device="cuda").bfloat16() for name, (_, widths) in GROUPS.items()}
    return [
        Layer({name: (x[name], y[name], *_pools(num_pages, *shape)) for name, shape in GROUPS.items()})
        for _ in range(copies(step.nbytes))
    ]


def _pools(num_pages: int, width_in: int, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    a = torch.empty(num_pages, len(widths), PAGE_RANK, width_in, device="cuda", dtype=torch.bfloat16)
    b = torch.empty(num_pages, PAGE_RANK, sum(widths), device="cuda", dtype=torch.bfloat16)
    return a.normal_(std=0.01), b.normal_(std=0.01)


def kernels(layer: Layer, segments: LoRASegments) -> Launch:
    """This project's kernels on one layer."""

    def launch() -> None:
        for name, (x, y, a, b) in layer.groups.items():
            sgmv_expand(sgmv_shrink(x, a, segments), b, segments, y, GROUPS[name][1])

    return launch


def gather_bmm(layer: Layer, step: Step) -> Launch:
    """What one writes first: each row's own matrices gathered, then batched products. One page an adapter."""
    slots = torch.tensor(step.slots, device="cuda")

    def launch() -> None:
        for name, (x, y, a, b) in layer.groups.items():
            h = torch.bmm(a[slots].flatten(1, 2), x[:, :, None])[:, :, 0].view(len(x), -1, PAGE_RANK)
            parts = zip(y.split(GROUPS[name][1], 1), b[slots].split(GROUPS[name][1], 2), h.unbind(1), strict=True)
            for out, own, hidden in parts:
                out += torch.bmm(hidden[:, None], own)[:, 0]

    return launch


def adapter_loop(layer: Layer, step: Step) -> Launch:
    """One adapter after the other through cuBLAS. One page an adapter; its rows lie together."""
    rows = [(slot, step.slots.index(slot), step.slots.count(slot)) for slot in range(len(step.ranks))]

    def launch() -> None:
        for name, (x, y, a, b) in layer.groups.items():
            for slot, start, count in rows:
                h = torch.mm(x[start : start + count], a[slot].flatten(0, 1).T)
                outs = y[start : start + count].split(GROUPS[name][1], 1)
                for s, (out, own) in enumerate(zip(outs, b[slot].split(GROUPS[name][1], 1), strict=True)):
                    out.addmm_(h[:, s * PAGE_RANK : (s + 1) * PAGE_RANK], own)

    return launch


def time_step(step: Step) -> Timing:
    """Microseconds of a layer's shrinks and expands."""
    segments = step.segments()
    return measure([kernels(layer, segments) for layer in layers(step)])


def time_added(step: Step) -> Timing:
    """Microseconds that the adapters add to a layer's NF4 products: the median of differences of both, in turn.

    Of 256 rows both take ten times the difference, and vary by as much as it.
    """
    segments, held = step.segments(), layers(step)
    held = [held[at % len(held)] for at in range(max(len(held), copies(NF4_BYTES)))]
    bases = [{name: random_tiles((sum(widths), width)) for name, (width, widths) in GROUPS.items()} for _ in held]

    def base(layer: Layer, weights: dict[str, NF4Tiles]) -> None:
        for name, (x, *_) in layer.groups.items():
            nf4_matmul(x, weights[name])

    def both(layer: Layer, weights: dict[str, NF4Tiles]) -> None:
        for name, (x, _, a, b) in layer.groups.items():
            nf4_lora_matmul(x, weights[name], None, a, b, segments, GROUPS[name][1])

    pairs = list(zip(held, bases, strict=True))
    graphs = [capture([partial(launch, *pair) for pair in pairs]) for launch in (base, both)]
    rounds = [[median_us(graph) / len(pairs) for graph in graphs] for _ in range(ROUNDS)]
    low, added, high = statistics.quantiles((both - alone for alone, both in rounds), n=4)
    return Timing(added, (high - low) / max(added, 1e-9))


def one_rank(step: Step) -> Step:
    """As many adapters, all of one rank, whose weights are as many bytes within 1 %."""
    return Step(step.slots, (round(sum(step.ranks) / len(step.ranks)),) * len(step.ranks))


def prefill() -> None:
    """Four segments of 1,024 tokens: what adapters add to a layer's linears, NF4 as in the engine, and bf16 by cuBLAS.

    Measured in turn, since the card's clock falls under such a load; each the median of five.
    """
    step = spread(4096, [RANK] * 4)
    segments, held = step.segments(), layers(step)[:2]
    packed = {name: random_tiles((sum(widths), width)) for name, (width, widths) in GROUPS.items()}
    dense = {
        name: torch.randn(sum(widths), width_in, device="cuda", dtype=torch.bfloat16) / width_in**0.5
        for name, (width_in, widths) in GROUPS.items()
    }

    def nf4(layer: Layer, *, adapted: bool) -> None:
        for name, (x, _, a, b) in layer.groups.items():
            if adapted:
                nf4_lora_matmul(x, packed[name], None, a, b, segments, GROUPS[name][1])
            else:
                nf4_matmul(x, packed[name])

    def bf16(layer: Layer, *, adapted: bool) -> None:
        for name, (x, y, a, b) in layer.groups.items():
            torch.mm(x, dense[name].T, out=y)
            if adapted:
                sgmv_expand(sgmv_shrink(x, a, segments), b, segments, y, GROUPS[name][1])

    for system, launch in (("patchbay", nf4), ("sgmv on cuBLAS bf16", bf16)):
        times: dict[bool, list[float]] = {False: [], True: []}
        for adapted in (False, True) * 5:
            times[adapted].append(measure([partial(launch, layer, adapted=adapted) for layer in held]).us)
        alone, both = statistics.median(times[False]), statistics.median(times[True])
        note = f"layer {both:.0f} us, its linears alone {alone:.0f} us, in turn"
        case = f"prefill 4x1024 r{RANK}"
        record(SUBJECT, case, "share_added", both / alone - 1, "share", target=0.08, system=system, note=note)


def run() -> None:
    """Measure and record all cases."""
    generator = random.Random(0)
    mixed = spread(256, [generator.choice((8, 16, 32, 64)) for _ in range(256)])
    for num_tokens in (64, 256):
        for distinct in (count for count in DISTINCT if count <= num_tokens):
            _record(f"adapters {num_tokens}x{distinct} r{RANK}", spread(num_tokens, [RANK] * distinct))
    for num_tokens, distinct in FEW_ROWS:
        _record(f"adapters {num_tokens}x{distinct} r{RANK}", spread(num_tokens, [RANK] * distinct))
    for num_tokens, distinct, rank in AS_MANY_BYTES:
        _record(f"adapters {num_tokens}x{distinct} r{rank}", spread(num_tokens, [rank] * distinct))
    ours = _record("adapters 256x256 mixed", mixed)
    even = _record("adapters 256x256 one rank", one_rank(mixed))
    report_ratio("adapters 256x256 mixed", "times_one_rank", ours.us / even.us, 1.1)
    _record_alternatives()
    prefill()


def _record(case: str, step: Step) -> Timing:
    added, alone = time_added(step), time_step(step)
    note = f"median of {ROUNDS} differences to the NF4 products alone, the middle half over {added.spread:.1%}"
    report(case, added, nbytes=step.nbytes, target=US_TARGETS.get(case), metric="us_per_layer", note=note)
    report(case, alone, nbytes=step.nbytes, system="sgmv", metric="us_per_layer")
    report_ratio(case, "times_floor", added.us / floor_us(step.nbytes), FLOOR_TARGETS.get(case))
    return alone


def _record_alternatives() -> None:
    """What a user would write, at 64 distinct adapters."""
    step, case = spread(64, [RANK] * 64), f"adapters 64x64 r{RANK}"
    held = layers(step)
    ours = measure([kernels(layer, step.segments()) for layer in held])
    for system, make, target in (("gather+bmm", gather_bmm, 4), ("cublas loop", adapter_loop, 10)):
        timing = measure([make(layer, step) for layer in held])
        report(case, timing, nbytes=step.nbytes, system=system, metric="us_per_layer")
        report_ratio(case, f"speedup_vs_{system.split('+')[0].replace(' ', '_')}", timing.us / ours.us, target)
