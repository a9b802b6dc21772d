"""Triton kernels behind `lora_kernels.attention` and `lora_kernels.kv_store`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.attention import AttentionMetadata

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _store_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    width,
    head_dim,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    BLOCK: tl.constexpr,
):
    """cache[slot[token]] = k[token], v[token]; one program a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    column = tl.arange(0, BLOCK)
    ok = column < width
    head, dim = column // head_dim, column % head_dim
    k = tl.load(k_ptr + token * stride_k + head * stride_k_head + dim, mask=ok)
    v = tl.load(v_ptr + token * stride_v + head * stride_v_head + dim, mask=ok)
    tl.store(k_cache_ptr + slot * width + column, k, mask=ok)
    tl.store(v_cache_ptr + slot * width + column, v, mask=ok)


@triton.jit
def _attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    block_table_ptr,
    context_len_ptr,
    query_start_ptr,
    first_seq,
    num_kv_heads,
    group_size,
    head_dim,
    block_size,
    scale,
    window,
    stride_q,
    stride_q_head,
    stride_table,
    BLOCK_QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """out = softmax(scale q K^T + causal mask) V with the running softmax of FlashAttention (arXiv 2205.14135).

    One program a (sequence, tile of queries, key-value head). The tile's rows are queries times the heads that share
    the key-value head, so that its pages are read once for all of them.
    """
    seq = first_seq + tl.program_id(0)
    kv_head = tl.program_id(2)
    query_start = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_start
    first_query = tl.program_id(1) * BLOCK_QUERIES
    if first_query >= query_len:
        return
    context_len = tl.load(context_len_ptr + seq)
    row = tl.arange(0, BLOCK_QUERIES * GROUP)
    query = first_query + row // GROUP
    head = kv_head * group_size + row % GROUP
    row_ok = (query < query_len) & (row % GROUP < group_size)
    position = context_len - query_len + query
    dim = tl.arange(0, HEAD_DIM)
    dim_ok = dim < head_dim
    q_offset = (query_start + query).to(tl.int64) * stride_q + head * stride_q_head
    tile_ok = row_ok[:, None] & dim_ok[None, :]
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=tile_ok, other=0.0)

    end = tl.minimum(context_len, context_len - query_len + first_query + BLOCK_QUERIES)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(0, context_len - query_len + first_query - window + 1) // BLOCK_KEYS * BLOCK_KEYS
    peak = tl.full((BLOCK_QUERIES * GROUP,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_QUERIES * GROUP,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_QUERIES * GROUP, HEAD_DIM), dtype=tl.float32)
    for start in range(begin, end, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        key_ok = key < end
        block = tl.load(block_table_ptr + seq * stride_table + key // block_size, mask=key_ok, other=0).to(tl.int64)
        place = ((block * block_size + key % block_size) * num_kv_heads + kv_head) * head_dim
        k = tl.load(k_cache_ptr + place[None, :] + dim[:, None], mask=dim_ok[:, None] & key_ok[None, :], other=0.0)
        v = tl.load(v_cache_ptr + place[:, None] + dim[None, :], mask=key_ok[:, None] & dim_ok[None, :], other=0.0)
        seen = key_ok[None, :] & (key[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        score = tl.dot(q, k, input_precision="ieee") * (scale * _LOG2_E)
        score = tl.where(seen, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        # A row that has seen no key yet keeps a peak of -inf; 0 in its place keeps the exponentials at 0, not NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_offset = ((query_start + query).to(tl.int64) * (num_kv_heads * group_size) + head) * head_dim
    tl.store(out_ptr + out_offset[:, None] + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=tile_ok)


def store_kv_triton(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`lora_kernels.kv_store.store_kv`; the last dimension of k and v must be contiguous."""
    num_tokens, num_heads, head_dim = k.shape
    width = num_heads * head_dim
    _store_kv_kernel[(num_tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        width,
        head_dim,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        BLOCK=triton.next_power_of_2(width),
    )


def paged_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float, sliding_window: int | None
) -> Tensor:
    """`lora_kernels.attention.paged_attention`: one launch for the decode rows, one for the longer sequences."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_seqs = len(meta.query_lens)
    if meta.num_decodes:
        _launch(q, k_cache, v_cache, out, meta, scale, sliding_window, range(meta.num_decodes), 1)
    if meta.num_decodes < num_seqs:
        seqs = range(meta.num_decodes, num_seqs)
        _launch(q, k_cache, v_cache, out, meta, scale, sliding_window, seqs, meta.max_query_len)
    return out


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    meta: AttentionMetadata,
    scale: float,
    window: int | None,
    seqs: range,
    max_query_len: int,
) -> None:
    num_kv_heads, head_dim = k_cache.shape[2:]
    group_size = q.shape[1] // num_kv_heads
    group = triton.next_power_of_2(group_size)
    num_rows = 16 if max_query_len == 1 else 64
    block_queries = max(1, num_rows // group)
    _attention_kernel[(len(seqs), triton.cdiv(max_query_len, block_queries), num_kv_heads)](
        q,
        k_cache,
        v_cache,
        out,
        meta.block_table,
        meta.context_len,
        meta.query_start,
        seqs.start,
        num_kv_heads,
        group_size,
        head_dim,
        meta.block_size,
        scale,
        window or 0,
        q.stride(0),
        q.stride(1),
        meta.block_table.stride(0),
        BLOCK_QUERIES=block_queries,
        GROUP=group,
        BLOCK_KEYS=64 if q.dtype != torch.float32 else 32,
        HEAD_DIM=max(16, triton.next_power_of_2(head_dim)),
        HAS_WINDOW=window is not None,
        num_warps=4,
        num_stages=2,
    )
