"""Triton kernel of `lora_kernels.sgmv.sgmv_shrink`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.launch import launch
from lora_kernels.segments import PAGE_RANK, LoRASegments
from lora_kernels.triton_routing import (
    COLUMN,
    LENGTH,
    NTH_PAGE,
    NUM_CHUNKS,
    NUM_ROWS,
    NUM_VECTOR_ROWS,
    NUM_VECTORS,
    NUM_WARPS,
    OWN_RANK,
    PAGE,
    RANK,
    ROW_FIELDS,
    TOKEN,
    card,
    load_tokens,
    wait_and_pass,
    widen,
)


@triton.jit
def _shrink_kernel(
    x_ptr,
    a_ptr,
    scale_ptr,
    order_ptr,
    table_ptr,
    h_ptr,
    stride_x,
    stride_plane,
    stride_token,
    stride_slice,
    IN: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT_IN: tl.constexpr,
    VECTOR_IN: tl.constexpr,
    TILE_IN: tl.constexpr,
    PARTS: tl.constexpr,
    STREAMED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[plane, tokens, slice, page's ranks] = x[tokens, plane's inputs] A[page, slice, :, plane's inputs]^T.

    An item is a row of the table, a plane of SPLIT_IN inputs, and one slice, or SLICES of them for a chunk of several
    tokens. A chunk of one token is multiplied without the matrix unit, whose tile would be empty but for one row;
    STREAMED, a program reads ahead through these items, but nothing before waiting for the kernel in front.
    """
    NUM_PLANES: tl.constexpr = (IN + SPLIT_IN - 1) // SPLIT_IN
    NUM_GROUPS: tl.constexpr = (NUM_SLICES + SLICES - 1) // SLICES
    num_chunks = tl.load(table_ptr + NUM_CHUNKS)
    num_vectors = tl.load(table_ptr + NUM_VECTORS)
    num_vector_rows = tl.load(table_ptr + NUM_VECTOR_ROWS)
    num_tile_rows = tl.load(table_ptr + NUM_ROWS) - num_vector_rows
    tile_items = num_tile_rows * (NUM_PLANES * NUM_GROUPS)
    for item in tl.range(tl.program_id(0), tile_items, tl.num_programs(0), num_stages=1):
        row = num_vectors + item // (NUM_PLANES * NUM_GROUPS)
        row = tl.where(row < num_chunks, row, row + num_vector_rows - num_vectors)
        # fmt: off
        _shrink_tile(
            x_ptr, a_ptr, scale_ptr, order_ptr, table_ptr + (1 + row) * ROW_FIELDS, h_ptr, item % NUM_PLANES,
            item // NUM_PLANES % NUM_GROUPS * SLICES, stride_x, stride_plane, stride_token, stride_slice,
            IN, NUM_SLICES, SLICES, CHUNK, SPLIT_IN, TILE_IN, PARTS, HAS_SCALES, PDL,
        )
        # fmt: on
    if STREAMED:
        wait_and_pass(PDL)
    vector_items = num_vector_rows * (NUM_PLANES * NUM_SLICES)
    for item in tl.range(tl.program_id(0), vector_items, tl.num_programs(0), num_stages=1 + STREAMED):
        plane = item % NUM_PLANES
        slice_id = item // NUM_PLANES % NUM_SLICES
        row = item // (NUM_PLANES * NUM_SLICES)
        row = tl.where(row < num_vectors, row, row + num_chunks - num_vectors)
        row_ptr = table_ptr + (1 + row) * ROW_FIELDS
        token = tl.load(row_ptr + TOKEN).to(tl.int64)
        first_row = (tl.load(row_ptr + PAGE).to(tl.int64) * NUM_SLICES + slice_id) * RANK
        rank = tl.arange(0, RANK)
        nth_rank = rank + tl.load(row_ptr + NTH_PAGE) * RANK
        rank_ok = nth_rank < tl.load(row_ptr + OWN_RANK)
        products = tl.zeros((RANK, VECTOR_IN), dtype=tl.float32)
        for first in tl.static_range(0, SPLIT_IN, VECTOR_IN):
            column = plane * SPLIT_IN + first + tl.arange(0, VECTOR_IN)
            column_ok = _inside(column, IN, SPLIT_IN)
            a_tile = a_ptr + first_row * IN + rank[:, None] * IN + column[None, :]
            a = tl.load(a_tile, mask=rank_ok[:, None] & column_ok[None, :], other=0.0)
            if not STREAMED:
                wait_and_pass(PDL)
            x = tl.load(x_ptr + token * stride_x + column, mask=column_ok, other=0.0)
            products += widen(a) * x.to(tl.float32)[None, :]
        h = tl.sum(products, 1)
        if HAS_SCALES:
            h *= tl.load(scale_ptr + first_row + rank)
        h_row = h_ptr + plane * stride_plane + token * stride_token + slice_id * stride_slice
        tl.store(h_row + nth_rank, h)
    wait_and_pass(PDL)


