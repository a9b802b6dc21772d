"""Triton kernel behind `lora_kernels.invariant.invariant_attention`; imported on the first use on a GPU.

A token's result is a function of its own context alone: cut at multiples of a piece's length, which depends on how long
the context is, in tiles of keys from position zero, pieces taken together in their order. One kernel, compiled once,
runs decode rows and chunks of prompts, so that they cannot differ by how they were compiled either.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.attention import AttentionMetadata
from lora_kernels.launch import launch
from lora_kernels.layer_cache import LayerCache
from lora_kernels.triton_softmax import LOG2_E, PACKED, cache_offset, is_wide, soften

_ITEM_FIELDS = tl.constexpr(6)
_PIECE_KEYS = tl.constexpr(512)
_MOST_PIECES = tl.constexpr(16)  # of one context; those of longer ones are twice, four times, ... as long


@triton.jit
def _piece_len(context_len):
    """Keys of a piece. It changes from one multiple of 8,192 to the next token only: never within a tile of queries."""
    length = tl.zeros_like(context_len) + _PIECE_KEYS
    for _ in tl.static_range(16):
        length = tl.where(length * _MOST_PIECES < context_len, 2 * length, length)
    return length


@triton.jit
def _first_key(first_position, prefix, window, QUERIES: tl.constexpr, KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Where the keys of a tile of queries begin, a multiple of KEYS: the same for each of them by itself."""
    begin = tl.zeros_like(first_position)
    if HAS_WINDOW:
        aligned = first_position // QUERIES * QUERIES
        begin = tl.where(prefix > 0, 0, tl.maximum(aligned - window + 1, 0) // KEYS * KEYS)
    return begin


@triton.jit(do_not_specialize=("num_seqs",), do_not_specialize_on_alignment=PACKED)
def _items_kernel(
    context_len_ptr,
    prefix_len_ptr,
    query_start_ptr,
    items_ptr,
    arrived_ptr,
    num_seqs,
    window,
    NUM_KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SEQS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Lists what there is to do: each piece of a sequence with one query, each tile of QUERIES of a longer one.

    One program a sequence; the first also writes how many items there are. Tiles of queries are cut at multiples of
    QUERIES, which divides KEYS, so that the queries of a tile need the same tiles of keys.
    """
    seq = tl.program_id(0)
    index = tl.arange(0, SEQS)
    ok = index < num_seqs
    context = tl.load(context_len_ptr + index, mask=ok, other=0)
    start = tl.load(query_start_ptr + index, mask=ok, other=0)
    queries = tl.load(query_start_ptr + index + 1, mask=ok, other=0) - start
    prefix = tl.zeros_like(context)
    if prefix_len_ptr is not None:
        prefix = tl.load(prefix_len_ptr + index, mask=ok, other=0)
    first, last = tl.maximum(context - queries, 0), tl.maximum(context - 1, 0)
    piece_len = _piece_len(context)
    first_piece = _first_key(last, prefix, window, QUERIES, KEYS, HAS_WINDOW) // piece_len
    num_pieces = last // piece_len + 1 - first_piece
    num_tiles = last // QUERIES - first // QUERIES + 1
    counts = tl.where(ok, tl.where(queries == 1, num_pieces, num_tiles), 0)
    place = tl.sum(tl.where(index < seq, counts, 0), 0)
    own = index == seq
    count = tl.sum(tl.where(own, counts, 0), 0)
    is_row = tl.sum(tl.where(own, queries, 0), 0) == 1
    has_keys = tl.sum(tl.where(own, context, 0), 0) > 0
    first = tl.sum(tl.where(own, first, 0), 0)
    first_piece = tl.sum(tl.where(own, first_piece, 0), 0)
    prefix = tl.sum(tl.where(own, prefix, 0), 0)
    if seq == 0:
        tl.store(items_ptr, tl.sum(counts, 0))
    for begin in range(0, count, BLOCK):
        nth = begin + tl.arange(0, BLOCK)
        mask = nth < count
        position = tl.maximum((first // QUERIES + nth) * QUERIES, first)  # the first of a tile
        tile_piece_len = _piece_len(position + 1)
        tile_first = _first_key(position, prefix, window, QUERIES, KEYS, HAS_WINDOW) // tile_piece_len
        item = items_ptr + (1 + place + nth) * _ITEM_FIELDS
        tl.store(item, tl.zeros_like(nth) + seq, mask=mask)
        tl.store(item + 1, tl.where(is_row, 0, position - first), mask=mask)
        tl.store(item + 2, tl.where(is_row, first_piece + nth, tile_first), mask=mask)
        tl.store(
            item + 3,
            tl.where(is_row, first_piece + nth + has_keys.to(tl.int32), position // tile_piece_len + 1),
            mask=mask,
        )
        tl.store(item + 4, nth, mask=mask)
        tl.store(item + 5, tl.where(is_row, count, 1), mask=mask)
    head = tl.arange(0, HEADS)
    tl.store(arrived_ptr + seq * NUM_KV_HEADS + head, tl.zeros_like(head), mask=head < NUM_KV_HEADS)


@triton.jit(do_not_specialize=("stride_table",), do_not_specialize_on_alignment=PACKED)
def _attend_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    items_ptr,
    arrived_ptr,
    partial_ptr,
    peak_ptr,
    total_ptr,
    block_table_ptr,
    context_len_ptr,
    prefix_len_ptr,
    query_start_ptr,
    scale,
    window,
    stride_q,
    stride_q_head,
    stride_table,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """out = softmax(scale q K^T) V over the items of `_items_kernel`, whose rows are queries times heads of the group.

    Each piece has a softmax of its own, and they are taken together in their order: in registers by the program of a
    whole tile, through memory by the last to arrive of the programs that share a decode row.
    """
    kv_head = tl.program_id(0)
    row = tl.arange(0, QUERIES * GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    dim_ok = dim[None, :] < HEAD_DIM
    head = kv_head * GROUP_SIZE + row % GROUP
    for nth_item in tl.range(tl.program_id(1), tl.load(items_ptr), tl.num_programs(1), num_stages=1):
        item = items_ptr + (1 + nth_item) * _ITEM_FIELDS
        seq = tl.load(item)
        first_query = tl.load(item + 1)
        query_start = tl.load(query_start_ptr + seq)
        query_len = tl.load(query_start_ptr + seq + 1) - query_start
        context_len = tl.load(context_len_ptr + seq)
        prefix = tl.zeros_like(seq)
        if prefix_len_ptr is not None:
            prefix = tl.load(prefix_len_ptr + seq)
        first_position = context_len - query_len + first_query
        end = (first_position // QUERIES + 1) * QUERIES
        query = first_query + row // GROUP
        position = context_len - query_len + query
        row_ok = (query < query_len) & (position < end) & (row % GROUP < GROUP_SIZE)
        end = tl.minimum(end, context_len)
        place = (query_start + query).to(tl.int64)
        q_rows = q_ptr + place * stride_q + head * stride_q_head
        q = tl.load(q_rows[:, None] + dim[None, :], mask=row_ok[:, None] & dim_ok, other=0.0)

        peak = tl.full((QUERIES * GROUP,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((QUERIES * GROUP,), dtype=tl.float32)
        acc = tl.zeros((QUERIES * GROUP, BLOCK_DIM), dtype=tl.float32)
        piece_len = _piece_len(first_position + 1)
        first_key = _first_key(first_position, prefix, window, QUERIES, KEYS, HAS_WINDOW)
        table_ptr = block_table_ptr + seq.to(tl.int64) * stride_table
        for piece in tl.range(tl.load(item + 2), tl.load(item + 3), num_stages=1):
            own_peak = tl.full((QUERIES * GROUP,), float("-inf"), dtype=tl.float32)
            own_total = tl.zeros((QUERIES * GROUP,), dtype=tl.float32)
            own_acc = tl.zeros((QUERIES * GROUP, BLOCK_DIM), dtype=tl.float32)
            begin = tl.maximum(piece * piece_len, first_key)
            for start in tl.range(begin, tl.minimum((piece + 1) * piece_len, end), KEYS):
                key = start + tl.arange(0, KEYS)
                at = tl.minimum(key, context_len - 1)  # no load is masked by position; the scores are
                block = tl.load(table_ptr + at // BLOCK_SIZE).to(OFFSET)
                at = ((block * BLOCK_SIZE + at % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
                k = tl.load(k_cache_ptr + at[:, None] + dim[None, :], mask=dim_ok, other=0.0)
                v = tl.load(v_cache_ptr + at[:, None] + dim[None, :], mask=dim_ok, other=0.0)
                score = tl.dot(q, tl.trans(k), input_precision="ieee")
                seen = key[None, :] <= position[:, None]
                if HAS_WINDOW:
                    seen = seen & ((key[None, :] > position[:, None] - window) | (key[None, :] < prefix))
                score = tl.where(seen, score, float("-inf"))
                own_peak, own_total, own_acc, _ = soften(
                    score, v, None, own_peak, own_total, own_acc, own_acc, scale, q.dtype
                )
            peak, total, acc = _take_together(peak, total, acc, own_peak * scale, own_total, own_acc)

        nth, count = tl.load(item + 4), tl.load(item + 5)
        is_last = count == 1
        if count > 1:
            first_stat = (seq * _MOST_PIECES * NUM_KV_HEADS + kv_head) * GROUP
            stat = first_stat + nth * (NUM_KV_HEADS * GROUP) + row
            ok = row < GROUP_SIZE
            partial = partial_ptr + stat.to(tl.int64)[:, None] * BLOCK_DIM + dim[None, :]
            tl.store(peak_ptr + stat, peak, mask=ok)
            tl.store(total_ptr + stat, total, mask=ok)
            tl.store(partial, acc, mask=ok[:, None])
            tl.debug_barrier()  # every thread has stored before one says so
            arrived = arrived_ptr + seq * NUM_KV_HEADS + kv_head
            is_last = tl.atomic_add(arrived, 1) == count - 1
            if is_last:
                tl.store(arrived, 0)  # for the next layer
                peak = tl.full((QUERIES * GROUP,), float("-inf"), dtype=tl.float32)
                total = tl.zeros((QUERIES * GROUP,), dtype=tl.float32)
                acc = tl.zeros((QUERIES * GROUP, BLOCK_DIM), dtype=tl.float32)
                for other in tl.range(0, count, num_stages=1):  # read past the first-level cache
                    stat = first_stat + other * (NUM_KV_HEADS * GROUP) + row
                    partial = partial_ptr + stat.to(tl.int64)[:, None] * BLOCK_DIM + dim[None, :]
                    own_peak = tl.load(peak_ptr + stat, mask=ok, other=float("-inf"), cache_modifier=".cg")
                    own_total = tl.load(total_ptr + stat, mask=ok, other=0.0, cache_modifier=".cg")
                    own_acc = tl.load(partial, mask=ok[:, None], other=0.0, cache_modifier=".cg")
                    peak, total, acc = _take_together(peak, total, acc, own_peak, own_total, own_acc)
        if is_last:
            out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            to_out = out_ptr + (place * (NUM_KV_HEADS * GROUP_SIZE) + head)[:, None] * HEAD_DIM + dim[None, :]
            tl.store(to_out, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & dim_ok)


@triton.jit
def _take_together(peak, total, acc, own_peak, own_total, own_acc):
    """The softmax over what was taken together and one more piece; peaks are scaled. Exact for the first piece."""
    top = tl.maximum(peak, own_peak)
    base = tl.where(top == float("-inf"), 0.0, top)
    shrink, own_shrink = tl.exp2(peak - base), tl.exp2(own_peak - base)
    total = total * shrink + own_total * own_shrink
    return top, total, acc * shrink[:, None] + own_acc * own_shrink[:, None]


class _Config(NamedTuple):
    """Rows of a tile (queries times heads), keys a step, warps, pipeline stages."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


_CONFIG, _CONFIG_WIDE = _Config(64, 64, 4, 3), _Config(16, 32, 4, 2)
_PROGRAMS = 8  # a multiprocessor, at most: they take turns with items


def invariant_attention_triton(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, scale: float, sliding_window: int | None
) -> Tensor:
    """`lora_kernels.invariant.invariant_attention`."""
    num_kv_heads, head_dim = cache.k.shape[2:]
    group_size = q.shape[1] // num_kv_heads
    group, block_dim = triton.next_power_of_2(group_size), max(16, triton.next_power_of_2(head_dim))
    config = _CONFIG_WIDE if is_wide(q) else _CONFIG
    queries = max(1, config.rows // group)
    items, arrived = _items(meta, num_kv_heads, queries, config.keys, sliding_window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats = (len(meta.context_len), _MOST_PIECES.value, num_kv_heads, group)
    partial = torch.empty((*stats, block_dim), dtype=torch.float32, device=q.device)
    peak, total = torch.empty((2, *stats), dtype=torch.float32, device=q.device)
    programs = max(1, _PROGRAMS * _num_sms(q.device) // num_kv_heads)
    launch(
        _attend_kernel,
        (num_kv_heads, min(programs, len(items) - 1)),
        q,
        cache.k,
        cache.v,
        out,
        items,
        arrived,
        partial,
        peak,
        total,
        meta.block_table,
        meta.context_len,
        meta.prefix_len,
        meta.query_start,
        scale * LOG2_E,
        sliding_window or 0,
        q.stride(0),
        q.stride(1),
        meta.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=meta.block_size,
        QUERIES=queries,
        GROUP=group,
        BLOCK_DIM=block_dim,
        KEYS=config.keys,
        OFFSET=cache_offset(cache.k),
        HAS_WINDOW=sliding_window is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,  # else a decode row's and a tile's pieces might be taken together by other roundings
    )
    return out


def _items(
    meta: AttentionMetadata, num_kv_heads: int, queries: int, keys: int, window: int | None
) -> tuple[Tensor, ...]:
    """The step's items, found on the device so that a CUDA graph can replay it; once for all layers with this window.

    Returns int32 [1 + most, 6], whose first number is how many items there are; the others hold (sequence, first query,
    first piece, past the last, which item of its sequence, how many share the row). And int32 [num_seqs, num_kv_heads]
    zeros, which count the pieces of a decode row that are done.
    """
    key = (num_kv_heads, queries, window)
    if key not in meta.launches:
        device, num_seqs = meta.context_len.device, len(meta.context_len)
        most = sum(_MOST_PIECES.value if length == 1 else length // queries + 2 for length in meta.query_lens)
        items = torch.empty((1 + most, _ITEM_FIELDS.value), dtype=torch.int32, device=device)
        arrived = torch.empty((num_seqs, num_kv_heads), dtype=torch.int32, device=device)
        launch(
            _items_kernel,
            (num_seqs,),
            meta.context_len,
            meta.prefix_len,
            meta.query_start,
            items,
            arrived,
            num_seqs,
            window or 0,
            NUM_KV_HEADS=num_kv_heads,
            QUERIES=queries,
            KEYS=keys,
            SEQS=triton.next_power_of_2(num_seqs),
            HEADS=triton.next_power_of_2(num_kv_heads),
            BLOCK=64,
            HAS_WINDOW=window is not None,
        )
        meta.launches[key] = items, arrived
    return meta.launches[key]


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
