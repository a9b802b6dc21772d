"""Triton kernels behind `lora_kernels.sgmv`; imported on the first use on a GPU.

Both walk `Routing.table` with a number of programs that does not depend on the routing, so that a CUDA graph can replay
them. They begin before the kernel in front ends (programmatic dependent launch) and read what it does not write before
they wait for it: the routing and the weights, and the expand y too, which is there before the shrink in front begins.
So nothing may write routing or weights in the kernel in front of a shrink, nor y in the one in front of an expand.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.segments import FIELDS, PAGE_RANK, LoRASegments

_RANK = tl.constexpr(PAGE_RANK)
_FIELDS = tl.constexpr(FIELDS)
# Columns of the table: of row 0, and of the rows after it.
_NUM_CHUNKS, _NUM_ROWS, _NUM_VECTORS, _NUM_VECTOR_ROWS = (tl.constexpr(column) for column in range(4))
_FIRST, _LENGTH, _OWN_RANK, _TOKEN, _PAGE, _NTH_PAGE, _MORE = (tl.constexpr(column) for column in range(7))


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
    num_chunks = tl.load(table_ptr + _NUM_CHUNKS)
    num_vectors = tl.load(table_ptr + _NUM_VECTORS)
    num_vector_rows = tl.load(table_ptr + _NUM_VECTOR_ROWS)
    num_tile_rows = tl.load(table_ptr + _NUM_ROWS) - num_vector_rows
    tile_items = num_tile_rows * (NUM_PLANES * NUM_GROUPS)
    for item in tl.range(tl.program_id(0), tile_items, tl.num_programs(0), num_stages=1):
        row = num_vectors + item // (NUM_PLANES * NUM_GROUPS)
        row = tl.where(row < num_chunks, row, row + num_vector_rows - num_vectors)
        # fmt: off
        _shrink_tile(
            x_ptr, a_ptr, scale_ptr, order_ptr, table_ptr + (1 + row) * _FIELDS, h_ptr, item % NUM_PLANES,
            item // NUM_PLANES % NUM_GROUPS * SLICES, stride_x, stride_plane, stride_token, stride_slice,
            IN, NUM_SLICES, SLICES, CHUNK, SPLIT_IN, TILE_IN, PARTS, HAS_SCALES, PDL,
        )
        # fmt: on
    if STREAMED:
        _wait_and_pass(PDL)
    vector_items = num_vector_rows * (NUM_PLANES * NUM_SLICES)
    for item in tl.range(tl.program_id(0), vector_items, tl.num_programs(0), num_stages=1 + STREAMED):
        plane = item % NUM_PLANES
        slice_id = item // NUM_PLANES % NUM_SLICES
        row = item // (NUM_PLANES * NUM_SLICES)
        row = tl.where(row < num_vectors, row, row + num_chunks - num_vectors)
        row_ptr = table_ptr + (1 + row) * _FIELDS
        token = tl.load(row_ptr + _TOKEN).to(tl.int64)
        first_row = (tl.load(row_ptr + _PAGE).to(tl.int64) * NUM_SLICES + slice_id) * _RANK
        rank = tl.arange(0, _RANK)
        nth_rank = rank + tl.load(row_ptr + _NTH_PAGE) * _RANK
        rank_ok = nth_rank < tl.load(row_ptr + _OWN_RANK)
        products = tl.zeros((_RANK, VECTOR_IN), dtype=tl.float32)
        for first in tl.static_range(0, SPLIT_IN, VECTOR_IN):
            column = plane * SPLIT_IN + first + tl.arange(0, VECTOR_IN)
            column_ok = _inside(column, IN, SPLIT_IN)
            a_tile = a_ptr + first_row * IN + rank[:, None] * IN + column[None, :]
            a = tl.load(a_tile, mask=rank_ok[:, None] & column_ok[None, :], other=0.0)
            if not STREAMED:
                _wait_and_pass(PDL)
            x = tl.load(x_ptr + token * stride_x + column, mask=column_ok, other=0.0)
            products += a.to(tl.float32) * x.to(tl.float32)[None, :]
        h = tl.sum(products, 1)
        if HAS_SCALES:
            h *= tl.load(scale_ptr + first_row + rank)
        h_row = h_ptr + plane * stride_plane + token * stride_token + slice_id * stride_slice
        tl.store(h_row + nth_rank, h)
    _wait_and_pass(PDL)


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
    length = tl.load(row_ptr + _LENGTH)
    place = tl.arange(0, CHUNK)
    tokens = _tokens(order_ptr, row_ptr, place, length)
    row = tl.arange(0, SLICES * _RANK)
    slice_id = first_slice + row // _RANK
    slice_ok = slice_id < NUM_SLICES
    nth_rank = tl.load(row_ptr + _NTH_PAGE) * _RANK + row % _RANK
    row_ok = slice_ok & (nth_rank < tl.load(row_ptr + _OWN_RANK))
    first_row = (tl.load(row_ptr + _PAGE).to(tl.int64) * NUM_SLICES + first_slice) * _RANK
    a_rows = a_ptr + first_row * IN
    begin = plane * SPLIT_IN
    if CHUNK <= 16:
        # One product a warp, over its part of the inputs: a short chain of dependent products.
        part = tl.arange(0, PARTS)[:, None] * (SPLIT_IN // PARTS)
        column = begin + part + tl.arange(0, SPLIT_IN // PARTS)[None, :]
        column_ok = _inside(column, IN, SPLIT_IN)
        a_ok = row_ok[None, None, :] & column_ok[:, :, None]
        a = tl.load(a_rows + row[None, None, :] * IN + column[:, :, None], mask=a_ok, other=0.0)
        _wait_and_pass(PDL)
        x_tile = x_ptr + tokens[None, :, None] * stride_x + column[:, None, :]
        x = tl.load(x_tile, mask=column_ok[:, None, :], other=0.0)
        h = tl.sum(tl.dot(x, a.to(x.dtype), input_precision="ieee"), 0)
    else:
        _wait_and_pass(PDL)
        h = tl.zeros((CHUNK, SLICES * _RANK), dtype=tl.float32)
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
    _pass(PDL)
    num_vectors = tl.load(table_ptr + _NUM_VECTORS)
    vector_items = num_vectors * VECTOR_TILES
    items = vector_items + (tl.load(table_ptr + _NUM_CHUNKS) - num_vectors) * (TILES * (CHUNK // ROWS))
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), num_stages=1):
        # fmt: off
        if item < vector_items:
            _expand_vector(
                h_ptr, b_ptr, scale_ptr, bias_ptr, table_ptr, y_ptr, item // VECTOR_TILES, item % VECTOR_TILES,
                stride_plane, stride_token, stride_slice, stride_y,
                WIDTH_0, WIDTH_1, WIDTH_2, VECTOR_OUT, PLANES, ACTIVATION, HAS_BIAS, HAS_SCALES, PDL,
            )
        else:
            tile = item - vector_items
            row_ptr = table_ptr + (1 + num_vectors + tile // (TILES * (CHUNK // ROWS))) * _FIELDS
            first_place = tile // TILES % (CHUNK // ROWS) * ROWS
            slice_id, begin, end = _columns(tile % TILES, TILES_OUT, WIDTH_0, WIDTH_1, WIDTH_2)
            if TILES_OUT > TILE_OUT and tl.load(row_ptr + _OWN_RANK) <= _RANK:
                _expand_tiles(
                    h_ptr, b_ptr, scale_ptr, bias_ptr, order_ptr, row_ptr, y_ptr, first_place, slice_id, begin, end,
                    stride_plane, stride_token, stride_slice, stride_y,
                    WIDTH_0, WIDTH_1, WIDTH_2, ROWS, TILE_OUT, TILES_OUT, PLANES, ACTIVATION, HAS_BIAS, HAS_SCALES, PDL,
                )
            else:
                for first in tl.range(begin, tl.minimum(begin + TILES_OUT, end), TILE_OUT, num_stages=1):
                    _expand_tile(
                        h_ptr, b_ptr, scale_ptr, bias_ptr, order_ptr, table_ptr, row_ptr, y_ptr, first_place, slice_id,
                        first, end, stride_plane, stride_token, stride_slice, stride_y,
                        WIDTH_0, WIDTH_1, WIDTH_2, ROWS, TILE_OUT, PLANES, ACTIVATION, HAS_BIAS, HAS_SCALES, PDL,
                    )
        # fmt: on
    _wait(PDL)


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
    row_ptr = table_ptr + (1 + chunk) * _FIELDS
    slice_id, begin, end = _columns(tile, BLOCK, WIDTH_0, WIDTH_1, WIDTH_2)
    own_rank = tl.load(row_ptr + _OWN_RANK)
    token = tl.load(row_ptr + _TOKEN).to(tl.int64)
    page = tl.load(row_ptr + _PAGE).to(tl.int64)
    more_ptr = table_ptr + (1 + tl.load(row_ptr + _MORE)) * _FIELDS + _PAGE
    rank = tl.arange(0, _RANK)
    column = begin + tl.arange(0, BLOCK)
    column_ok = _inside_slice(column, end, BLOCK, WIDTH_0, WIDTH_1, WIDTH_2)
    plane = tl.arange(0, triton.next_power_of_2(PLANES))[:, None]
    h_rows = h_ptr + slice_id * stride_slice + token * stride_token + plane * stride_plane
    y_row = y_ptr + token * stride_y + column
    y = tl.load(y_row, mask=column_ok, other=0.0).to(tl.float32)
    for nth in tl.range(0, tl.cdiv(own_rank, _RANK), num_stages=1):
        if nth > 0:
            page = tl.load(more_ptr + (nth - 1) * _FIELDS).to(tl.int64)
        b_ok = (rank + nth * _RANK < own_rank)[:, None] & column_ok[None, :]
        b = tl.load(b_ptr + page * _RANK * OUT + rank[:, None] * OUT + column[None, :], mask=b_ok, other=0.0)
        _wait(PDL)
        planes = tl.load(h_rows + (rank + nth * _RANK)[None, :], mask=plane < PLANES, other=0.0)
        at = (page * NUM_SLICES + slice_id) * _RANK + rank
        h = _between(tl.sum(planes, 0), scale_ptr, bias_ptr, at, ACTIVATION, HAS_BIAS, HAS_SCALES)
        h = _rounded(h, b_ptr.dtype.element_ty, y_ptr.dtype.element_ty).to(tl.float32)
        y += tl.sum(b.to(tl.float32) * h[:, None], 0)
    tl.store(y_row, y.to(y_ptr.dtype.element_ty), mask=column_ok)


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
    """Several tokens and BLOCK columns: a tile of the matrix unit."""
    NUM_SLICES: tl.constexpr = 1 + (WIDTH_1 > 0) + (WIDTH_2 > 0)
    OUT: tl.constexpr = WIDTH_0 + WIDTH_1 + WIDTH_2
    length = tl.load(row_ptr + _LENGTH)
    own_rank = tl.load(row_ptr + _OWN_RANK)
    page = tl.load(row_ptr + _PAGE).to(tl.int64)
    more_ptr = table_ptr + (1 + tl.load(row_ptr + _MORE)) * _FIELDS + _PAGE
    rank = tl.arange(0, _RANK)
    place = first_place + tl.arange(0, ROWS)
    tokens = _tokens(order_ptr, row_ptr, place, length)
    column = begin + tl.arange(0, BLOCK)
    column_ok = _inside_slice(column, end, BLOCK, WIDTH_0, WIDTH_1, WIDTH_2)
    plane = tl.arange(0, triton.next_power_of_2(PLANES))[:, None, None]
    h_rows = h_ptr + slice_id * stride_slice + tokens[None, :, None] * stride_token + plane * stride_plane
    y_tile = y_ptr + tokens[:, None] * stride_y + column[None, :]
    y = tl.load(y_tile, mask=column_ok[None, :], other=0.0)
    delta = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for nth in tl.range(0, tl.cdiv(own_rank, _RANK), num_stages=1):
        if nth > 0:
            page = tl.load(more_ptr + (nth - 1) * _FIELDS).to(tl.int64)
        b_ok = (rank + nth * _RANK < own_rank)[:, None] & column_ok[None, :]
        b = tl.load(b_ptr + page * _RANK * OUT + rank[:, None] * OUT + column[None, :], mask=b_ok, other=0.0)
        _wait(PDL)
        planes = tl.load(h_rows + (rank + nth * _RANK)[None, None, :], mask=plane < PLANES, other=0.0)
        at = (page * NUM_SLICES + slice_id) * _RANK + rank[None, :]
        h = _between(tl.sum(planes, 0), scale_ptr, bias_ptr, at, ACTIVATION, HAS_BIAS, HAS_SCALES)
        h = _rounded(h, b_ptr.dtype.element_ty, y_ptr.dtype.element_ty)
        delta = tl.dot(h, b.to(h.dtype), delta, input_precision="ieee")
    ok = (place < length)[:, None] & column_ok[None, :]
    tl.store(y_tile, (y.to(tl.float32) + delta).to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _expand_tiles(
    h_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    order_ptr,
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
    PLANES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """`_expand_tile` of BLOCKS columns and one page: h is read once, and the tiles are read ahead."""
    NUM_SLICES: tl.constexpr = 1 + (WIDTH_1 > 0) + (WIDTH_2 > 0)
    OUT: tl.constexpr = WIDTH_0 + WIDTH_1 + WIDTH_2
    length = tl.load(row_ptr + _LENGTH)
    rank = tl.arange(0, _RANK)
    rank_ok = rank < tl.load(row_ptr + _OWN_RANK)
    page = tl.load(row_ptr + _PAGE).to(tl.int64)
    place = first_place + tl.arange(0, ROWS)
    tokens = _tokens(order_ptr, row_ptr, place, length)
    plane = tl.arange(0, triton.next_power_of_2(PLANES))[:, None, None]
    h_rows = h_ptr + slice_id * stride_slice + tokens[None, :, None] * stride_token + plane * stride_plane
    _wait(PDL)
    planes = tl.load(h_rows + rank[None, None, :], mask=plane < PLANES, other=0.0)
    at = (page * NUM_SLICES + slice_id) * _RANK + rank[None, :]
    h = _between(tl.sum(planes, 0), scale_ptr, bias_ptr, at, ACTIVATION, HAS_BIAS, HAS_SCALES)
    h = _rounded(h, b_ptr.dtype.element_ty, y_ptr.dtype.element_ty)
    b_rows = b_ptr + page * _RANK * OUT + rank[:, None] * OUT
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
def _pass(PDL: tl.constexpr):
    """Let the kernel behind start; it waits for this one before it reads what this one writes."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait until the kernel in front has ended."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _wait_and_pass(PDL: tl.constexpr):
    """Both: the kernel behind may read what the one in front wrote as soon as it starts."""
    _wait(PDL)
    _pass(PDL)


