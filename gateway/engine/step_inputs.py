"""What a recorded decode step reads, at addresses that never change."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from adapters_store.slots import AdapterSlots
from gateway.engine.kv_cache import KVCache
from gateway.engine.pending import IntArray, PendingTokens, resolve
from gateway.engine.scheduler import Chunk
from gateway.engine.transfers import send, send_into
from gateway.layers.forward_batch import ForwardBatch
from gateway.layers.rotary import RotaryTable
from lora_kernels.attention import AttentionMetadata
from lora_kernels.segments import LoRASegments, Routing, fixed_size, order_capacity


class DecodeInputs:
    """The inputs of up to `size` decode rows on the device, and the host's record of what is there.

    A step sends four numbers a row, the blocks that tables have grown by, and the routing when a row's slot, or what
    lies in it, has changed. Tokens that the step before sampled never leave the device.
    """

    def __init__(
        self,
        cache: KVCache,
        slots: AdapterSlots,
        rotary: RotaryTable,
        device: torch.device,
        *,
        size: int,
        max_blocks: int,
        max_pages: int,
        max_pending: int,
        invariant: bool = False,
    ) -> None:
        self._cache = cache
        self._slots = slots
        self._rotary = rotary
        self._size = size
        self._max_pages = max_pages
        self._invariant = invariant
        # Context length, token id (below zero: pending), position and cache slot of each row.
        self._numbers = np.zeros((4, size), np.int32)
        self._numbers_there = torch.zeros((4, size), dtype=torch.int32, device=device)
        # Each row's table is its sequence's own list, which only grows; how many of its blocks have been sent.
        self._tables: list[list[int]] = [[] for _ in range(size)]
        self._num_sent = np.zeros(size, np.int64)
        self._block_table = torch.zeros((size, max_blocks), dtype=torch.int32, device=device)
        self._last_tokens = torch.zeros(max_pending, dtype=torch.int64, device=device)
        self._query_start = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._routed: tuple[bytes, tuple[int, ...]] | None = None
        self._num_pages = 0
        self._routing = torch.zeros(fixed_size(size, max_pages), dtype=torch.int32, device=device)

    def fill(self, chunks: Seq[Chunk], pending: PendingTokens | None) -> None:
        """Send what the rows of this step, one token each, need. The rows behind them are padding.

        A padding row attends to nothing and writes its key and value to the cache's scratch block.
        """
        rows, block_size = len(chunks), self._cache.block_size
        tables = [chunk.sequence.block_table for chunk in chunks]
        positions = np.array([chunk.start for chunk in chunks], np.int64)
        # Not the last: drafts that failed leave a table longer than its sequence.
        places = (positions // block_size).tolist()
        blocks = np.array([table[place] for table, place in zip(tables, places, strict=True)], np.int64)
        self._numbers[:3, rows:] = 0
        self._numbers[3, rows:] = self._cache.scratch_slot
        self._numbers[0, :rows] = positions + 1
        self._numbers[1, :rows] = _input_ids(chunks, pending)
        self._numbers[2, :rows] = positions
        self._numbers[3, :rows] = blocks * block_size + positions % block_size
        send_into(self._numbers, self._numbers_there)
        self._send_blocks(tables)
        if pending is not None:
            self._last_tokens[: len(pending.token_ids)].copy_(pending.token_ids)

    def route(self, token_slots: npt.NDArray[np.int32], size: int) -> int | None:
        """Send the routing of a step of `size` rows, the first of which have these slots.

        token_slots: int32 [num_rows], -1 for the bare base, not all of them. Returns the number of pages of all their
        adapters; None when an adapter has too many.
        """
        used = sorted(set(token_slots.tolist()) - {-1})
        routed = token_slots.tobytes(), tuple(self._slots.generation(slot) for slot in used)
        if routed == self._routed:
            return self._num_pages
        routing = Routing.of(token_slots, size, self._slots.slot_pages, self._invariant)
        if routing.max_pages > self._max_pages:
            return None
        packed = routing.packed(order_capacity(self._size))
        send_into(packed, self._routing[: len(packed)])
        self._routed, self._num_pages = routed, routing.num_pages
        return self._num_pages

    def batch(self, size: int, most_pages: int) -> ForwardBatch:
        """The first `size` rows, whose adapters have no more than so many pages together.

        Made while a graph is recorded, it reads what `fill` and `route` have sent since.
        """
        marked_ids, positions, slot_mapping = self._numbers_there[1:, :size].long()
        cos, sin = self._rotary.at(positions)
        return ForwardBatch(
            input_ids=resolve(marked_ids, self._last_tokens),
            slot_mapping=slot_mapping,
            attention=AttentionMetadata.fixed(
                self._block_table[:size],
                self._numbers_there[0, :size],
                self._query_start[: size + 1],
                self._cache.block_size,
            ),
            cos=cos,
            sin=sin,
            last_rows=None,
            adapters=self._slots,
            segments=LoRASegments.fixed(self._routing, size, self._size, self._max_pages, most_pages, self._invariant)
            if most_pages
            else None,
            invariant=self._invariant,
        )

    def _send_blocks(self, tables: list[list[int]]) -> None:
        """Write what is new of the rows' block tables."""
        for row, table in enumerate(tables):
            if self._tables[row] is not table:
                self._tables[row], self._num_sent[row] = table, 0
        lengths = np.array([len(table) for table in tables], np.int64)
        grown = np.flatnonzero(lengths > self._num_sent[: len(tables)]).tolist()
        if not grown:
            return
        width = self._block_table.shape[1]
        places = [row * width + np.arange(self._num_sent[row], lengths[row]) for row in grown]
        blocks = [tables[row][self._num_sent[row] :] for row in grown]
        news = send(np.stack([np.concatenate(places), np.concatenate(blocks)]), self._block_table.device)
        self._block_table.view(-1)[news[0]] = news[1].int()
        self._num_sent[: len(tables)] = lengths


def _input_ids(chunks: Seq[Chunk], pending: PendingTokens | None) -> IntArray:
    """The rows' token ids, pending ones as their marks."""
    if pending is None:
        return np.array([sequence.known_tokens(start, 1)[0] for sequence, start, _ in chunks], np.int64)
    ids = pending.marks
    for row in np.flatnonzero(~pending.is_pending).tolist():
        sequence, start, _ = chunks[row]
        ids[row] = sequence.known_tokens(start, 1)[0]
    return ids
