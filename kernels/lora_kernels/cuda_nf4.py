"""CUDA kernels behind `lora_kernels.nf4`; imported on the first use on a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import asdict
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.nf4 import NF4_CODE, NF4Tiles, unpack_nf4
from lora_kernels.nf4_plans import NarrowPlan, Plan, WidePlan, invariant_plans, plan_for
from lora_kernels.nvrtc import CudaKernel, tensor_map
from lora_kernels.segments import FEW_PAGES
from lora_kernels.triton_invariant_matmul import invariant_matmul_triton

_DTYPES = (torch.bfloat16, torch.float16)
_TABLE_BYTES = 65536  # of shared memory: the kernels' table of codes, a copy a lane
_SUMS = 2 * 256 * 64  # numbers a multiprocessor that thread blocks leave for each other: two tiles of the widest


def nf4_matmul_cuda(x: Tensor, weight: NF4Tiles, bias: Tensor | None) -> Tensor:
    """`lora_kernels.nf4.nf4_matmul`: fused where a plan says so, else unpacked to a buffer and multiplied."""
    plan = fused_plan(x, weight)
    if plan is None:
        return F.linear(x, unpack_nf4_tiles(weight, x.dtype), bias)
    return nf4_matmul_by(plan, x, weight, bias)


def invariant_nf4_matmul_cuda(x: Tensor, weight: NF4Tiles, bias: Tensor | None) -> Tensor:
    """`lora_kernels.invariant.invariant_nf4_matmul`: as many rows at a time as the largest plan takes."""
    plans = invariant_plans(*weight.shape, _capability(x.device)) if x.dtype in _DTYPES and len(x) else ()
    if not plans:
        return invariant_matmul_triton(x, unpack_nf4_tiles(weight, x.dtype), bias)
    parts = [
        nf4_matmul_by(next(plan for plan in plans if plan.tokens >= len(part)), part, weight, bias)
        for part in torch.split(x, plans[-1].tokens)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fused_plan(x: Tensor, weight: NF4Tiles) -> Plan | None:
    """How to multiply the packed weight as it is; None where it is unpacked first."""
    return plan_for(x.shape[0], *weight.shape, _capability(x.device)) if x.dtype in _DTYPES and len(x) else None


def nf4_matmul_by(plan: Plan, x: Tensor, weight: NF4Tiles, bias: Tensor | None = None) -> Tensor:
    """The fused product as `plan` wants it, for x in bf16 or fp16."""
    x = readable(x)
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    if isinstance(plan, NarrowPlan):
        launch_narrow(plan, x, weight, bias, out)
    else:
        launch_wide(plan, x, weight, bias, out)
    return out


def readable(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows can be read 16 bytes at a time."""
    return x.contiguous() if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16 else x


def unpack_nf4_tiles(weight: NF4Tiles, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] in `dtype`: fp32 code times fp32 scale, rounded once."""
    if dtype not in _DTYPES:
        return unpack_nf4(*weight.blocks(), dtype)
    device = weight.tiles.device
    out = torch.empty(weight.shape, dtype=dtype, device=device)
    row_tiles, num_blocks, _ = weight.tiles.shape
    num_warps, warps = row_tiles * num_blocks, 4
    _unpack_kernel(dtype, device)(
        -(-num_warps // warps),
        32 * warps,
        [weight.tiles, weight.scales, _code(device), out, weight.shape[0], num_blocks, num_warps],
    )
    return out


def launch_narrow(
    plan: NarrowPlan,
    x: Tensor,
    weight: NF4Tiles,
    bias: Tensor | None,
    out: Tensor,
    adapters: ctypes.Structure | None = None,
    a_size: int = 2,
) -> None:
    """out = x W^T + bias by nf4.cu, and what `adapters` (its struct of that name, A of so many bytes) adds."""
    num_blocks = weight.tiles.shape[1]
    assert x.shape[0] <= plan.tokens, f"{x.shape[0]} rows of x, {plan.tokens} planned"
    _narrow_kernel(plan, x.dtype, x.device, 3 - a_size if adapters else 0)(
        narrow_grid(plan, weight),
        32 * (plan.warps + bool(adapters)),
        [
            x, weight.tiles, weight.scales, bias, out, _sums(x.device), _codes(x.dtype),
            x.shape[0], weight.shape[0], num_blocks, x.stride(0), *([adapters] if adapters else []),
        ],
    )  # fmt: skip


def narrow_grid(plan: NarrowPlan, weight: NF4Tiles) -> int:
    """Thread blocks of nf4.cu: as many as multiprocessors hold, or as there are stages of work."""
    row_tiles, num_blocks, _ = weight.tiles.shape
    return min(row_tiles * (num_blocks // plan.warps), num_processors(weight.tiles.device) * plan.blocks)


class _Sharing(ctypes.Structure):
    """nf4_wide.cu's struct of that name."""

    _fields_ = (("tiles", ctypes.c_int), ("blocks", ctypes.c_int), ("stages", ctypes.c_int), ("more", ctypes.c_int))

    @classmethod
    def of(cls, num_tiles: int, stages: int, processors: int) -> _Sharing:
        """All tiles of the last whole round, and of the rest behind it, shared by all multiprocessors.

        By fewer where each tile then belongs to a whole number of them, which saves sums.
        """
        tiles = num_tiles if num_tiles < 2 * processors else processors + num_tiles % processors
        even = processors // num_tiles * num_tiles
        blocks = min(even if even >= 0.9 * processors else processors, tiles * stages)
        return cls(tiles, blocks, *divmod(tiles * stages, blocks))