@triton.jit
def _tokens(order_ptr, row_ptr, place, length):
    """The tokens of a chunk, int64; places beyond its length repeat its first token, so that loads need no mask."""
    tokens = tl.load(order_ptr + tl.load(row_ptr + _FIRST) + place, mask=place < length, other=0)
    return tl.where(place < length, tokens, tl.load(row_ptr + _TOKEN)).to(tl.int64)


@triton.jit
def _inside(column, IN: tl.constexpr, SPLIT_IN: tl.constexpr):
    """column < IN, known at compile time where the planes end together with the inputs."""
    ok = column < IN
    if IN % SPLIT_IN == 0:
        ok = tl.full(column.shape, True, tl.int1)
    return ok


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
class _Shrink:
    """split_in: inputs of a plane. vector_in, tile_in: inputs at a time. programs: most a multiprocessor."""

    split_in: int
    vector_in: int
    tile_in: int
    programs: int
    registers: int
    streamed: bool = False
    fuse_slices: bool = False


@dataclass(frozen=True)
class _Expand:
    """vector_out, tile_out, tiles_out: the kernel's. programs: most a multiprocessor."""

    vector_out: int
    tile_out: int
    tiles_out: int
    programs: int
    registers: int


_NUM_WARPS = 4
# Found on one H200; no other card has been tuned, so that all run these.
_SHRINK_FEW = _Shrink(512, 256, 128, 6, 80)
_SHRINK_MANY = _Shrink(512, 512, 128, 5, 96, streamed=True)
_SHRINK_LONG = _Shrink(2048, 512, 128, 2, 255, fuse_slices=True)
_SHRINK_FP32 = _Shrink(256, 64, 32, 4, 255)
_EXPAND_SHORT = _Expand(1024, 128, 512, 8, 128)
_EXPAND_LONG = _Expand(1024, 128, 512, 4, 128)
_EXPAND_FP32 = _Expand(512, 64, 64, 4, 255)
_FEW_ROWS = 64
_WIDE_IN = 8192  # from here on planes are twice as wide, so that the expand has fewer to add


