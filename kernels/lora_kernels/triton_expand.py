"""Triton kernel of `lora_kernels.sgmv.sgmv_expand`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.launch import launch
from lora_kernels.segments import LoRASegments
from lora_kernels.triton_routing import (
    LENGTH,
    MORE,
    NUM_CHUNKS,
    NUM_VECTORS,
    NUM_WARPS,
    OWN_RANK,
    PAGE,
    RANK,
    ROW_FIELDS,
    TOKEN,
    card,
    load_tokens,
    pass_on,
    wait,
    widen,
)


@triton.jit
def _expand_kernel(
    h_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    order_ptr,
    table_ptr,
    y_ptr,
    stride_plane,
    stride_token,
    stride_slice,
    stride_y,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILES_OUT: tl.constexpr,
    PAGES: tl.constexpr,
    PLANES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[tokens of the chunk, columns] += sum over its pages of f(h[tokens, slice, page]) B[page, :, columns].

    An item is a chunk of one token, which goes without the matrix unit, and VECTOR_OUT columns of one slice; or ROWS
    tokens of another chunk and TILES_OUT columns. No two items share an element of y.
    """
    VECTOR_TILES: tl.constexpr = (
        (WIDTH_0 + VECTOR_OUT - 1) // VECTOR_OUT
        + (WIDTH_1 + VECTOR_OUT - 1) // VECTOR_OUT
        + (WIDTH_2 + VECTOR_OUT - 1) // VECTOR_OUT
    )
    TILES: tl.constexpr = (
        (WIDTH_0 + TILES_OUT - 1) // TILES_OUT
        + (WIDTH_1 + TILES_OUT - 1) // TILES_OUT
        + (WIDTH_2 + TILES_OUT - 1) // TILES_OUT
    )
    pass_on(PDL)
    num_vectors = tl.load(table_ptr + NUM_VECTORS)
    vector_items = num_vectors * VECTOR_TILES
    items = vector_items + (tl.load(table_ptr + NUM_CHUNKS) - num_vectors) * (TILES * (CHUNK // ROWS))
    first_item = tl.program_id(0)
    step = tl.num_programs(0)
    # fmt: off
    for item in tl.range(first_item, vector_items, step, num_stages=1):
        _expand_vector(
            h_ptr, b_ptr, scale_ptr, bias_ptr, table_ptr, y_ptr, item // VECTOR_TILES, item % VECTOR_TILES,
            stride_plane, stride_token, stride_slice, stride_y,
            WIDTH_0, WIDTH_1, WIDTH_2, VECTOR_OUT, PLANES, ACTIVATION, HAS_BIAS, HAS_SCALES, PDL,
        )
    first_item += tl.cdiv(tl.maximum(vector_items - first_item, 0), step) * step
    for item in tl.range(first_item, items, step, num_stages=1):
        tile = item - vector_items
        row_ptr = table_ptr + (1 + num_vectors + tile // (TILES * (CHUNK // ROWS))) * ROW_FIELDS
        first_place = tile // TILES % (CHUNK // ROWS) * ROWS
        slice_id, begin, end = _columns(tile % TILES, TILES_OUT, WIDTH_0, WIDTH_1, WIDTH_2)
        own_rank = tl.load(row_ptr + OWN_RANK)
        if own_rank <= RANK:
            _expand_tiles(
                h_ptr, b_ptr, scale_ptr, bias_ptr, order_ptr, table_ptr, row_ptr, y_ptr, first_place, slice_id,
                begin, end, stride_plane, stride_token, stride_slice, stride_y, WIDTH_0, WIDTH_1, WIDTH_2,
                ROWS, TILE_OUT, TILES_OUT, 1, PLANES, ACTIVATION, HAS_BIAS, HAS_SCALES, PDL,
            )
        elif own_rank <= PAGES * RANK:
            _expand_tiles(
                h_ptr, b_ptr, scale_ptr, bias_ptr, order_ptr, table_ptr, row_ptr, y_ptr, first_place, slice_id,
                begin, end, stride_plane, stride_token, stride_slice, stride_y, WIDTH_0, WIDTH_1, WIDTH_2,
                ROWS, TILE_OUT, TILES_OUT, PAGES, PLANES, ACTIVATION, HAS_BIAS, HAS_SCALES, PDL,
            )
        else:
            for first in tl.range(begin, tl.minimum(begin + TILES_OUT, end), TILE_OUT, num_stages=1):
                _expand_tile(
                    h_ptr, b_ptr, scale_ptr, bias_ptr, order_ptr, table_ptr, row_ptr, y_ptr, first_place, slice_id,
                    first, end, stride_plane, stride_token, stride_slice, stride_y, WIDTH_0, WIDTH_1, WIDTH_2,
                    ROWS, TILE_OUT, PLANES, ACTIVATION, HAS_BIAS, HAS_SCALES, PDL,
                )
    # fmt: on
    wait(PDL)


@triton.jit
def _expand_vector(
    h_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    table_ptr,
    y_ptr,
    chunk,
    tile,
    stride_plane,
    stride_token,
    stride_slice,
    stride_y,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """The item of a chunk of one token."""
    NUM_SLICES: tl.constexpr = 1 + (WIDTH_1 > 0) + (WIDTH_2 > 0)
    OUT: tl.constexpr = WIDTH_0 + WIDTH_1 + WIDTH_2
    row_ptr = table_ptr + (1 + chunk) * ROW_FIELDS
    slice_id, begin, end = _columns(tile, BLOCK, WIDTH_0, WIDTH_1, WIDTH_2)
    own_rank = tl.load(row_ptr + OWN_RANK)
    token = tl.load(row_ptr + TOKEN).to(tl.int64)
    page = tl.load(row_ptr + PAGE).to(tl.int64)
    more_ptr = table_ptr + (1 + tl.load(row_ptr + MORE)) * ROW_FIELDS + PAGE
    rank = tl.arange(0, RANK)
    column = begin + tl.arange(0, BLOCK)
    if b_ptr.dtype.element_ty == tl.int8:
        # A thread loads so many, not 16, of which half of the threads would begin another rank.
        column = tl.max_contiguous(column, 8)
    column_ok = _inside_slice(column, end, BLOCK, WIDTH_0, WIDTH_1, WIDTH_2)
    plane = tl.arange(0, triton.next_power_of_2(PLANES))[:, None]
    h_rows = h_ptr + slice_id * stride_slice + token * stride_token + plane * stride_plane
    y_row = y_ptr + token * stride_y + column
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for nth in tl.range(0, tl.cdiv(own_rank, RANK), num_stages=1):
        if nth > 0:
            page = tl.load(more_ptr + (nth - 1) * ROW_FIELDS).to(tl.int64)
        b_ok = (rank + nth * RANK < own_rank)[:, None] & column_ok[None, :]
        b = tl.load(b_ptr + page * RANK * OUT + rank[:, None] * OUT + column[None, :], mask=b_ok, other=0.0)
        wait(PDL)
        y += tl.load(y_row, mask=column_ok & (nth == 0), other=0.0).to(tl.float32)
        planes = tl.load(h_rows + (rank + nth * RANK)[None, :], mask=plane < PLANES, other=0.0)
        at = (page * NUM_SLICES + slice_id) * RANK + rank
        h = _between(tl.sum(planes, 0), scale_ptr, bias_ptr, at, ACTIVATION, HAS_BIAS, HAS_SCALES)
        h = _rounded(h, b_ptr.dtype.element_ty, y_ptr.dtype.element_ty).to(tl.float32)
        y += tl.sum(widen(b) * h[:, None], 0)
    tl.store(y_row, y.to(y_ptr.dtype.element_ty), mask=column_ok)


@triton.jit
def _expand_tiles(
    h_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    order_ptr,
    table_ptr,
    row_ptr,
    y_ptr,
    first_place,
    slice_id,
    begin,
    end,
    stride_plane,
    stride_token,
    stride_slice,
    stride_y,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAGES: tl.constexpr,
    PLANES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Several tokens of an adapter of at most PAGES pages, and BLOCKS columns: BLOCK at a time on the matrix unit.

    h is read once, and the tiles of B are read ahead.
    """
    NUM_SLICES: tl.constexpr = 1 + (WIDTH_1 > 0) + (WIDTH_2 > 0)
    OUT: tl.constexpr = WIDTH_0 + WIDTH_1 + WIDTH_2
    length = tl.load(row_ptr + LENGTH)
    rank = tl.arange(0, PAGES * RANK)
    rank_ok = rank < tl.load(row_ptr + OWN_RANK)
    page = _pages(table_ptr, row_ptr, rank, rank_ok)
    place = first_place + tl.arange(0, ROWS)
    tokens = load_tokens(order_ptr, row_ptr, place, length)
    h_tile = h_ptr + slice_id * stride_slice + tokens[:, None] * stride_token + rank[None, :]
    wait(PDL)
    h = _sum_planes(h_tile, rank_ok, stride_plane, PLANES)
    at = (page * NUM_SLICES + slice_id) * RANK + rank % RANK
    h = _between(h, scale_ptr, bias_ptr, at[None, :], ACTIVATION, HAS_BIAS, HAS_SCALES)
    h = _rounded(h, b_ptr.dtype.element_ty, y_ptr.dtype.element_ty)
    b_rows = b_ptr + (page * RANK + rank % RANK)[:, None] * OUT
    for first in tl.range(begin, begin + BLOCKS, BLOCK, num_stages=3):
        column = first + tl.arange(0, BLOCK)
        column_ok = _inside_slice(column, end, BLOCKS, WIDTH_0, WIDTH_1, WIDTH_2)
        y_tile = y_ptr + tokens[:, None] * stride_y + column[None, :]
        y = tl.load(y_tile, mask=column_ok[None, :], other=0.0)
        b = tl.load(b_rows + column[None, :], mask=rank_ok[:, None] & column_ok[None, :], other=0.0)
        delta = tl.dot(h, b.to(h.dtype), input_precision="ieee")
        ok = (place < length)[:, None] & column_ok[None, :]
        tl.store(y_tile, (y.to(tl.float32) + delta).to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _expand_tile(
    h_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    order_ptr,
    table_ptr,
    row_ptr,
    y_ptr,
    first_place,
    slice_id,
    begin,
    end,
    stride_plane,
    stride_token,
    stride_slice,
    stride_y,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Several tokens of an adapter of any rank, and BLOCK columns: a page at a time on the matrix unit."""
    NUM_SLICES: tl.constexpr = 1 + (WIDTH_1 > 0) + (WIDTH_2 > 0)
    OUT: tl.constexpr = WIDTH_0 + WIDTH_1 + WIDTH_2
    length = tl.load(row_ptr + LENGTH)
    own_rank = tl.load(row_ptr + OWN_RANK)
    page = tl.load(row_ptr + PAGE).to(tl.int64)
    more_ptr = table_ptr + (1 + tl.load(row_ptr + MORE)) * ROW_FIELDS + PAGE
    rank = tl.arange(0, RANK)
    place = first_place + tl.arange(0, ROWS)
    tokens = load_tokens(order_ptr, row_ptr, place, length)
    column = begin + tl.arange(0, BLOCK)
    column_ok = _inside_slice(column, end, BLOCK, WIDTH_0, WIDTH_1, WIDTH_2)
    plane = tl.arange(0, triton.next_power_of_2(PLANES))[:, None, None]
    h_rows = h_ptr + slice_id * stride_slice + tokens[None, :, None] * stride_token + plane * stride_plane
    y_tile = y_ptr + tokens[:, None] * stride_y + column[None, :]
    b_tile = rank[:, None] * OUT + column[None, :]
    b_ok = (rank < own_rank)[:, None] & column_ok[None, :]
    b = tl.load(b_ptr + page * RANK * OUT + b_tile, mask=b_ok, other=0.0)
    wait(PDL)
    delta = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for nth in tl.range(0, tl.cdiv(own_rank, RANK), num_stages=1):
        # The next page's numbers are on their way while this one's are multiplied.
        next_ok = rank + (nth + 1) * RANK < own_rank
        next_page = tl.load(more_ptr + nth * ROW_FIELDS, mask=(nth + 1) * RANK < own_rank, other=0).to(tl.int64)
        next_b = tl.load(b_ptr + next_page * RANK * OUT + b_tile, mask=next_ok[:, None] & column_ok[None, :], other=0.0)
        planes = tl.load(h_rows + (rank + nth * RANK)[None, None, :], mask=plane < PLANES, other=0.0)
        at = (page * NUM_SLICES + slice_id) * RANK + rank[None, :]
        h = _between(tl.sum(planes, 0), scale_ptr, bias_ptr, at, ACTIVATION, HAS_BIAS, HAS_SCALES)
        h = _rounded(h, b_ptr.dtype.element_ty, y_ptr.dtype.element_ty)
        delta = tl.dot(h, b.to(h.dtype), delta, input_precision="ieee")
        b, page = next_b, next_page
    y = tl.load(y_tile, mask=column_ok[None, :], other=0.0)
    ok = (place < length)[:, None] & column_ok[None, :]
    tl.store(y_tile, (y.to(tl.float32) + delta).to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _pages(table_ptr, row_ptr, rank, rank_ok):
    """The page that each of these ranks of a chunk's adapter is on; its first where the adapter has no such rank."""
    nth = rank // RANK
    is_behind = rank_ok & (nth > 0)
    more_ptr = table_ptr + (tl.load(row_ptr + MORE) + nth) * ROW_FIELDS + PAGE
    more = tl.load(more_ptr, mask=is_behind, other=0)
    return tl.where(is_behind, more, tl.load(row_ptr + PAGE)).to(tl.int64)


@triton.jit
def _sum_planes(h_tile, rank_ok, stride_plane, PLANES: tl.constexpr):
    """h of a tile of tokens and ranks, zero where the adapter has no such rank: nothing was written there."""
    h = tl.load(h_tile, mask=rank_ok[None, :], other=0.0)
    for plane in tl.static_range(1, PLANES):
        h += tl.load(h_tile + plane * stride_plane, mask=rank_ok[None, :], other=0.0)
    return h


@triton.jit
def _inside_slice(
    column, end, BLOCK: tl.constexpr, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_2: tl.constexpr
):
    """column < end, known at compile time where the tiles end together with the slices."""
    ok = column < end
    if WIDTH_0 % BLOCK == 0 and WIDTH_1 % BLOCK == 0 and WIDTH_2 % BLOCK == 0:
        ok = tl.full(column.shape, True, tl.int1)
    return ok


@triton.jit
def _columns(tile, BLOCK: tl.constexpr, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_2: tl.constexpr):
    """The slice of a tile of columns, where the tile begins, and where its slice ends."""
    TILES_0: tl.constexpr = (WIDTH_0 + BLOCK - 1) // BLOCK
    TILES_1: tl.constexpr = TILES_0 + (WIDTH_1 + BLOCK - 1) // BLOCK
    slice_id = 0
    begin = tile * BLOCK
    end = WIDTH_0
    if tile >= TILES_1:
        slice_id = 2
        begin = WIDTH_0 + WIDTH_1 + (tile - TILES_1) * BLOCK
        end = WIDTH_0 + WIDTH_1 + WIDTH_2
    elif tile >= TILES_0:
        slice_id = 1
        begin = WIDTH_0 + (tile - TILES_0) * BLOCK
        end = WIDTH_0 + WIDTH_1
    return slice_id, begin, end


@triton.jit
def _between(h, scale_ptr, bias_ptr, at, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr):
    """activation(h + bias) times the scales of B's ranks."""
    if HAS_BIAS:
        h += tl.load(bias_ptr + at).to(tl.float32)
    if ACTIVATION == "relu":
        h = tl.maximum(h, 0.0)
    elif ACTIVATION == "gelu":
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "silu":
        h = h * tl.sigmoid(h)
    elif ACTIVATION == "tanh":
        h = 2.0 * tl.sigmoid(2.0 * h) - 1.0
    if HAS_SCALES:
        h *= tl.load(scale_ptr + at)
    return h


@triton.jit
def _rounded(h, b_dtype: tl.constexpr, y_dtype: tl.constexpr):
    """h in the dtype of the product: B's, or y's where B is in 8 bits."""
    dtype: tl.constexpr = y_dtype if b_dtype == tl.int8 else b_dtype
    return h.to(dtype)


@dataclass(frozen=True)
class _Expand:
    """vector_out, tile_out, tiles_out: the kernel's. programs: most a multiprocessor."""

    vector_out: int
    tile_out: int
    tiles_out: int
    programs: int
    registers: int


_PAGES = 4  # multiplied at once, of chunks of several tokens

# Found on one H200; no other card has been tuned, so that all run these.
_EXPAND_SHORT = _Expand(1024, 128, 512, 8, 128)
_EXPAND_LONG = _Expand(1024, 128, 512, 4, 128)
_EXPAND_FP32 = _Expand(512, 64, 64, 4, 255)


def _expand_config(y: Tensor, chunk_tokens: int) -> _Expand:
    if y.dtype == torch.float32:
        return _EXPAND_FP32
    return _EXPAND_LONG if chunk_tokens > 16 else _EXPAND_SHORT


def sgmv_expand_triton(
    h: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    y: Tensor,
    slice_widths: tuple[int, ...],
    b_scales: Tensor | None = None,
    bias_pages: Tensor | None = None,
    activation: str = "none",
) -> None:
    """`lora_kernels.sgmv.sgmv_expand`."""
    assert len(slice_widths) <= 3, "at most three linears are fused"
    routing = segments.routing
    config = _expand_config(y, routing.chunk_tokens)
    width_0, width_1, width_2 = (*slice_widths, 0, 0)[:3]
    rows = min(routing.chunk_tokens, 32)
    pdl, num_processors = card(y.device)
    tiles = sum(triton.cdiv(width, min(config.vector_out, config.tiles_out)) for width in slice_widths)
    items = routing.most_chunks * (routing.chunk_tokens // rows) * tiles
    launch(
        _expand_kernel,
        (min(items, config.programs * num_processors),),
        h,
        b_pages,
        b_scales,
        bias_pages,
        routing.token_order,
        routing.table,
        y,
        h.stride(0),
        h.stride(1),
        h.stride(2),
        y.stride(0),
        WIDTH_0=width_0,
        WIDTH_1=width_1,
        WIDTH_2=width_2,
        CHUNK=routing.chunk_tokens,
        ROWS=rows,
        VECTOR_OUT=config.vector_out,
        TILE_OUT=config.tile_out,
        TILES_OUT=config.tiles_out,
        PAGES=_PAGES,
        PLANES=h.shape[0],
        ACTIVATION=activation,
        HAS_BIAS=bias_pages is not None,
        HAS_SCALES=b_scales is not None,
        PDL=pdl,
        num_warps=NUM_WARPS,
        maxnreg=config.registers,
        launch_pdl=pdl,
    )
