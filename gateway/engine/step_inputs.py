"""What a recorded step reads, at addresses that never change."""

from __future__ import annotations

from operator import is_not
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adapters_store.slots import AdapterSlots
from gateway.engine.kv_cache import KVCache
from gateway.engine.pending import IntArray, PendingTokens, resolve
from gateway.engine.step_tokens import StepTokens
from gateway.engine.transfers import send, send_into
from gateway.layers.forward_batch import ForwardBatch
from gateway.layers.rotary import RotaryTable
from lora_kernels.attention import AttentionMetadata
from lora_kernels.segments import LoRASegments, Routing, fixed_size, order_capacity

# Rows of `_numbers`. A step of decode rows alone needs but the first four.
_TOKEN_ID, _POSITION, _CACHE_SLOT, _CONTEXT_LEN, _LAST_ROW, _QUERY_START = range(6)
_OF_DECODES = 4


class StepInputs:
    """The inputs of up to `size` rows on the device, a token each, and the host's record of what is there.

    A step is padded between its chunks of one token and the longer ones: so each of the former, and each row of
    padding, is the sequence of its own number, and what is behind them is the longer ones' alone.

    A step sends a few numbers a row, the blocks that tables have grown by, and the routing when a row's slot, or what
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
        self._numbers = np.zeros((6, size + 1), np.int32)
        self._numbers[_CACHE_SLOT] = cache.scratch_slot
        self._numbers[_QUERY_START] = range(size + 1)
        self._numbers_there = torch.tensor(self._numbers, device=device)
        # Each sequence's table is its own list, which only grows; how many of its blocks have been sent.
        self._tables: list[list[int]] = [[] for _ in range(size)]
        self._num_sent = np.zeros(size, np.int64)
        self._block_table = torch.zeros((size, max_blocks), dtype=torch.int32, device=device)
        self._last_tokens = torch.zeros(max_pending, dtype=torch.int64, device=device)
        self._one_each = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._routed: tuple[bytes, tuple[int, ...]] | None = None
        self._num_pages = 0
        self._routing = torch.zeros(fixed_size(size, max_pages), dtype=torch.int32, device=device)
        self._vector_rows = np.full(size, -1, np.int32)
        self._vector_rows_there = torch.full((size,), -1, dtype=torch.int32, device=device)

    def fill(self, tokens: StepTokens, pending: PendingTokens | None, size: int) -> None:
        """Send what a step of so many rows needs, of which these are not padding.

        A row of padding attends to nothing and writes its key and value to the cache's scratch block.
        """
        scratch = self._cache.scratch_slot
        sequences = np.arange(len(tokens.query_lens))
        sequences[tokens.num_single :] += size - len(tokens)
        self._numbers[_TOKEN_ID, :size] = _padded(tokens, tokens.ids, size, 0)
        self._numbers[_POSITION, :size] = _padded(tokens, tokens.positions, size, 0)
        self._numbers[_CACHE_SLOT, :size] = _padded(tokens, tokens.cache_slots, size, scratch)
        self._numbers[_CONTEXT_LEN] = 0
        self._numbers[_CONTEXT_LEN, sequences] = tokens.context_lens
        sent = _OF_DECODES
        if not tokens.is_decode:
            self._set_ragged(tokens, size)
            sent = len(self._numbers)
        send_into(self._numbers[:sent], self._numbers_there[:sent])
        self._send_blocks(sequences, tokens.block_tables)
        if pending is not None:
            self._last_tokens[: len(pending.token_ids)].copy_(pending.token_ids)

    def route(self, tokens: StepTokens, size: int) -> int | None:
        """Send the routing of a step of so many rows.

        Returns the number of pages of all their adapters; None when an adapter has too many.
        """
        if (tokens.adapter_slots < 0).all():
            return 0
        token_slots = _padded(tokens, tokens.adapter_slots, size, -1)
        used = np.unique(tokens.adapter_slots).tolist()
        routed = token_slots.tobytes(), tuple(self._slots.generation(slot) for slot in used if slot >= 0)
        if routed == self._routed:
            return self._num_pages
        routing = Routing.of(token_slots, size, self._slots.slot_pages, self._invariant)
        if routing.max_pages > self._max_pages:
            return None
        packed = routing.packed(order_capacity(self._size))
        send_into(packed, self._routing[: len(packed)])
        self._routed, self._num_pages = routed, routing.num_pages
        return self._num_pages

    def send_vectors(self, tokens: StepTokens, size: int) -> bool:
        """Send which of so many rows have vectors, and where. False when none has any."""
        own = self._slots.vector_rows(tokens.adapter_slots)
        if own is None:
            return False
        rows = _padded(tokens, own, size, -1)
        if (rows != self._vector_rows[:size]).any():
            send_into(rows, self._vector_rows_there[:size])
            self._vector_rows[:size] = rows
        return True

    def batch(
        self, size: int, most_pages: int, most_sampled: int | None = None, *, has_vectors: bool = False
    ) -> ForwardBatch:
        """The first `size` rows, whose adapters have no more than so many pages together, and perhaps vectors.

        most_sampled: how many rows a ragged step samples at most; None for decode rows alone, all of which are sampled.
        Made while a graph is recorded, it reads what `fill` and `route` have sent since.
        """
        numbers = self._numbers_there
        marked_ids, positions, slot_mapping = numbers[: _CACHE_SLOT + 1, :size].long()
        cos, sin = self._rotary.at(positions)
        is_ragged = most_sampled is not None
        return ForwardBatch(
            input_ids=resolve(marked_ids, self._last_tokens),
            slot_mapping=slot_mapping,
            attention=AttentionMetadata.fixed(
                self._block_table[:size],
                numbers[_CONTEXT_LEN, :size],
                numbers[_QUERY_START, : size + 1] if is_ragged else self._one_each[: size + 1],
                self._cache.block_size,
                ragged=is_ragged,
            ),
            cos=cos,
            sin=sin,
            last_rows=numbers[_LAST_ROW, :most_sampled].long() if is_ragged else None,
            adapters=self._slots,
            segments=LoRASegments.fixed(self._routing, size, self._size, self._max_pages, most_pages, self._invariant)
            if most_pages
            else None,
            invariant=self._invariant,
            vector_rows=self._vector_rows_there[:size] if has_vectors else None,
        )

    def _set_ragged(self, tokens: StepTokens, size: int) -> None:
        """Which rows are sampled, and where each sequence's rows begin."""
        single, padding, rows = tokens.num_single, size - len(tokens), tokens.last_rows
        self._numbers[_LAST_ROW] = 0
        self._numbers[_LAST_ROW, : len(rows)] = np.where(rows < single, rows, rows + padding)
        lens = np.ones(single + padding, np.int64), tokens.query_lens[single:]
        ends = np.cumsum(np.concatenate(lens))
        self._numbers[_QUERY_START] = size
        self._numbers[_QUERY_START, 0] = 0
        self._numbers[_QUERY_START, 1 : 1 + len(ends)] = ends

    def _send_blocks(self, sequences: IntArray, tables: list[list[int]]) -> None:
        """Write what is new of the block tables of these sequences."""
        others = map(is_not, map(self._tables.__getitem__, sequences.tolist()), tables)
        for i in np.flatnonzero(np.fromiter(others, np.bool_, len(tables))).tolist():
            self._tables[sequences[i]], self._num_sent[sequences[i]] = tables[i], 0
        lengths = np.fromiter(map(len, tables), np.int64, len(tables))
        sent = self._num_sent[sequences]
        grown = np.flatnonzero(lengths > sent).tolist()
        if not grown:
            return
        width = self._block_table.shape[1]
        places = [sequences[i] * width + np.arange(sent[i], lengths[i]) for i in grown]
        blocks = [tables[i][sent[i] :] for i in grown]
        news = send(np.stack([np.concatenate(places), np.concatenate(blocks)]), self._block_table.device)
        self._block_table.view(-1)[news[0]] = news[1].int()
        self._num_sent[sequences] = lengths


def _padded(
    tokens: StepTokens, values: npt.NDArray[np.signedinteger[Any]], size: int, padding: int
) -> npt.NDArray[np.signedinteger[Any]]:
    """A value for each of `size` rows: the tokens', with padding behind the chunks of one token."""
    single = tokens.num_single
    return np.concatenate([values[:single], np.full(size - len(values), padding, values.dtype), values[single:]])
