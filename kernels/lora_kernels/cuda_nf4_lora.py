"""CUDA kernel behind `lora_kernels.nf4_lora`; imported on the first use on a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lora_kernels.cuda_nf4 import (
    fused_plan,
    is_hopper,
    launch_narrow,
    launch_wide,
    narrow_grid,
    num_processors,
    readable,
)
from lora_kernels.nf4 import NF4Tiles
from lora_kernels.nf4_lora import FEWEST_PAGES, FEWEST_ROWS, hides_shrink, most_fused_pages
from lora_kernels.nf4_plans import NarrowPlan, WidePlan
from lora_kernels.nvrtc import tensor_map
from lora_kernels.segments import PAGE_RANK, TILE_TOKENS, LoRASegments
from lora_kernels.triton_expand import sgmv_expand_triton
from lora_kernels.triton_shrink import sgmv_shrink_to_columns

_NOWHERE = 1 << 30
_SHRINKERS = 3  # warps of a thread block that compute h
_MOST_PARTS = 16  # of the inputs, that warps share
# nf4_few_adapters.cuh's MOST_PARTS, and the most WARPS whose sums leave room for h.
_MOST_FEW_PARTS, _MOST_FEW_WARPS = 32, 8
_MOST_PIECES = 16384  # whose sums warps leave for each other


class _FewAdapters(ctypes.Structure):
    """nf4_few_adapters.cuh's struct `Adapters`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "a_scales", "b_scales", "order", "table", "sums", "launches")),
        *((name, ctypes.c_int) for name in ("slices", "second", "third", "parts")),
    )


class _Adapters(ctypes.Structure):
    """nf4_adapters.cuh's struct of that name."""

    _fields_ = (
        ("h_map", ctypes.c_uint64 * 16),
        ("pages_map", ctypes.c_uint64 * 16),
        *((name, ctypes.c_void_p) for name in ("x", "a", "h", "order", "table", "page_ids")),
        *((name, ctypes.c_void_p) for name in ("sums", "progress", "planes", "scales")),
        *((name, ctypes.c_int) for name in ("stride_x", "slice_columns", "slices", "second", "third", "parts")),
        *((name, ctypes.c_int) for name in ("plane_stride", "ranks")),
        ("padding", ctypes.c_int * 4),
    )


def nf4_lora_matmul_cuda(
    x: Tensor,
    weight: NF4Tiles,
    bias: Tensor | None,
    a_pages: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    slice_widths: tuple[int, ...],
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
) -> Tensor | None:
    """`lora_kernels.nf4_lora.nf4_lora_matmul` with A x beside the base's product; None where that does not fit."""
    plan, num_slices = fused_plan(x, weight), len(slice_widths)
    if plan is None or not is_hopper(x.device) or a_pages.dtype not in (x.dtype, torch.int8):
        return None
    is_whole = num_slices <= 3 and not any(width % 64 for width in slice_widths[:-1])  # a tile is in one slice
    is_fused = is_whole and segments.most_pages <= most_fused_pages(len(x))
    if isinstance(plan, NarrowPlan):
        fits = plan.tokens == FEWEST_ROWS and plan.warps <= _MOST_FEW_WARPS
        # Where thread blocks finish several tiles of W each, waiting for B costs more than launches of their own.
        if not (is_fused and fits) or weight.tiles.shape[0] > num_processors(x.device):
            return None
        return _few_rows(plan, x, weight, bias, a_pages, b_pages, segments, slice_widths, a_scales, b_scales)
    in_columns = is_fused and a_scales is None
    if not in_columns and not hides_shrink(len(x), segments.most_pages, weight.shape[0], num_slices):
        return None
    x = readable(x)
    out = torch.empty((len(x), weight.shape[0]), dtype=x.dtype, device=x.device)
    adapters = _inputs(x, a_pages, segments)
    if in_columns:
        _set_columns(adapters, plan, x, a_pages, b_pages, segments, slice_widths)
        launch_wide(plan, x, weight, bias, out, adapters)
    else:
        h = _set_planes(adapters, a_pages, segments)
        adapters.scales = None if a_scales is None else a_scales.data_ptr()
        launch_wide(plan, x, weight, bias, out, adapters, a_pages.element_size())
        sgmv_expand_triton(h, b_pages, segments, out, slice_widths, b_scales)
    return out


