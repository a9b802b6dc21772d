"""Triton kernel of the sequences with several new tokens: tiles of queries over pages of keys (FlashAttention)."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache
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


@triton.jit(do_not_specialize=("num_seqs", "num_decodes", "num_tiles"), do_not_specialize_on_alignment=PACKED)
def _tiles_kernel(
    context_len_ptr,
    query_start_ptr,
    tiles_ptr,
    num_seqs,
    num_decodes,
    num_tiles,
    QUERIES: tl.constexpr,
    SEQS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lists each tile of QUERIES of a sequence, (sequence, first query): the most keys first: the last are short.

    Sequences among the first `num_decodes` that have one query have none. One program a sequence, and a last one for
    the tiles that no sequence needs, whose sequence is -1.
    """
    seq = tl.program_id(0)
    index = tl.arange(0, SEQS)
    ok = index < num_seqs
    start = tl.load(query_start_ptr + index, mask=ok, other=0)
    queries = tl.load(query_start_ptr + index + 1, mask=ok, other=0) - start
    counts = tl.where((queries > 1) | (index >= num_decodes), tl.cdiv(queries, QUERIES), 0)
    first = tl.load(context_len_ptr + index, mask=ok, other=0) - queries  # position of the first query
    own = index == seq
    own_first = tl.sum(tl.where(own, first, 0), 0)
    is_seq = seq < num_seqs
    to_write = tl.sum(tl.where(own, counts, 0), 0) if is_seq else num_tiles - tl.sum(counts, 0)
    name = tl.where(is_seq, seq, -1)
    for begin in range(0, to_write, BLOCK):
        nth = begin + tl.arange(0, BLOCK)
        mask = nth < to_write
        # Of each sequence, the tiles at positions that come later, or are the same where it is an earlier sequence.
        distance = (own_first + nth * QUERIES)[:, None] - first[None, :] - (index < seq).to(tl.int32)[None, :]
        not_before = tl.maximum(distance + QUERIES, 0) // QUERIES
        before = tl.sum(tl.maximum(counts[None, :] - not_before, 0), 1)
        place = tl.where(is_seq, before, num_tiles - to_write + nth)
        tl.store(tiles_ptr + 2 * place, tl.zeros_like(nth) + name, mask=mask)
        tl.store(tiles_ptr + 2 * place + 1, nth * QUERIES, mask=mask)