@triton.jit
def _shrink_tile(
    x_ptr,
    a_ptr,
    scale_ptr,
    order_ptr,
    row_ptr,
    h_ptr,
    plane,
    first_slice,
    stride_x,
    stride_plane,
    stride_token,
    stride_slice,
    IN: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT_IN: tl.constexpr,
    TILE_IN: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """The item of a chunk of several tokens: a tile of the matrix unit."""
    length = tl.load(row_ptr + LENGTH)
    place = tl.arange(0, CHUNK)
    tokens = load_tokens(order_ptr, row_ptr, place, length)
    row = tl.arange(0, SLICES * RANK)
    slice_id = first_slice + row // RANK
    slice_ok = slice_id < NUM_SLICES
    nth_rank = tl.load(row_ptr + NTH_PAGE) * RANK + row % RANK
    row_ok = slice_ok & (nth_rank < tl.load(row_ptr + OWN_RANK))
    first_row = (tl.load(row_ptr + PAGE).to(tl.int64) * NUM_SLICES + first_slice) * RANK
    a_rows = a_ptr + first_row * IN
    begin = plane * SPLIT_IN
    if CHUNK <= 16:
        # One product a warp, over its part of the inputs: a short chain of dependent products.
        part = tl.arange(0, PARTS)[:, None] * (SPLIT_IN // PARTS)
        column = begin + part + tl.arange(0, SPLIT_IN // PARTS)[None, :]
        column_ok = _inside(column, IN, SPLIT_IN)
        a_ok = row_ok[None, None, :] & column_ok[:, :, None]
        a = tl.load(a_rows + row[None, None, :] * IN + column[:, :, None], mask=a_ok, other=0.0)
        wait_and_pass(PDL)
        x_tile = x_ptr + tokens[None, :, None] * stride_x + column[:, None, :]
        x = tl.load(x_tile, mask=column_ok[:, None, :], other=0.0)
        h = tl.sum(tl.dot(x, a.to(x.dtype), input_precision="ieee"), 0)
    else:
        wait_and_pass(PDL)
        h = tl.zeros((CHUNK, SLICES * RANK), dtype=tl.float32)
        for first in tl.range(begin, begin + SPLIT_IN, TILE_IN, num_stages=3):
            column = first + tl.arange(0, TILE_IN)
            column_ok = _inside(column, IN, SPLIT_IN)
            x = tl.load(x_ptr + tokens[:, None] * stride_x + column[None, :], mask=column_ok[None, :], other=0.0)
            a_ok = row_ok[None, :] & column_ok[:, None]
            a = tl.load(a_rows + row[None, :] * IN + column[:, None], mask=a_ok, other=0.0)
            h = tl.dot(x, a.to(x.dtype), h, input_precision="ieee")
    if HAS_SCALES:
        h *= tl.load(scale_ptr + first_row + row, mask=row_ok, other=0.0)[None, :]
    h_tile = (
        h_ptr + plane * stride_plane + tokens[:, None] * stride_token + (slice_id * stride_slice + nth_rank)[None, :]
    )
    tl.store(h_tile, h, mask=(place < length)[:, None] & slice_ok[None, :])


@triton.jit
def _columns_kernel(
    h_ptr,
    order_ptr,
    table_ptr,
    out_ptr,
    stride_plane,
    stride_token,
    stride_slice,
    stride_out_token,
    stride_out_slice,
    NUM_SLICES: tl.constexpr,
    PLANES: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[tokens, slice, page's columns] = the sum of h[:, tokens, slice, page's ranks]; an item: a row and a slice."""
    wait_and_pass(PDL)
    items = tl.load(table_ptr + NUM_ROWS) * NUM_SLICES
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        row_ptr = table_ptr + (1 + item // NUM_SLICES) * ROW_FIELDS
        length, place = tl.load(row_ptr + LENGTH), tl.arange(0, CHUNK)
        tokens = load_tokens(order_ptr, row_ptr, place, length)[:, None]
        rank = tl.arange(0, RANK)[None, :]
        nth_rank = tl.load(row_ptr + NTH_PAGE) * RANK + rank
        ok = (place < length)[:, None] & (nth_rank < tl.load(row_ptr + OWN_RANK))
        slice_id = item % NUM_SLICES
        from_h = h_ptr + tokens * stride_token + slice_id * stride_slice + nth_rank
        h = tl.zeros((CHUNK, RANK), dtype=tl.float32)
        for plane in tl.static_range(PLANES):
            h += tl.load(from_h + plane * stride_plane, mask=ok, other=0.0)
        column = tl.load(row_ptr + COLUMN) * RANK + rank
        to_out = out_ptr + tokens * stride_out_token + slice_id * stride_out_slice + column
        tl.store(to_out, h.to(out_ptr.dtype.element_ty), mask=(place < length)[:, None])


@triton.jit
def _inside(column, IN: tl.constexpr, SPLIT_IN: tl.constexpr):
    """column < IN, known at compile time where the planes end together with the inputs."""
    ok = column < IN
    if IN % SPLIT_IN == 0:
        ok = tl.full(column.shape, True, tl.int1)
    return ok


@dataclass(frozen=True)
class _Shrink:
    """split_in: inputs of a plane. vector_in, tile_in: inputs at a time. programs: most a multiprocessor."""

    split_in: int
    vector_in: int
    tile_in: int
    programs: int
    registers: int
    streamed: bool = False
    fuse_slices: bool = False


# Found on one H200; no other card has been tuned, so that all run these.
_SHRINK_FEW = _Shrink(512, 256, 128, 6, 80)
_SHRINK_FEW_INT8 = _Shrink(512, 512, 128, 6, 80)
_SHRINK_MANY = _Shrink(512, 512, 128, 5, 96, streamed=True)
_SHRINK_LONG = _Shrink(2048, 512, 128, 2, 255, fuse_slices=True)
_SHRINK_FP32 = _Shrink(256, 64, 32, 4, 255)
_FEW_ROWS = 64
_WIDE_IN = 8192  # from here on planes are twice as wide, so that the expand has fewer to add


def _shrink_config(x: Tensor, a_pages: Tensor, segments: LoRASegments) -> _Shrink:
    if x.dtype == torch.float32:
        return _SHRINK_FP32
    if segments.routing.chunk_tokens > 16:
        return _SHRINK_LONG
    if len(x) > _FEW_ROWS and not segments.invariant:
        return _SHRINK_MANY
    return _SHRINK_FEW_INT8 if a_pages.dtype == torch.int8 else _SHRINK_FEW


def sgmv_shrink_triton(x: Tensor, a_pages: Tensor, segments: LoRASegments, a_scales: Tensor | None = None) -> Tensor:
    """`lora_kernels.sgmv.sgmv_shrink`."""
    routing, num_slices, in_features = segments.routing, a_pages.shape[1], a_pages.shape[3]
    config = _shrink_config(x, a_pages, segments)
    wide = 2 if in_features > _WIDE_IN else 1
    split_in = config.split_in * wide
    num_planes = triton.cdiv(in_features, split_in)
    slices = triton.next_power_of_2(num_slices) if config.fuse_slices else 1
    if x.stride(1) != 1:
        x = x.contiguous()
    h = torch.empty((num_planes, x.shape[0], num_slices, segments.max_pages * PAGE_RANK), device=x.device)
    pdl, num_processors = card(x.device)
    items = routing.most_rows * num_slices * num_planes
    launch(
        _shrink_kernel,
        (min(items, config.programs * num_processors),),
        x,
        a_pages,
        a_scales,
        routing.token_order,
        routing.table,
        h,
        x.stride(0),
        h.stride(0),
        h.stride(1),
        h.stride(2),
        IN=in_features,
        NUM_SLICES=num_slices,
        SLICES=slices,
        CHUNK=routing.chunk_tokens,
        SPLIT_IN=split_in,
        VECTOR_IN=config.vector_in,
        TILE_IN=config.tile_in,
        PARTS=NUM_WARPS,
        STREAMED=config.streamed,
        HAS_SCALES=a_scales is not None,
        PDL=pdl,
        num_warps=NUM_WARPS,
        maxnreg=min(config.registers * wide, 128) if config.registers < 255 else 255,
        launch_pdl=pdl,
    )
    return h


def sgmv_shrink_to_columns(x: Tensor, a_pages: Tensor, segments: LoRASegments, columns: Tensor) -> None:
    """Writes each row's A x, rounded, to its adapter's columns of [num_tokens, num_slices, columns]."""
    h, routing = sgmv_shrink_triton(x, a_pages, segments), segments.routing
    num_planes, _, num_slices, _ = h.shape
    pdl, num_processors = card(x.device)
    launch(
        _columns_kernel,
        (min(routing.most_rows * num_slices, 4 * num_processors),),
        h,
        routing.token_order,
        routing.table,
        columns,
        h.stride(0),
        h.stride(1),
        h.stride(2),
        columns.stride(0),
        columns.stride(1),
        NUM_SLICES=num_slices,
        PLANES=num_planes,
        CHUNK=routing.chunk_tokens,
        PDL=pdl,
        num_warps=NUM_WARPS,
        launch_pdl=pdl,
    )