def launch_wide(
    plan: WidePlan,
    x: Tensor,
    weight: NF4Tiles,
    bias: Tensor | None,
    out: Tensor,
    adapters: ctypes.Structure | None = None,
    a_size: int = 2,
) -> None:
    """out = x W^T + bias by nf4_wide.cu, and what `adapters` (its struct of that name, A of so many bytes) adds."""
    row_tiles, num_blocks, _ = weight.tiles.shape
    num_tiles, processors = -(-row_tiles // plan.row_groups) * -(-len(x) // plan.tokens), num_processors(x.device)
    stages = num_blocks // (plan.in_groups * plan.span)
    sharing = _Sharing.of(num_tiles, stages, processors) if plan.share else _Sharing()
    # For adapters there is work without a tile too.
    _wide_kernel(plan, x.dtype, x.device, 3 - a_size if adapters else 0)(
        processors if adapters else min(sharing.blocks or num_tiles, processors),
        128 * (plan.row_groups * plan.in_groups + 1),
        [
            tensor_map(x, plan.tokens, 64), weight.tiles, weight.scales, bias, out, _sums(x.device), _codes(x.dtype),
            x.shape[0], weight.shape[0], num_blocks, sharing, *([adapters] if adapters else []),
        ],
    )  # fmt: skip


@cache
def _narrow_kernel(plan: NarrowPlan, dtype: torch.dtype, device: torch.device, adapted: int) -> CudaKernel:
    macros = _macros(plan, dtype) | {"ADAPTED": adapted}
    return CudaKernel("nf4.cu", "nf4_matmul", macros, device, _TABLE_BYTES)


@cache
def _wide_kernel(plan: WidePlan, dtype: torch.dtype, device: torch.device, adapted: int) -> CudaKernel:
    blocks = plan.in_groups * plan.span
    stage = blocks * (plan.tokens * 128 + plan.row_groups * (2048 + 256)) + 16
    staged_out = plan.row_groups * min(plan.tokens, 64) * 128
    shared_bytes = _TABLE_BYTES + plan.stages * stage + staged_out + (4 * FEW_PAGES if adapted else 0)
    macros = _macros(plan, dtype) | {"ADAPTED": adapted}
    return CudaKernel("nf4_wide.cu", "nf4_matmul_wide", macros, device, shared_bytes)


@cache
def _unpack_kernel(dtype: torch.dtype, device: torch.device) -> CudaKernel:
    return CudaKernel("nf4_unpack.cu", "nf4_unpack", _macros(None, dtype), device, 0)


def _macros(plan: Plan | None, dtype: torch.dtype) -> dict[str, int]:
    fields = asdict(plan) if plan else {}
    fields.pop("share", None)
    return {name.upper(): value for name, value in fields.items()} | {"BF16": int(dtype == torch.bfloat16)}


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def is_hopper(device: torch.device) -> bool:
    """Whether the card is one of those that the kernels with adapters are for."""
    return _capability(device)[0] == 9


@cache
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _sums(device: torch.device) -> Tensor:
    """What thread blocks leave for each other, or a pattern that says: nothing yet. For one stream at a time."""
    numel = num_processors(device) * _SUMS
    return torch.full((numel,), 0xFFFFFFFF, dtype=torch.uint32, device=device).view(torch.float32)


@cache
def _code(device: torch.device) -> Tensor:
    return NF4_CODE.to(device)


@cache
def _codes(dtype: torch.dtype) -> ctypes.Array[ctypes.c_uint16]:
    """The sixteen codes' bits in a 16-bit dtype."""
    return (ctypes.c_uint16 * 16)(*(bits & 0xFFFF for bits in NF4_CODE.to(dtype).view(torch.int16).tolist()))
