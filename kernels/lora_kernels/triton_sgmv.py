"""Triton kernels behind `lora_kernels.sgmv`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.segments import CHUNK_HEADER, CHUNK_TOKENS, PAGE_RANK, LoRASegments

_CHUNK_HEADER = tl.constexpr(CHUNK_HEADER)


@triton.jit
def _shrink_kernel(
    x_ptr,
    a_ptr,
    order_ptr,
    chunks_ptr,
    h_ptr,
    in_features,
    num_slices,
    max_pages,
    stride_x,
    stride_a_page,
    stride_chunk,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """h[tokens of the chunk, slice, page's ranks] = x[tokens] A[page, slice]^T; one program a (chunk, page, slice).

    A chunk of one token is multiplied without the matrix unit, whose tile would be empty but for one row.
    """
    chunk_ptr = chunks_ptr + tl.program_id(0) * stride_chunk
    nth_page = tl.program_id(1)
    slice_id = tl.program_id(2)
    if nth_page >= tl.load(chunk_ptr + 2):
        return
    start = tl.load(chunk_ptr)
    length = tl.load(chunk_ptr + 1)
    page = tl.load(chunk_ptr + _CHUNK_HEADER + nth_page).to(tl.int64)
    rank = tl.arange(0, RANK)
    feature = tl.arange(0, BLOCK_IN)
    a_row = a_ptr + page * stride_a_page + (slice_id * RANK + rank) * in_features
    if length == 1:
        token = tl.load(order_ptr + start).to(tl.int64)
        products = tl.zeros((RANK, BLOCK_IN), dtype=tl.float32)
        for first in range(0, in_features, BLOCK_IN):
            column = first + feature
            column_ok = column < in_features
            x = tl.load(x_ptr + token * stride_x + column, mask=column_ok, other=0.0).to(tl.float32)
            a = tl.load(a_row[:, None] + column[None, :], mask=column_ok[None, :], other=0.0).to(tl.float32)
            products += a * x[None, :]
        tl.store(h_ptr + ((token * num_slices + slice_id) * max_pages + nth_page) * RANK + rank, tl.sum(products, 1))
    else:
        place = tl.arange(0, CHUNK)
        place_ok = place < length
        tokens = tl.load(order_ptr + start + place, mask=place_ok, other=0).to(tl.int64)
        x_row = x_ptr + tokens[:, None] * stride_x
        acc = tl.zeros((CHUNK, RANK), dtype=tl.float32)
        for first in range(0, in_features, BLOCK_IN):
            column = first + feature
            column_ok = column < in_features
            x = tl.load(x_row + column[None, :], mask=place_ok[:, None] & column_ok[None, :], other=0.0)
            a = tl.load(a_row[None, :] + column[:, None], mask=column_ok[:, None], other=0.0)
            acc = tl.dot(x, a, acc, input_precision="ieee")
        h = h_ptr + ((tokens * num_slices + slice_id) * max_pages + nth_page)[:, None] * RANK + rank[None, :]
        tl.store(h, acc, mask=place_ok[:, None])


@triton.jit
def _expand_kernel(
    h_ptr,
    b_ptr,
    order_ptr,
    chunks_ptr,
    slices_ptr,
    y_ptr,
    num_slices,
    max_pages,
    stride_y,
    stride_b_page,
    stride_b_rank,
    stride_chunk,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """y[tokens of the chunk, columns] += sum over its pages of h[tokens, slice, page] B[page, :, columns].

    One program a (chunk, tile of columns, slice). A token is in one chunk only, so no two programs share an element.
    A chunk of one token goes without the matrix unit, as in `_shrink_kernel`.
    """
    slice_id = tl.program_id(2)
    begin = tl.load(slices_ptr + slice_id)
    end = tl.load(slices_ptr + slice_id + 1)
    column = begin + tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    if begin + tl.program_id(1) * BLOCK_OUT >= end:
        return
    chunk_ptr = chunks_ptr + tl.program_id(0) * stride_chunk
    start = tl.load(chunk_ptr)
    length = tl.load(chunk_ptr + 1)
    num_pages = tl.load(chunk_ptr + 2)
    if num_pages == 0:
        return
    rank = tl.arange(0, RANK)
    column_ok = column < end
    b_column = b_ptr + rank[:, None] * stride_b_rank + column[None, :]
    if length == 1:
        token = tl.load(order_ptr + start).to(tl.int64)
        y = y_ptr + token * stride_y + column
        row = tl.load(y, mask=column_ok, other=0.0).to(tl.float32)
        h_row = h_ptr + (token * num_slices + slice_id) * (max_pages * RANK) + rank
        for nth_page in range(num_pages):
            page = tl.load(chunk_ptr + _CHUNK_HEADER + nth_page).to(tl.int64)
            h = tl.load(h_row + nth_page * RANK).to(b_ptr.dtype.element_ty).to(tl.float32)
            b = tl.load(b_column + page * stride_b_page, mask=column_ok[None, :], other=0.0).to(tl.float32)
            row += tl.sum(b * h[:, None], 0)
        tl.store(y, row.to(y_ptr.dtype.element_ty), mask=column_ok)
    else:
        place = tl.arange(0, CHUNK)
        place_ok = place < length
        tokens = tl.load(order_ptr + start + place, mask=place_ok, other=0).to(tl.int64)
        h_rows = h_ptr + (tokens * num_slices + slice_id)[:, None] * (max_pages * RANK) + rank[None, :]
        acc = tl.zeros((CHUNK, BLOCK_OUT), dtype=tl.float32)
        for nth_page in range(num_pages):
            page = tl.load(chunk_ptr + _CHUNK_HEADER + nth_page).to(tl.int64)
            h = tl.load(h_rows + nth_page * RANK, mask=place_ok[:, None], other=0.0).to(b_ptr.dtype.element_ty)
            b = tl.load(b_column + page * stride_b_page, mask=column_ok[None, :], other=0.0)
            acc = tl.dot(h, b, acc, input_precision="ieee")
        tile = y_ptr + tokens[:, None] * stride_y + column[None, :]
        tile_ok = place_ok[:, None] & column_ok[None, :]
        acc += tl.load(tile, mask=tile_ok, other=0.0).to(tl.float32)
        tl.store(tile, acc.to(y_ptr.dtype.element_ty), mask=tile_ok)


def sgmv_shrink_triton(x: Tensor, a_pages: Tensor, segments: LoRASegments) -> Tensor:
    """`lora_kernels.sgmv.sgmv_shrink`."""
    num_slices, in_features = a_pages.shape[1], a_pages.shape[3]
    if x.stride(1) != 1:
        x = x.contiguous()
    h = torch.zeros((x.shape[0], num_slices, segments.max_pages * PAGE_RANK), device=x.device)
    grid = (segments.chunks.shape[0], segments.max_pages, num_slices)
    _shrink_kernel[grid](
        x,
        a_pages,
        segments.token_order,
        segments.chunks,
        h,
        in_features,
        num_slices,
        segments.max_pages,
        x.stride(0),
        a_pages.stride(0),
        segments.chunks.stride(0),
        CHUNK=CHUNK_TOKENS,
        RANK=PAGE_RANK,
        BLOCK_IN=512 if x.dtype != torch.float32 else 64,
        num_warps=4,
        num_stages=3,
    )
    return h


def sgmv_expand_triton(
    h: Tensor, b_pages: Tensor, segments: LoRASegments, y: Tensor, slice_widths: tuple[int, ...]
) -> None:
    """`lora_kernels.sgmv.sgmv_expand`."""
    block_out = 256
    grid = (segments.chunks.shape[0], triton.cdiv(max(slice_widths), block_out), len(slice_widths))
    _expand_kernel[grid](
        h,
        b_pages,
        segments.token_order,
        segments.chunks,
        _slice_bounds(slice_widths, y.device),
        y,
        len(slice_widths),
        segments.max_pages,
        y.stride(0),
        b_pages.stride(0),
        b_pages.stride(1),
        segments.chunks.stride(0),
        CHUNK=CHUNK_TOKENS,
        RANK=PAGE_RANK,
        BLOCK_OUT=block_out,
        num_warps=4,
        num_stages=2,
    )


@cache
def _slice_bounds(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [num_slices + 1], where each slice's columns begin, and their end."""
    return torch.tensor([0, *widths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
