"""The product with an NF4 weight, beside cuBLAS on a bf16 weight and bitsandbytes on the same packed one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.timing import Timing, copies, measure, report, report_ratio
from lora_kernels.nf4 import NESTED_BLOCK, NF4_CODE, NF4Tiles, NF4Weight, blocks_of, dynamic_map, nf4_matmul

# The four fused linears of a Llama-3.1-8B layer: (out, in).
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
BYTES_A_WEIGHT = 0.5625  # four bits, and an fp32 scale for 64 of them
TARGETS = {1: 3.0, 2: 3.0, 4: 3.0, 8: 3.0, 16: 3.0, 32: 2.2, 64: 1.5, 128: 1.0, 256: 0.92, 1024: 0.92, 4096: 0.92}
BITSANDBYTES_TARGET, BITSANDBYTES_MOST = 1.5, 64
Product = Callable[[Tensor], Tensor]


def run() -> None:
    """Measure and record every case."""
    products = {name: _products(*shape) for name, shape in SHAPES.items()}
    for num_tokens in NUM_TOKENS:
        times = {name: _times(products[name], num_tokens, SHAPES[name][1]) for name in SHAPES}
        _report(f"nf4_matmul M={num_tokens}", num_tokens, times)


def random_tiles(shape: tuple[int, int]) -> NF4Tiles:
    """A weight [out, in]."""
    packed = torch.randint(0, 256, (shape[0], shape[1] // 64, 32), dtype=torch.uint8, device="cuda")
    return NF4Tiles.of(packed, torch.rand(shape[0], shape[1] // 64, device="cuda") * 0.05)


def _products(out_features: int, in_features: int) -> dict[str, list[Product]]:
    """What is compared, each with as many weights as pass the L2 together."""
    numel = out_features * in_features
    dense = [torch.randn(out_features, in_features, device="cuda").bfloat16() for _ in range(copies(2 * numel))]
    packed = [_random_weight(out_features, in_features) for _ in range(copies(numel // 2))]
    tiles = [NF4Tiles.of(*blocks_of(weight)) for weight in packed]
    products: dict[str, list[Product]] = {
        "cuBLAS bf16": [partial(F.linear, weight=weight) for weight in dense],
        "patchbay": [partial(nf4_matmul, weight=weight) for weight in tiles],
    }
    if find_spec("bitsandbytes"):
        products["bitsandbytes"] = [_bitsandbytes(weight) for weight in packed]
    return products


def _random_weight(out_features: int, in_features: int) -> NF4Weight:
    numel = out_features * in_features
    return NF4Weight(
        packed=torch.randint(0, 256, (numel // 2,), dtype=torch.uint8, device="cuda"),
        absmax_u8=torch.randint(0, 256, (numel // 64,), dtype=torch.uint8, device="cuda"),
        nested_absmax=torch.rand(-(-numel // 64 // NESTED_BLOCK), device="cuda") * 0.02,
        nested_offset=torch.tensor(0.05, device="cuda"),
        nested_code=dynamic_map().cuda(),
        shape=(out_features, in_features),
        dtype=torch.bfloat16,
    )


def _bitsandbytes(weight: NF4Weight) -> Product:
    import bitsandbytes as bnb

    nested = bnb.functional.QuantState(
        absmax=weight.nested_absmax, code=weight.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    state = bnb.functional.QuantState(
        absmax=weight.absmax_u8,
        shape=torch.Size(weight.shape),
        dtype=weight.dtype,
        blocksize=64,
        code=NF4_CODE.cuda(),
        quant_type="nf4",
        offset=weight.nested_offset,
        state2=nested,
    )
    packed = weight.packed.view(-1, 1)
    return lambda x: bnb.matmul_4bit(x, packed, state)


def _times(products: dict[str, list[Product]], num_tokens: int, in_features: int) -> dict[str, Timing]:
    x = torch.randn(num_tokens, in_features, device="cuda").bfloat16()
    with torch.inference_mode():
        return {system: measure([partial(product, x) for product in each]) for system, each in products.items()}


def _report(case: str, num_tokens: int, times: dict[str, dict[str, Timing]]) -> None:
    for name, by_system in times.items():
        for system, timing in by_system.items():
            report(f"{case} {name}", timing, nbytes=_bytes(name, system, num_tokens), system=system)
    for system in next(iter(times.values())):
        total = Timing(
            sum(by_system[system].us for by_system in times.values()),
            max(by_system[system].spread for by_system in times.values()),
        )
        report(case, total, nbytes=sum(_bytes(name, system, num_tokens) for name in SHAPES), system=system)
        if system != "patchbay":
            ratio = statistics.mean(by_system[system].us / by_system["patchbay"].us for by_system in times.values())
            metric = "speedup_vs_bf16" if system == "cuBLAS bf16" else f"speedup_vs_{system}"
            report_ratio(case, metric, ratio, target=_target(system, num_tokens))


def _bytes(name: str, system: str, num_tokens: int) -> float:
    out_features, in_features = SHAPES[name]
    a_weight = 2.0 if system == "cuBLAS bf16" else BYTES_A_WEIGHT
    return out_features * in_features * a_weight + 2 * num_tokens * (in_features + out_features)


def _target(system: str, num_tokens: int) -> float | None:
    if system == "cuBLAS bf16":
        return TARGETS[num_tokens]
    return BITSANDBYTES_TARGET if num_tokens <= BITSANDBYTES_MOST else None
