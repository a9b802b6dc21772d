"""CUDA kernel behind `lora_kernels.nf4_lora`; imported on the first use on a GPU."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from lora_kernels.cuda_nf4 import fused_plan, launch_wide, num_processors, readable
from lora_kernels.nf4 import NF4Tiles
from lora_kernels.nf4_lora import fuses
from lora_kernels.nf4_plans import WidePlan
from lora_kernels.nvrtc import tensor_map
from lora_kernels.segments import PAGE_RANK, TILE_TOKENS, LoRASegments
from lora_kernels.triton_shrink import sgmv_shrink_to_columns

_SHRINKERS = 3  # warps of a thread block that compute h
_MOST_PARTS = 16  # of the inputs, that warps share
_MOST_PIECES = 16384  # whose sums warps leave for each other


class _Adapters(ctypes.Structure):
    """nf4_adapters.cuh's struct of that name."""

    _fields_ = (
        ("h_map", ctypes.c_uint64 * 16),
        ("pages_map", ctypes.c_uint64 * 16),
        *((name, ctypes.c_void_p) for name in ("x", "a", "h", "order", "table", "page_ids", "sums", "progress")),
        *((name, ctypes.c_int) for name in ("stride_x", "slice_columns", "slices", "second", "third", "parts")),
        ("padding", ctypes.c_int * 10),
    )


def nf4_lora_matmul_cuda(
    x: Tensor,
    weight: NF4Tiles,
    bias: Tensor | None,
    a_pages: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    slice_widths: tuple[int, ...],
) -> Tensor | None:
    """`lora_kernels.nf4_lora.nf4_lora_matmul` in one launch; None where that does not fit."""
    plan = fused_plan(x, weight)
    if not isinstance(plan, WidePlan) or a_pages.dtype != x.dtype or not fuses(len(x), segments.most_pages):
        return None
    if len(slice_widths) > 3 or any(width % 64 for width in slice_widths[:-1]):  # a tile of rows is in one slice
        return None
    x = readable(x)
    if segments.routing.chunk_tokens > TILE_TOKENS:
        sgmv_shrink_to_columns(x, a_pages, segments, segments.columns(len(slice_widths), x.dtype))
    out = torch.empty((len(x), weight.shape[0]), dtype=x.dtype, device=x.device)
    launch_wide(plan, x, weight, bias, out, _adapters(plan, x, a_pages, b_pages, segments, slice_widths))
    return out


def _adapters(
    plan: WidePlan,
    x: Tensor,
    a_pages: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    slice_widths: tuple[int, ...],
) -> _Adapters:
    routing, num_slices = segments.routing, len(slice_widths)
    h = segments.columns(num_slices, x.dtype)
    second, third = (sum(slice_widths[: n + 1]) if n + 1 < num_slices else 1 << 30 for n in range(2))
    sums, progress = _scratch(x.device)
    return _Adapters(
        tensor_map(h.flatten(1), plan.tokens, PAGE_RANK),
        tensor_map(b_pages.flatten(0, 1), PAGE_RANK, 64),
        *(
            tensor.data_ptr()
            for tensor in (x, a_pages, h, routing.token_order, routing.table, routing.page_ids, sums, progress)
        ),
        x.stride(0),
        h.shape[2],
        num_slices,
        second,
        third,
        _num_parts(segments, num_slices, num_processors(x.device)),
    )


def _num_parts(segments: LoRASegments, num_slices: int, processors: int) -> int:
    """Into how many parts the inputs of a piece are cut, to occupy all warps."""
    routing = segments.routing
    if routing.chunk_tokens > TILE_TOKENS:
        return 0  # a launch before has computed them
    chunks = -(-segments.num_tokens // routing.chunk_tokens)
    most_rows = min(routing.most_rows, (chunks + segments.most_pages) * segments.max_pages)
    wanted = min(processors * _SHRINKERS // (chunks * num_slices), _MOST_PARTS)
    return max(min(wanted, _MOST_PIECES // (most_rows * num_slices)), 1)


@cache
def _scratch(device: torch.device) -> tuple[Tensor, Tensor]:
    """What thread blocks leave for each other: sums, or a pattern that says: nothing yet; and how far they are."""
    sums = torch.full((_MOST_PIECES * 256,), 0xFFFFFFFF, dtype=torch.uint32, device=device)
    return sums, torch.zeros(2, dtype=torch.int32, device=device)
