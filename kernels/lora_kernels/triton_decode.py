"""Triton kernels of the decode rows: contexts cut into pieces on the device (flash decoding)."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.attention import AttentionMetadata
from lora_kernels.launch import launch
from lora_kernels.layer_cache import LayerCache
from lora_kernels.triton_fp8 import in_pairs, split_queries
from lora_kernels.triton_softmax import LOG2_E, PACKED, cache_offset, is_wide, score_keys, soften, tile_width

_PIECE_FIELDS = tl.constexpr(5)
# What cutting a context is weighed with, in tiles of keys: a program's own time, and that of taking pieces together.
_PROGRAM_COST, _COMBINE_COST = tl.constexpr(2), tl.constexpr(2)


@triton.jit(do_not_specialize=("num_rows", "num_pieces"), do_not_specialize_on_alignment=PACKED)
def _plan_kernel(
    context_len_ptr,
    prefix_len_ptr,
    query_start_ptr,
    pieces_ptr,
    arrived_ptr,
    num_rows,
    num_pieces,
    window,
    TILE: tl.constexpr,
    WAVE: tl.constexpr,
    MOST: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Cut the n tiles of keys that a row sees into ceil(n / size) even pieces, at least one, and `num_pieces` in all.

    Of the sizes that cut the longest row into 1 to MOST, it takes the one with the least time: waves of programs times
    tiles a program, with what a program, and taking pieces together, costs beside. One program a row, and a last one
    for the pieces that no row needs, whose row is -1. A sequence of several queries, or none, is no row.
    """
    row = tl.program_id(0)
    index = tl.arange(0, ROWS)
    is_there = index < num_rows
    start = tl.load(query_start_ptr + index, mask=is_there, other=0)
    ok = tl.load(query_start_ptr + index + 1, mask=is_there, other=0) - start == 1
    length = tl.load(context_len_ptr + index, mask=ok, other=0)
    if HAS_WINDOW:
        prefix = tl.load(prefix_len_ptr + index, mask=ok, other=0) if prefix_len_ptr is not None else 0
        length = tl.minimum(length, prefix + window)
    tiles = tl.cdiv(length, TILE)
    empty = tl.sum((ok & (length == 0)).to(tl.int32), 0)
    longest = tl.max(tiles, 0)
    size = longest
    least = tl.cdiv(tl.sum(ok.to(tl.int32), 0) - empty, WAVE) * (longest + _PROGRAM_COST)
    for cut in range(2, tl.minimum(MOST, longest) + 1):
        candidate = tl.cdiv(longest, cut)
        total = tl.sum(tl.where(ok, tl.maximum(tl.cdiv(tiles, candidate), 1), 0), 0)
        time = tl.cdiv(total - empty, WAVE) * (candidate + _PROGRAM_COST) + _COMBINE_COST
        better = (time < least) & (total <= num_pieces)
        size = tl.where(better, candidate, size)
        least = tl.where(better, time, least)
    sizes = tl.maximum(tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, tl.maximum(size, 1)), 1)), 1)
    counts = tl.where(ok, tl.maximum(tl.cdiv(tiles, sizes), 1), 0)
    first = tl.sum(tl.where(index < row, counts, 0), 0)
    own = index == row
    count = tl.sum(tl.where(own, counts, 0), 0)
    length = tl.sum(tl.where(own, length, 0), 0)
    piece_len = tl.sum(tl.where(own, sizes, 0), 0) * TILE
    to_write = count if row < num_rows else num_pieces - first
    name = tl.where(row < num_rows, row, -1)
    for start in range(0, to_write, BLOCK_PIECES):
        piece = start + tl.arange(0, BLOCK_PIECES)
        mask = piece < to_write
        place = pieces_ptr + (first + piece) * _PIECE_FIELDS
        tl.store(place, tl.zeros_like(piece) + name, mask=mask)
        tl.store(place + 1, piece * piece_len, mask=mask)
        tl.store(place + 2, tl.minimum((piece + 1) * piece_len, length), mask=mask)
        tl.store(place + 3, tl.zeros_like(piece) + first, mask=mask)
        tl.store(place + 4, tl.zeros_like(piece) + count, mask=mask)
    head = tl.arange(0, BLOCK_HEADS)
    tl.store(arrived_ptr + row * NUM_KV_HEADS + head, tl.zeros_like(head), mask=head < NUM_KV_HEADS)


