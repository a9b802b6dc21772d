"""The small kernels of a layer (norm, rotary, gate, vectors by slot) beside PyTorch, torch.compile and liger.

At up to 16 rows the buffers of one graph fit into the L2, as a decode step's activations do, and a launch is all that
is timed. `by slot`: each row takes the vectors of one of 64 slots in turn; the bytes count each slot's once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.timing import copies, floor_us, measure, report, report_ratio
from lora_kernels.activation import silu_mul, silu_mul_ref
from lora_kernels.layer_cache import LayerCache
from lora_kernels.norm import rms_norm, rms_norm_ref
from lora_kernels.rotary import HeadNorm, rotary_store, rotary_store_ref
from lora_kernels.vectors import SlotVectors, apply_vectors, apply_vectors_ref

TOKENS = (1, 16, 64, 256, 4096)
HIDDEN, FEED_FORWARD, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
QKV = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
NUM_SLOTS, BLOCK_SIZE, EPS = 64, 16, 1e-5
MAX_LAUNCHES = 500  # in one graph
SHARE_TARGET = 0.85  # at 4,096 rows

Function = Callable[..., object]


@dataclass(frozen=True)
class Case:
    """A kernel, its plain PyTorch twin and perhaps liger's, over the arguments and bytes of so many rows."""

    name: str
    arguments: Callable[[int], tuple[object, ...]]
    nbytes: Callable[[int], int]
    kernel: Function
    plain: Function
    liger: Function | None = None

    def systems(self) -> dict[str, Function]:
        """Who computes it. A compiled twin is one program a size, as a CUDA graph of that size would hold."""
        compiled = torch.compile(self.plain, dynamic=False)
        systems = {"patchbay": self.kernel, "PyTorch": self.plain, "torch.compile": compiled}
        return systems | ({"liger": self.liger} if self.liger else {})


def run() -> None:
    """Measure and record every case."""
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 100  # a plain twin is compiled for every size and case
    for case in cases():
        systems = case.systems()
        for tokens in TOKENS:
            _measure(f"{case.name} M={tokens}", case, tokens, systems)


def cases() -> list[Case]:
    """What a layer launches, and the same with vectors by slot."""
    liger_norm, liger_gate = _liger()
    return [
        Case("add_rms_norm", _norm, _norm_bytes, rms_norm, rms_norm_ref, liger_norm),
        Case("add_rms_norm by slot", _norm_by_slot, _norm_by_slot_bytes, rms_norm, rms_norm_ref),
        Case("silu_mul", _gate, lambda n: 6 * n * FEED_FORWARD, silu_mul, silu_mul_ref, liger_gate),
        Case("silu_mul by slot", _gate_by_slot, _gate_by_slot_bytes, silu_mul, silu_mul_ref),
        Case("rotary_store", _rotary, _rotary_bytes, rotary_store, rotary_store_ref),
        Case("head norm, rotary_store", _rotary_normed, _rotary_bytes, rotary_store, rotary_store_ref),
        Case("rotary_store by slot", _rotary_by_slot, _rotary_by_slot_bytes, rotary_store, rotary_store_ref),
        Case("gather_scale", _scale, _scale_bytes, apply_vectors, apply_vectors_ref),
    ]


def _measure(name: str, case: Case, tokens: int, systems: dict[str, Function]) -> None:
    nbytes = case.nbytes(tokens)
    sets = [case.arguments(tokens) for _ in range(min(copies(nbytes), MAX_LAUNCHES))]
    for system, function in systems.items():
        timing = measure([partial(function, *arguments) for arguments in sets])
        report(name, timing, nbytes=nbytes, system=system)
        if system == "patchbay":
            share = floor_us(nbytes) / timing.us
            report_ratio(name, "share_of_floor", share, SHARE_TARGET if tokens == TOKENS[-1] else None)


def _rows(tokens: int, width: int) -> Tensor:
    return torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)


def _by_slot(tokens: int, width: int) -> SlotVectors:
    # Near 1, so that scaling a buffer in place again and again neither swells nor empties it.
    scale = torch.rand(NUM_SLOTS, width, device="cuda", dtype=torch.bfloat16) + 0.5
    return SlotVectors(torch.arange(tokens, dtype=torch.int32, device="cuda") % NUM_SLOTS, scale)


def _by_slot_bytes(tokens: int, width: int) -> int:
    return 4 * tokens + 2 * width * min(tokens, NUM_SLOTS)


def _norm(tokens: int) -> tuple[object, ...]:
    return _rows(tokens, HIDDEN), _rows(1, HIDDEN)[0], EPS, _rows(tokens, HIDDEN)


def _norm_bytes(tokens: int) -> int:
    return 2 * HIDDEN * (4 * tokens + 1)


def _norm_by_slot(tokens: int) -> tuple[object, ...]:
    return *_norm(tokens), _by_slot(tokens, HIDDEN)


def _norm_by_slot_bytes(tokens: int) -> int:
    return 8 * tokens * HIDDEN + _by_slot_bytes(tokens, HIDDEN)


def _gate(tokens: int) -> tuple[object, ...]:
    return (_rows(tokens, 2 * FEED_FORWARD),)


def _gate_by_slot(tokens: int) -> tuple[object, ...]:
    return *_gate(tokens), _by_slot(tokens, FEED_FORWARD)


def _gate_by_slot_bytes(tokens: int) -> int:
    return 6 * tokens * FEED_FORWARD + _by_slot_bytes(tokens, FEED_FORWARD)


def _rotary(tokens: int, norm: HeadNorm | None = None, vectors: SlotVectors | None = None) -> tuple[object, ...]:
    blocks = -(-tokens // BLOCK_SIZE)
    cos, sin = _rows(2 * tokens, HEAD_DIM).view(2, tokens, 1, HEAD_DIM)
    caches = _rows(2 * blocks * BLOCK_SIZE, NUM_KV_HEADS * HEAD_DIM).view(2, blocks, BLOCK_SIZE, -1, HEAD_DIM)
    places = torch.randperm(blocks * BLOCK_SIZE, device="cuda")[:tokens]
    return _rows(tokens, QKV), cos, sin, LayerCache(*caches), places, norm, vectors


def _rotary_bytes(tokens: int) -> int:
    return tokens * (4 * QKV + 2 * HEAD_DIM + 8)


def _rotary_normed(tokens: int) -> tuple[object, ...]:
    return _rotary(tokens, norm=HeadNorm(_rows(2, HEAD_DIM), EPS))


def _rotary_by_slot(tokens: int) -> tuple[object, ...]:
    return _rotary(tokens, vectors=_by_slot(tokens, QKV))


def _rotary_by_slot_bytes(tokens: int) -> int:
    return _rotary_bytes(tokens) + _by_slot_bytes(tokens, QKV)


def _scale(tokens: int) -> tuple[object, ...]:
    return _rows(tokens, QKV), _by_slot(tokens, QKV)


def _scale_bytes(tokens: int) -> int:
    return 4 * tokens * QKV + _by_slot_bytes(tokens, QKV)


def _liger() -> tuple[Function | None, Function | None]:
    """liger's residual norm and gate (`pip install liger-kernel`), where it is installed."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction
    except ImportError:
        return None, None
    return (
        lambda x, weight, eps, delta: LigerFusedAddRMSNormFunction.apply(delta, x, weight, eps),
        LigerFusedGateUpSiLUMulFunction.apply,
    )