def _few_rows(
    plan: NarrowPlan,
    x: Tensor,
    weight: NF4Tiles,
    bias: Tensor | None,
    a_pages: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    slice_widths: tuple[int, ...],
    a_scales: Tensor | None,
    b_scales: Tensor | None,
) -> Tensor:
    """By nf4.cu, which computes A x beside the base's product and adds B h to it."""
    plan = replace(plan, blocks=1)  # a second one would lack registers for the warp that computes h
    x, num_slices = readable(x), len(slice_widths)
    out = torch.empty((len(x), weight.shape[0]), dtype=x.dtype, device=x.device)
    sums, launches = _few_scratch(x.device)
    pieces = num_slices * min(len(x), segments.most_pages)  # of pages of one adapter a row: more take turns
    adapters = _FewAdapters(
        a=a_pages.data_ptr(),
        b=b_pages.data_ptr(),
        a_scales=None if a_scales is None else a_scales.data_ptr(),
        b_scales=None if b_scales is None else b_scales.data_ptr(),
        order=segments.routing.token_order.data_ptr(),
        table=segments.routing.table.data_ptr(),
        sums=sums.data_ptr(),
        launches=launches.data_ptr(),
        slices=num_slices,
        second=slice_widths[0] if num_slices > 1 else _NOWHERE,
        third=sum(slice_widths[:2]) if num_slices > 2 else _NOWHERE,
        parts=max(min(narrow_grid(plan, weight) // pieces, _MOST_FEW_PARTS), 1),
    )
    launch_narrow(plan, x, weight, bias, out, adapters, a_pages.element_size())
    return out


def _inputs(x: Tensor, a_pages: Tensor, segments: LoRASegments) -> _Adapters:
    routing, (sums, progress) = segments.routing, _scratch(x.device)
    return _Adapters(
        x=x.data_ptr(),
        a=a_pages.data_ptr(),
        order=routing.token_order.data_ptr(),
        table=routing.table.data_ptr(),
        page_ids=routing.page_ids.data_ptr(),
        sums=sums.data_ptr(),
        progress=progress.data_ptr(),
        stride_x=x.stride(0),
        slices=a_pages.shape[1],
    )


def _set_columns(
    adapters: _Adapters,
    plan: WidePlan,
    x: Tensor,
    a_pages: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    slice_widths: tuple[int, ...],
) -> None:
    """h and B as columns beside those of x and W."""
    h = segments.columns(len(slice_widths), x.dtype)
    if segments.routing.chunk_tokens > TILE_TOKENS:
        sgmv_shrink_to_columns(x, a_pages, segments, h)
    else:
        adapters.parts = _num_parts(segments, len(slice_widths), num_processors(x.device))
    adapters.h_map = tensor_map(h.flatten(1), plan.tokens, PAGE_RANK)
    adapters.pages_map = tensor_map(b_pages.flatten(0, 1), PAGE_RANK, 64)
    adapters.h, adapters.slice_columns = h.data_ptr(), h.shape[2]
    adapters.second = slice_widths[0] if len(slice_widths) > 1 else _NOWHERE
    adapters.third = sum(slice_widths[:2]) if len(slice_widths) > 2 else _NOWHERE


def _set_planes(adapters: _Adapters, a_pages: Tensor, segments: LoRASegments) -> Tensor:
    """h as `sgmv_shrink` returns it."""
    rows = min(segments.routing.most_rows, segments.num_tokens) * a_pages.shape[1]
    warps = num_processors(a_pages.device) * _SHRINKERS
    parts = min(range(1, 9), key=lambda parts: (-(-rows * parts // warps) / parts, parts))
    shape = (parts, segments.num_tokens, a_pages.shape[1], segments.max_pages * PAGE_RANK)
    h = torch.empty(shape, device=a_pages.device)
    adapters.planes, adapters.parts, adapters.plane_stride, adapters.ranks = h.data_ptr(), parts, h.stride(0), shape[3]
    return h


def _num_parts(segments: LoRASegments, num_slices: int, processors: int) -> int:
    """Into how many parts the inputs of a piece are cut, to occupy all warps."""
    chunks = -(-segments.num_tokens // TILE_TOKENS)
    most_rows = min(segments.routing.most_rows, (chunks + segments.most_pages) * segments.max_pages)
    wanted = min(processors * _SHRINKERS // (chunks * num_slices), _MOST_PARTS)
    return max(min(wanted, _MOST_PIECES // (most_rows * num_slices)), 1)


@cache
def _few_scratch(device: torch.device) -> tuple[Tensor, Tensor]:
    """What thread blocks of nf4.cu leave for each other: numbers beside those of their launches; the next launch's."""
    size = FEWEST_ROWS * FEWEST_PAGES * 3 * PAGE_RANK * _MOST_FEW_PARTS
    sums = torch.zeros(size, dtype=torch.int64, device=device)
    return sums, torch.tensor([1, 0], dtype=torch.int32, device=device)


@cache
def _scratch(device: torch.device) -> tuple[Tensor, Tensor]:
    """What thread blocks leave for each other: sums, or a pattern that says: nothing yet; and how far they are."""
    sums = torch.full((_MOST_PIECES * 256,), 0xFFFFFFFF, dtype=torch.uint32, device=device)
    return sums, torch.zeros(2, dtype=torch.int32, device=device)