def _shrink_config(x: Tensor, chunk_tokens: int) -> _Shrink:
    if x.dtype == torch.float32:
        return _SHRINK_FP32
    if chunk_tokens > 16:
        return _SHRINK_LONG
    return _SHRINK_FEW if len(x) <= _FEW_ROWS else _SHRINK_MANY


def _expand_config(y: Tensor, chunk_tokens: int) -> _Expand:
    if y.dtype == torch.float32:
        return _EXPAND_FP32
    return _EXPAND_LONG if chunk_tokens > 16 else _EXPAND_SHORT


def sgmv_shrink_triton(x: Tensor, a_pages: Tensor, segments: LoRASegments, a_scales: Tensor | None = None) -> Tensor:
    """`lora_kernels.sgmv.sgmv_shrink`."""
    routing, num_slices, in_features = segments.routing, a_pages.shape[1], a_pages.shape[3]
    config = _shrink_config(x, routing.chunk_tokens)
    wide = 2 if in_features > _WIDE_IN else 1
    split_in = config.split_in * wide
    num_planes = triton.cdiv(in_features, split_in)
    slices = triton.next_power_of_2(num_slices) if config.fuse_slices else 1
    if x.stride(1) != 1:
        x = x.contiguous()
    h = torch.empty((num_planes, x.shape[0], num_slices, segments.max_pages * PAGE_RANK), device=x.device)
    pdl, num_processors = _card(x.device)
    items = routing.most_rows * num_slices * num_planes
    _shrink_kernel[(min(items, config.programs * num_processors),)](
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
        PARTS=_NUM_WARPS,
        STREAMED=config.streamed,
        HAS_SCALES=a_scales is not None,
        PDL=pdl,
        num_warps=_NUM_WARPS,
        maxnreg=min(config.registers * wide, 128) if config.registers < 255 else 255,
        launch_pdl=pdl,
    )
    return h


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
    pdl, num_processors = _card(y.device)
    tiles = sum(triton.cdiv(width, min(config.vector_out, config.tiles_out)) for width in slice_widths)
    items = routing.most_chunks * (routing.chunk_tokens // rows) * tiles
    _expand_kernel[(min(items, config.programs * num_processors),)](
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
        PLANES=h.shape[0],
        ACTIVATION=activation,
        HAS_BIAS=bias_pages is not None,
        HAS_SCALES=b_scales is not None,
        PDL=pdl,
        num_warps=_NUM_WARPS,
        maxnreg=config.registers,
        launch_pdl=pdl,
    )


@cache
def _card(device: torch.device) -> tuple[bool, int]:
    """Whether a kernel may begin before the one in front ends (Hopper and later), and the multiprocessors."""
    if device.type == "cpu":  # the interpreter
        return False, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 9, properties.multi_processor_count