@triton.jit(do_not_specialize=("stride_table",), do_not_specialize_on_alignment=PACKED)
def _decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    scales_ptr,
    out_ptr,
    pieces_ptr,
    arrived_ptr,
    partial_ptr,
    peak_ptr,
    total_ptr,
    block_table_ptr,
    context_len_ptr,
    prefix_len_ptr,
    scale,
    window,
    stride_q,
    stride_q_head,
    stride_table,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """out = softmax(scale q K^T) V of one query a sequence, its context cut into pieces (flash decoding).

    One program a (piece, key-value head), its rows the heads of the group. A row's pieces leave their softmax open, in
    fp32; the one that comes last takes them together, in the order of the context whichever it is. fp8 pages (those
    with scales) are read in pairs: a product of queries' even elements and one of the odd ones.
    """
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)
    row = tl.load(pieces_ptr + piece * _PIECE_FIELDS)
    if row < 0:
        return
    begin = tl.load(pieces_ptr + piece * _PIECE_FIELDS + 1)
    end = tl.load(pieces_ptr + piece * _PIECE_FIELDS + 2)
    first = tl.load(pieces_ptr + piece * _PIECE_FIELDS + 3)
    count = tl.load(pieces_ptr + piece * _PIECE_FIELDS + 4)
    prefix, skipped = 0, 0
    if HAS_WINDOW:
        prefix = tl.load(prefix_len_ptr + row) if prefix_len_ptr is not None else 0
        skipped = tl.maximum(tl.load(context_len_ptr + row) - prefix - window, 0)  # between the prefix and the window
    head = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    q_offset = row.to(tl.int64) * stride_q + (kv_head * GROUP_SIZE + head) * stride_q_head
    dim_ok = dim[None, :] < HEAD_DIM
    tile_ok = (head[:, None] < GROUP_SIZE) & dim_ok
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=tile_ok, other=0.0)

    PACK: tl.constexpr = 1 if scales_ptr is None else 2  # elements that are read as one number
    q_odd, power = None, None
    if PACK == 2:
        q, q_odd, power = split_queries(q, scale, ROWS, BLOCK_DIM // 2)
        scale = 1.0  # is in the powers
        k_cache_ptr, v_cache_ptr, scales_ptr = in_pairs(k_cache_ptr, v_cache_ptr, scales_ptr)
    column = tl.arange(0, BLOCK_DIM // PACK)
    column_ok = column[None, :] < HEAD_DIM // PACK

    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DIM // PACK), dtype=tl.float32)
    acc_odd = acc
    table_ptr = block_table_ptr + row.to(tl.int64) * stride_table
    for start in range(begin, end, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        position = tl.minimum(key, end - 1)  # no load is masked by position; the scores are
        if HAS_WINDOW:
            position += tl.where(position >= prefix, skipped, 0)
        block = tl.load(table_ptr + position // BLOCK_SIZE).to(OFFSET)
        place = ((block * BLOCK_SIZE + position % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * (HEAD_DIM // PACK)
        k = tl.load(k_cache_ptr + place[:, None] + column[None, :], mask=column_ok, other=0)
        v = tl.load(v_cache_ptr + place[:, None] + column[None, :], mask=column_ok, other=0)
        scales = None
        if PACK == 2:
            scales = tl.load(scales_ptr + (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE)
        score = score_keys(q, q_odd, power, k, scales)
        score = tl.where(key[None, :] < end, score, float("-inf"))
        peak, total, acc, acc_odd = soften(score, v, scales, peak, total, acc, acc_odd, scale, q.dtype)

    if PACK == 2:
        acc = tl.interleave(acc, acc_odd)
    out_ptr += (row.to(tl.int64) * NUM_KV_HEADS + kv_head) * GROUP_SIZE * HEAD_DIM
    if count == 1:
        acc /= tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + head[:, None] * HEAD_DIM + dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=tile_ok)
    else:
        stat = (piece * NUM_KV_HEADS + kv_head) * GROUP + head
        ok = head < GROUP_SIZE
        tl.store(peak_ptr + stat, peak * scale, mask=ok)
        tl.store(total_ptr + stat, total, mask=ok)
        tl.store(partial_ptr + stat[:, None] * BLOCK_DIM + dim[None, :], acc, mask=ok[:, None])
        tl.debug_barrier()  # every thread has stored before one says so
        arrived_ptr += row * NUM_KV_HEADS + kv_head
        if tl.atomic_add(arrived_ptr, 1) == count - 1:
            tl.store(arrived_ptr, 0)  # for the next layer
            row_stat = (first * NUM_KV_HEADS + kv_head) * GROUP
            _combine(
                out_ptr,
                partial_ptr + row_stat * BLOCK_DIM,
                peak_ptr + row_stat,
                total_ptr + row_stat,
                count,
                NUM_KV_HEADS * GROUP,
                GROUP_SIZE,
                HEAD_DIM,
                GROUP,
                BLOCK_DIM,
                BLOCK_PIECES,
            )


@triton.jit
def _combine(
    out_ptr,
    partial_ptr,
    peak_ptr,
    total_ptr,
    count,
    STRIDE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    """out = sum_i 2^peak_i acc_i / sum_i 2^peak_i total_i over one row's pieces, read past the first-level cache."""
    head = tl.arange(0, GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    peak = tl.full((GROUP,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((GROUP,), dtype=tl.float32)
    acc = tl.zeros((GROUP, BLOCK_DIM), dtype=tl.float32)
    for start in range(0, count, BLOCK_PIECES):
        piece = start + tl.arange(0, BLOCK_PIECES)
        ok = (piece[:, None] < count) & (head[None, :] < GROUP_SIZE)
        stat = piece[:, None] * STRIDE + head[None, :]
        peaks = tl.load(peak_ptr + stat, mask=ok, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(total_ptr + stat, mask=ok, other=0.0, cache_modifier=".cg")
        place = partial_ptr + stat[:, :, None] * BLOCK_DIM + dim[None, None, :]
        partial = tl.load(place, mask=ok[:, :, None], other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # where the group is padded
        weight = tl.exp2(peaks - base[None, :])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weight * totals, 0)
        acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * partial, 0)
        peak = new_peak
    ok = (head[:, None] < GROUP_SIZE) & (dim[None, :] < HEAD_DIM)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + head[:, None] * HEAD_DIM + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=ok)


class _DecodeConfig(NamedTuple):
    """Keys a step, warps, pipeline stages, and how many such programs a multiprocessor holds."""

    keys: int
    num_warps: int
    num_stages: int
    programs: int


# fp8 tiles are half the bytes and take as long to work on: five stages fetch one while another is worked on.
_DECODE, _DECODE_FP8 = _DecodeConfig(64, 2, 3, 4), _DecodeConfig(64, 2, 5, 5)
_DECODE_WIDE = _DecodeConfig(32, 4, 2, 2)
_SPARE_WAVES = 4  # so many pieces more than rows can decode contexts be cut into
_MOST_PIECES = 64  # of one context: the last of them takes all together


def decode(
    q: Tensor, cache: LayerCache, out: Tensor, meta: AttentionMetadata, scale: float, window: int | None
) -> None:
    num_kv_heads, head_dim = cache.k.shape[2:]
    group_size = q.shape[1] // num_kv_heads
    group, block_dim = triton.next_power_of_2(group_size), tile_width(cache)
    config = _DECODE_WIDE if is_wide(q) else _DECODE_FP8 if cache.scales is not None else _DECODE
    pieces, arrived = _decode_plan(meta, num_kv_heads, config, window)
    partial = torch.empty((len(pieces), num_kv_heads, group, block_dim), dtype=torch.float32, device=q.device)
    peak, total = torch.empty((2, *partial.shape[:-1]), dtype=torch.float32, device=q.device)
    launch(
        _decode_kernel,
        (num_kv_heads, len(pieces)),
        q,
        *cache,
        out,
        pieces,
        arrived,
        partial,
        peak,
        total,
        meta.block_table,
        meta.context_len,
        meta.prefix_len,
        scale * LOG2_E,
        window or 0,
        q.stride(0),
        q.stride(1),
        meta.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=meta.block_size,
        ROWS=max(16, group),
        GROUP=group,
        BLOCK_DIM=block_dim,
        BLOCK_KEYS=config.keys,
        BLOCK_PIECES=max(1, 8192 // (group * block_dim)),
        OFFSET=cache_offset(cache.k),
        HAS_WINDOW=window is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _decode_plan(
    meta: AttentionMetadata, num_kv_heads: int, config: _DecodeConfig, window: int | None
) -> tuple[Tensor, ...]:
    """How the decode rows' contexts are cut into pieces, found on the device so that a CUDA graph can replay it.

    Returns pieces, int32 [num_pieces, 5]: row (-1: no piece), begin and end among the positions that the row's query
    sees, the row's first piece and how many it has; and int32 [num_decodes + 1, num_kv_heads] zeros, which count the
    pieces that are done.
    """
    key = (num_kv_heads, window)
    if key not in meta.launches:
        device, num_rows = meta.context_len.device, meta.num_decodes
        wave = max(1, config.programs * _num_sms(device) // num_kv_heads)
        pieces = torch.empty((num_rows + _SPARE_WAVES * wave, _PIECE_FIELDS.value), dtype=torch.int32, device=device)
        arrived = torch.empty((num_rows + 1, num_kv_heads), dtype=torch.int32, device=device)
        launch(
            _plan_kernel,
            (num_rows + 1,),
            meta.context_len,
            meta.prefix_len,
            meta.query_start,
            pieces,
            arrived,
            num_rows,
            len(pieces),
            window or 0,
            TILE=config.keys,
            WAVE=wave,
            MOST=_MOST_PIECES,
            NUM_KV_HEADS=num_kv_heads,
            ROWS=triton.next_power_of_2(num_rows),
            BLOCK_PIECES=_MOST_PIECES,
            BLOCK_HEADS=triton.next_power_of_2(num_kv_heads),
            HAS_WINDOW=window is not None,
        )
        meta.launches[key] = pieces, arrived
    return meta.launches[key]


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