@triton.jit
def _attend_keys(
    q,
    q_odd,
    power,
    position,
    peak,
    total,
    acc,
    acc_odd,
    begin,
    end,
    k_cache_ptr,
    v_cache_ptr,
    scales_ptr,
    table_ptr,
    kv_head,
    scale,
    window,
    prefix,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    OFFSET: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Take the keys from `begin` to `end` into a tile's running softmax; not MASKED: every query sees them all.

    begin: a multiple of BLOCK_SIZE, as BLOCK_KEYS is. fp8 pages (those with scales) are read in pairs of elements.
    """
    tl.static_assert(BLOCK_KEYS % BLOCK_SIZE == 0, "pages of 1, 2, 4, 8, 16 or 32 tokens")
    PACK: tl.constexpr = 1 if scales_ptr is None else 2  # elements that are read as one number
    column = tl.arange(0, BLOCK_DIM // PACK)
    column_ok = column[None, :] < HEAD_DIM // PACK
    page = tl.arange(0, BLOCK_KEYS) // BLOCK_SIZE
    in_page = ((tl.arange(0, BLOCK_KEYS) % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * (HEAD_DIM // PACK)
    for start in range(begin, end, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        index = start // BLOCK_SIZE + page
        if MASKED:
            index = tl.minimum(index, (end - 1) // BLOCK_SIZE)
        block = tl.load(table_ptr + index).to(OFFSET)
        place = block * (BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM // PACK) + in_page
        k = tl.load(k_cache_ptr + place[:, None] + column[None, :], mask=column_ok, other=0)
        # Behind the context's end lies what a block held before: scores are masked, but a weight of zero times a value
        # that is not finite is not zero.
        value_ok, scale_ok = column_ok, None
        if MASKED:
            scale_ok = key < end
            value_ok = column_ok & scale_ok[:, None]
        v = tl.load(v_cache_ptr + place[:, None] + column[None, :], mask=value_ok, other=0)
        scales = None
        if PACK == 2:
            at = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
            scales = tl.load(scales_ptr + at, mask=scale_ok)
        score = score_keys(q, q_odd, power, k, scales)
        if MASKED:
            seen = (key[None, :] < end) & (key[None, :] <= position[:, None])
            if HAS_WINDOW:
                seen = seen & ((key[None, :] > position[:, None] - window) | (key[None, :] < prefix))
            score = tl.where(seen, score, float("-inf"))
        peak, total, acc, acc_odd = soften(score, v, scales, peak, total, acc, acc_odd, scale, q.dtype)
    return peak, total, acc, acc_odd


@triton.jit(do_not_specialize=("stride_table",), do_not_specialize_on_alignment=PACKED)
def _prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    scales_ptr,
    out_ptr,
    tiles_ptr,
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
    BLOCK_QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """out = softmax(scale q K^T + causal mask) V; one program a (tile of one sequence's queries, key-value head).

    The tile's rows are queries times the heads that share the key-value head, so that its pages are read once for all.
    """
    kv_head = tl.program_id(0)
    seq = tl.load(tiles_ptr + 2 * tl.program_id(1))
    if seq < 0:
        return
    first_query = tl.load(tiles_ptr + 2 * tl.program_id(1) + 1)
    query_start = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_start
    context_len = tl.load(context_len_ptr + seq)
    row = tl.arange(0, BLOCK_QUERIES * GROUP)
    query = first_query + row // GROUP
    head = kv_head * GROUP_SIZE + row % GROUP
    dim = tl.arange(0, BLOCK_DIM)
    row_ok = (query < query_len) & (row % GROUP < GROUP_SIZE)
    tile_ok = row_ok[:, None] & (dim[None, :] < HEAD_DIM)
    q_offset = (query_start + query).to(tl.int64) * stride_q + head * stride_q_head
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=tile_ok, other=0.0)

    position = context_len - query_len + query
    first_position = context_len - query_len + first_query
    end = tl.minimum(context_len, first_position + BLOCK_QUERIES)
    table_ptr = block_table_ptr + seq.to(tl.int64) * stride_table
    peak = tl.full((BLOCK_QUERIES * GROUP,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_QUERIES * GROUP,), dtype=tl.float32)
    PACK: tl.constexpr = 1 if scales_ptr is None else 2
    acc = tl.zeros((BLOCK_QUERIES * GROUP, BLOCK_DIM // PACK), dtype=tl.float32)
    acc_odd, q_odd, power = acc, None, None
    if PACK == 2:
        q, q_odd, power = split_queries(q, scale, BLOCK_QUERIES * GROUP, BLOCK_DIM // 2)
        k_cache_ptr, v_cache_ptr, scales_ptr = in_pairs(k_cache_ptr, v_cache_ptr, scales_ptr)
    # First the keys that all queries see, or of a window's the prefix; then those that want a mask.
    prefix = 0
    if HAS_WINDOW:
        masked_from = tl.maximum(0, first_position - window + 1) // BLOCK_KEYS * BLOCK_KEYS
        if prefix_len_ptr is not None:
            prefix = tl.load(prefix_len_ptr + seq)
        first_end = tl.minimum(prefix, masked_from)
    else:
        masked_from = (first_position + 1) // BLOCK_KEYS * BLOCK_KEYS
        first_end = masked_from
    peak, total, acc, acc_odd = _attend_keys(
        q,
        q_odd,
        power,
        position,
        peak,
        total,
        acc,
        acc_odd,
        0,
        first_end,
        k_cache_ptr,
        v_cache_ptr,
        scales_ptr,
        table_ptr,
        kv_head,
        scale,
        window,
        prefix,
        NUM_KV_HEADS,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK_DIM,
        BLOCK_KEYS,
        OFFSET,
        HAS_WINDOW,
        HAS_WINDOW,
    )
    peak, total, acc, acc_odd = _attend_keys(
        q,
        q_odd,
        power,
        position,
        peak,
        total,
        acc,
        acc_odd,
        masked_from,
        end,
        k_cache_ptr,
        v_cache_ptr,
        scales_ptr,
        table_ptr,
        kv_head,
        scale,
        window,
        prefix,
        NUM_KV_HEADS,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK_DIM,
        BLOCK_KEYS,
        OFFSET,
        True,
        HAS_WINDOW,
    )
    if PACK == 2:
        acc = tl.interleave(acc, acc_odd)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_offset = ((query_start + query).to(tl.int64) * (NUM_KV_HEADS * GROUP_SIZE) + head) * HEAD_DIM
    tl.store(out_ptr + out_offset[:, None] + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=tile_ok)


class _PrefillConfig(NamedTuple):
    """Rows of a tile (queries times heads), keys a step, warps, pipeline stages and registers a thread at most."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# Within 128 registers two tiles share a multiprocessor, one's softmax under the other's products: on one H200 4,096
# tokens take 292 us, not 402.
_PREFILL, _PREFILL_HOPPER = _PrefillConfig(128, 64, 8, 3), _PrefillConfig(128, 64, 8, 2, 128)
# Taking fp8 apart wants registers: half the rows, so that two tiles still share one.
_PREFILL_HOPPER_FP8 = _PrefillConfig(64, 64, 4, 2)
_PREFILL_WIDE = _PrefillConfig(64, 32, 4, 2)
_FEW_SEQS = 128  # whose tiles are listed by one compiled kernel


def prefill(
    q: Tensor, cache: LayerCache, out: Tensor, meta: AttentionMetadata, scale: float, window: int | None
) -> None:
    num_kv_heads, head_dim = cache.k.shape[2:]
    group_size = q.shape[1] // num_kv_heads
    group = triton.next_power_of_2(group_size)
    config = _prefill_config(q, cache)
    block_queries = max(1, config.rows // group)
    tiles = _prefill_tiles(meta, block_queries)
    launch(
        _prefill_kernel,
        (num_kv_heads, len(tiles)),
        q,
        *cache,
        out,
        tiles,
        meta.block_table,
        meta.context_len,
        meta.prefix_len,
        meta.query_start,
        scale * LOG2_E,
        window or 0,
        q.stride(0),
        q.stride(1),
        meta.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=meta.block_size,
        BLOCK_QUERIES=block_queries,
        GROUP=group,
        BLOCK_DIM=tile_width(cache),
        BLOCK_KEYS=config.keys,
        OFFSET=cache_offset(cache.k),
        HAS_WINDOW=window is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )


def _prefill_tiles(meta: AttentionMetadata, queries: int) -> Tensor:
    """The step's tiles, int32 [num_tiles, 2], found on the device so that a CUDA graph can replay it; -1: no tile."""
    key = (queries,)
    if key not in meta.launches:
        # A sequence's last tile may be short.
        num_tiles, num_seqs = meta.longer_tokens // queries + meta.num_longer, len(meta.context_len)
        tiles = torch.empty((num_tiles, 2), dtype=torch.int32, device=meta.context_len.device)
        launch(
            _tiles_kernel,
            (num_seqs + 1,),
            meta.context_len,
            meta.query_start,
            tiles,
            num_seqs,
            meta.num_decodes,
            num_tiles,
            QUERIES=queries,
            SEQS=max(_FEW_SEQS, triton.next_power_of_2(num_seqs)),
            BLOCK=8,
        )
        meta.launches[key] = (tiles,)
    return meta.launches[key][0]


def _prefill_config(q: Tensor, cache: LayerCache) -> _PrefillConfig:
    if is_wide(q):
        return _PREFILL_WIDE
    if not _is_hopper(q.device):
        return _PREFILL
    return _PREFILL_HOPPER if cache.scales is None else _PREFILL_HOPPER_FP8


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
