"""Causal attention of ragged queries over a paged key-value cache, grouped heads, optional sliding window.

A sequence may begin with a prefix (prefix tuning): keys and values that all its queries see, whatever the window. They
come first in its block table, so that the token at position p sits at cache position prefix + p; lengths here count
cache positions. Without a window a prefix is a part of the context like any other, and costs nothing else.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.layer_cache import LayerCache

# Decode rows are gathered as one group up to this ratio of gathered blocks to used ones.
_MAX_PADDING = 1.5


@dataclass(frozen=True)
class DecodeGroup:
    """Decode rows of similar context length, attended in one batched call by the plain PyTorch path.

    rows: int64 [n] rows of q, or None when they are all rows of q. blocks: int32 [n * num_blocks] (0 beyond a row's).
    num_positions: cache positions gathered a row. context_lens: int32 [n, 1, 1, 1].
    prefix_lens: the same of the prefixes, or None without one in the step.
    mask: fp32 [n, 1, 1, num_positions], 0 on the context and -inf beyond it.
    newest: int64 [n], each row's last position. newest_slots: int64 [n], where that is in the cache.
    """

    rows: Tensor | None
    blocks: Tensor
    num_positions: int
    context_lens: Tensor
    prefix_lens: Tensor | None
    mask: Tensor
    newest: Tensor
    newest_slots: Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """One step's sequences, decode rows (one query) first; built once, shared by every layer.

    query_lens, context_lens, prefix_lens: host lists; a context counts its prefix and the tokens of this step.
    prefix_lens and prefix_len are None when no sequence has a prefix.
    num_decodes: how many sequences at the front have one query; at fixed addresses, how many there might have.
    num_longer, longer_tokens: how many others there are, and their queries; at fixed addresses the most.
    block_table: int32 [num_seqs, max_blocks] (0 beyond a sequence's blocks). context_len, prefix_len: int32 [num_seqs].
    query_start: int32 [num_seqs + 1], where each sequence's rows of q begin.
    launches: what the Triton kernels' programs are to do; filled by them in the first layer.
    gathered: the plain PyTorch path's buffers of decode rows' pages, by layer and group; filled by `_gather`, handed on
    from step to step. kept: whether they still hold the pages of these very rows, the newest token apart.
    """

    query_lens: list[int]
    context_lens: list[int]
    prefix_lens: list[int] | None
    block_size: int
    num_decodes: int
    num_longer: int
    longer_tokens: int
    max_query_len: int
    block_table: Tensor
    context_len: Tensor
    prefix_len: Tensor | None
    query_start: Tensor
    launches: dict[tuple[int | None, ...], tuple[Tensor, ...]]
    gathered: dict[tuple[int, int], Tensor]
    kept: bool

    @classmethod
    def build(
        cls,
        query_lens: list[int],
        context_lens: list[int],
        block_tables: list[list[int]],
        block_size: int,
        device: torch.device | str,
        previous: "AttentionMetadata | None" = None,
        prefix_lens: list[int] | None = None,
    ) -> "AttentionMetadata":
        """Packs one step's sequences and copies them to the device in one transfer.

        Decode rows come first (a sequence with one query elsewhere is right too, but slower). A block table may be
        longer than its context needs. `previous` is the step before over the same cache: it has run, and runs no more.
        """
        num_seqs = len(query_lens)
        used = [-(-context // block_size) for context in context_lens]
        max_blocks = max(used, default=0)
        packed = np.zeros(num_seqs * (max_blocks + 3) + 1, dtype=np.int32)
        ends = np.cumsum([num_seqs * max_blocks, num_seqs, num_seqs])
        table = packed[: ends[0]].reshape(num_seqs, max_blocks)
        filled = np.arange(max_blocks) < np.array(used, dtype=np.int32)[:, None]
        table[filled] = list(chain.from_iterable(map(_first, block_tables, used)))
        packed[ends[0] : ends[1]] = context_lens
        packed[ends[1] : ends[2]] = prefix_lens or 0
        packed[ends[2] :] = [0, *accumulate(query_lens)]
        on_device = torch.from_numpy(packed).to(device, non_blocking=True)
        num_decodes = next((i for i, n in enumerate(query_lens) if n > 1), num_seqs)
        return cls(
            query_lens=query_lens,
            context_lens=context_lens,
            prefix_lens=prefix_lens,
            block_size=block_size,
            num_decodes=num_decodes,
            num_longer=num_seqs - num_decodes,
            longer_tokens=sum(query_lens[num_decodes:]),
            max_query_len=max(query_lens, default=0),
            block_table=on_device[: ends[0]].view(num_seqs, max_blocks),
            context_len=on_device[ends[0] : ends[1]],
            prefix_len=None if prefix_lens is None else on_device[ends[1] : ends[2]],
            query_start=on_device[ends[2] :],
            launches={},
            gathered={} if previous is None else previous.gathered,
            kept=previous is not None and previous._grows_to(query_lens, context_lens, table),
        )

    @classmethod
    def fixed(
        cls,
        block_table: Tensor,
        context_len: Tensor,
        query_start: Tensor,
        block_size: int,
        prefix_len: Tensor | None = None,
        *,
        ragged: bool = False,
    ) -> "AttentionMetadata":
        """Sequences at fixed addresses, as many as rows of q, for kernels alone; filled in before a graph is replayed.

        Those of one query come first; one with a context of 0 attends to nothing and gives zeros. Where the step is
        `ragged`, longer ones come behind them, and then some without queries.
        """
        rows = len(context_len)
        return cls(
            query_lens=[1] * rows,
            context_lens=[0] * rows,
            prefix_lens=None,
            block_size=block_size,
            num_decodes=rows,
            num_longer=rows // 2 if ragged else 0,
            longer_tokens=rows if ragged else 0,
            max_query_len=1,
            block_table=block_table,
            context_len=context_len,
            prefix_len=prefix_len,
            query_start=query_start,
            launches={},
            gathered={},
            kept=False,
        )

    def _grows_to(self, query_lens: list[int], context_lens: list[int], table: np.ndarray) -> bool:
        """Whether the next step is this one with a token more in each row, and its pages were gathered.

        Equal tables then mean equal sequences: a block that changed hands in between would hold only this step's token
        of its new owner, as its first, and the table would be one block longer. Rows of one sequence lie one behind the
        other; each has written what the next one's pages hold.
        """
        return (
            bool(self.gathered)
            and self.max_query_len == 1
            and query_lens == self.query_lens
            and context_lens == [length + 1 for length in self.context_lens]
            and all(length % self.block_size for length in self.context_lens)  # a table's 0 may be padding or a block
            and np.array_equal(self.block_table.numpy(force=True), table)
            and not (table[1:] == table[:-1]).all(axis=1).any()
        )

    @cached_property
    def decode_groups(self) -> tuple[DecodeGroup, ...]:
        """The decode rows: one group when that pads little, else groups within a factor of two of each other."""
        used = [self.num_blocks(row) for row in range(self.num_decodes)]
        if not used:
            return ()
        if max(used) * len(used) <= _MAX_PADDING * sum(used):
            return (self._decode_group(list(range(len(used)))),)
        by_size: dict[int, list[int]] = {}
        for row, blocks in enumerate(used):
            by_size.setdefault(blocks.bit_length(), []).append(row)
        return tuple(self._decode_group(rows) for rows in by_size.values())

    @cached_property
    def prefill_masks(self) -> tuple[Tensor | None, ...]:
        """Causal mask, bool [query_len, context_len], of each sequence after the decode rows; None: a whole prompt."""
        return tuple(
            None if n == c else causal_mask(n, c, 0, None, self.context_len.device)
            for n, c in zip(self.query_lens[self.num_decodes :], self.context_lens[self.num_decodes :], strict=True)
        )

    def num_blocks(self, seq: int) -> int:
        """Blocks that the context of sequence `seq` fills."""
        return -(-self.context_lens[seq] // self.block_size)

    def _decode_group(self, rows: list[int]) -> DecodeGroup:
        device = self.context_len.device
        index = torch.tensor(rows, device=device)
        width = max(self.num_blocks(row) for row in rows)
        num_positions = width * self.block_size
        context_lens = self.context_len.index_select(0, index).view(-1, 1, 1, 1)
        mask = torch.zeros((len(rows), 1, 1, num_positions), device=device)
        mask.masked_fill_(torch.arange(num_positions, device=device) >= context_lens, float("-inf"))
        newest = context_lens.view(-1).long() - 1
        slots = self.block_table[index, newest // self.block_size] * self.block_size + newest % self.block_size
        return DecodeGroup(
            rows=None if len(rows) == sum(self.query_lens) else index,
            blocks=self.block_table[:, :width].index_select(0, index).view(-1),
            num_positions=num_positions,
            context_lens=context_lens,
            prefix_lens=None if self.prefix_len is None else self.prefix_len.index_select(0, index).view(-1, 1, 1, 1),
            mask=mask,
            newest=newest,
            newest_slots=slots,
        )


def _first(blocks: list[int], count: int) -> list[int]:
    return blocks[:count]


def causal_mask(query_len: int, context_len: int, prefix_len: int, window: int | None, device: torch.device) -> Tensor:
    """bool [query_len, context_len]: key j is seen from i iff j <= i and either j > i - window or j < prefix_len."""
    query = torch.arange(context_len - query_len, context_len, device=device).unsqueeze(1)
    key = torch.arange(context_len, device=device)
    mask = key <= query
    return mask if window is None else mask & ((key > query - window) | (key < prefix_len))


def paged_attention_ref(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, scale: float, sliding_window: int | None
) -> Tensor:
    """`paged_attention` in plain PyTorch: two batched products a group of decode rows, one SDPA a longer sequence."""
    out = torch.empty_like(q)
    for index, group in enumerate(meta.decode_groups):
        rows = q if group.rows is None else q.index_select(0, group.rows)
        pages = _gather(cache, meta, index, q.dtype)
        attended = _attend_decodes(rows, pages, group, scale, sliding_window)
        if group.rows is None:
            return attended
        out.index_copy_(0, group.rows, attended)
    start = meta.num_decodes
    for index in range(len(meta.query_lens) - meta.num_decodes):
        end = start + meta.query_lens[meta.num_decodes + index]
        out[start:end] = _attend_prefill(q[start:end], cache, meta, index, scale, sliding_window)
        start = end
    return out


def paged_attention(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, scale: float, sliding_window: int | None
) -> Tensor:
    """softmax(scale q k^T + causal mask) v for each sequence over its own pages.

    q: [num_tokens, num_heads, head_dim] fp32, bf16 or fp16, the sequences' rows one after the other as in `meta`.
    cache: pages in q's dtype or in fp8, which may hold anything behind a context's end; block_size is a power of two,
    up to 32, and num_heads a multiple of num_kv_heads. fp8 is multiplied in fp16 (q's in fp32), the scales beside it in
    fp32. The last query of a sequence sits at its context's last position. With `sliding_window` w a query sees itself,
    the w - 1 positions before it and its prefix.
    Returns [num_tokens, num_heads, head_dim]. Triton on a GPU, `paged_attention_ref` elsewhere.
    """
    if q.is_cuda:
        from lora_kernels.triton_attention import paged_attention_triton

        return paged_attention_triton(q, cache, meta, scale, sliding_window)
    return paged_attention_ref(q, cache, meta, scale, sliding_window)


def _gather(cache: LayerCache, meta: AttentionMetadata, index: int, dtype: torch.dtype) -> Tensor:
    """The keys and values of decode group `index`, head by head: [2, n, num_kv_heads, num_positions, head_dim].

    Pages kept from the step before only want the newest token; the price is that running rows' pages are held twice.
    With each head's keys in one piece, two batched products take two thirds of SDPA's time over the pages as they lie
    (32 rows of 192, 2 cores). Buffers are reused, with room to grow: fresh memory is faulted in page by page.
    """
    group, key = meta.decode_groups[index], (cache.k.data_ptr(), index)
    num_rows, (num_kv_heads, head_dim) = len(group.newest), cache.k.shape[2:]
    shape = (2, num_rows, num_kv_heads, group.num_positions, head_dim)
    buffer, numel = meta.gathered.get(key), math.prod(shape)
    if buffer is None or buffer.numel() < numel:
        buffer = meta.gathered[key] = cache.k.new_empty(numel + numel // 2, dtype=dtype)
    pages = buffer[:numel].view(shape)
    if not meta.kept:
        for part, gathered in zip(pages, cache.blocks(group.blocks, dtype), strict=True):
            part.copy_(gathered.view(num_rows, -1, num_kv_heads, head_dim).transpose(1, 2))
            part.masked_fill_(group.mask.transpose(2, 3) < 0, 0)  # what a block held before, finite or not
        return pages
    heads = torch.arange(num_rows * num_kv_heads, device=buffer.device).view(num_rows, num_kv_heads)
    places = (heads * group.num_positions + group.newest.unsqueeze(1)).view(-1)
    for part, newest in zip(pages, cache.tokens(group.newest_slots, dtype), strict=True):
        part.view(-1, head_dim).index_copy_(0, places, newest.view(-1, head_dim))
    return pages


def _attend_decodes(q: Tensor, pages: Tensor, group: DecodeGroup, scale: float, window: int | None) -> Tensor:
    num_rows, num_heads, head_dim = q.shape
    _, _, num_kv_heads, num_positions, _ = pages.shape
    k, v = pages.flatten(1, 2)  # [n * num_kv_heads, num_positions, head_dim]
    mask = group.mask
    if window is not None:
        key = torch.arange(group.num_positions, device=q.device)
        outside = key < group.context_lens - window
        if group.prefix_lens is not None:
            outside &= key >= group.prefix_lens
        mask = mask.masked_fill(outside, float("-inf"))
    scores = torch.bmm((q * scale).view(len(k), -1, head_dim), k.transpose(1, 2)).float()
    scores = scores.view(num_rows, num_kv_heads, -1, num_positions).add_(mask)
    attended = torch.bmm(scores.softmax(-1).to(q.dtype).view(len(k), -1, num_positions), v)
    return attended.view(num_rows, num_heads, head_dim)


def _attend_prefill(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, index: int, scale: float, window: int | None
) -> Tensor:
    """[query_len, num_heads, head_dim] of the sequence that is `index` places after the decode rows."""
    query_len, num_heads, _ = q.shape
    seq = meta.num_decodes + index
    context, blocks = meta.context_lens[seq], meta.block_table[seq, : meta.num_blocks(seq)]
    k, v = (pages[:context] for pages in cache.blocks(blocks, q.dtype))
    mask = meta.prefill_masks[index]
    if window is not None and window < context:
        prefix = 0 if meta.prefix_lens is None else meta.prefix_lens[seq]
        mask = causal_mask(query_len, context, prefix, window, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=num_heads != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)
