"""The tokens of one step in arrays on the host."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
from typing import Self

import numpy as np
import numpy.typing as npt

from gateway.engine.pending import IntArray, PendingTokens
from gateway.engine.scheduler_output import Chunk, SchedulerOutput


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step computes, chunk after chunk: first those of one token, then the longer ones.

    ids, positions, cache_slots: int64 [num_tokens]: token ids, those that the device alone knows as
    `PendingTokens.marks`; places in their sequences; and in the cache, where their keys and values go. adapter_slots:
    int32 [num_tokens], -1 for the bare base. query_lens, context_lens: int64 [num_chunks]: how many tokens a chunk has,
    and its sequence with them. num_single: chunks of one token. block_tables: the sequences' own lists, which only
    grow. last_rows: int64 [num_sampled], where the last tokens of the sampled chunks are.
    """

    ids: IntArray
    positions: IntArray
    cache_slots: IntArray
    adapter_slots: npt.NDArray[np.int32]
    query_lens: IntArray
    context_lens: IntArray
    num_single: int
    block_tables: list[list[int]]
    last_rows: IntArray

    @classmethod
    def of(cls, output: SchedulerOutput, pending: PendingTokens | None, block_size: int) -> Self:
        """The tokens of `output`, which has some; pending: as `ModelRunner.execute` takes it."""
        rows, chunks = output.rows, output.chunks
        starts = _with(rows.starts, [chunk.start for chunk in chunks])
        query_lens = _with(np.ones(len(rows), np.int64), [chunk.num_tokens for chunk in chunks])
        ends, num_single = np.cumsum(query_lens), int(np.count_nonzero(query_lens == 1))
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - query_lens), query_lens)
        blocks = _with(rows.blocks, _blocks(chunks, block_size))
        slots = _with(rows.slots, [chunk.sequence.slot for chunk in chunks])
        return cls(
            ids=_ids(output, pending, ends),
            positions=positions,
            cache_slots=blocks * block_size + positions % block_size,
            adapter_slots=np.repeat(slots.astype(np.int32), query_lens),
            query_lens=query_lens,
            context_lens=starts + query_lens,
            num_single=num_single,
            block_tables=[*rows.block_tables, *(chunk.sequence.block_table for chunk in chunks)],
            last_rows=ends[_are_sampled(output)] - 1,
        )

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.ids)

    @property
    def is_decode(self) -> bool:
        """Whether what follows each token is sampled."""
        return len(self.last_rows) == len(self.ids)


def _with(rows: IntArray, others: list[int]) -> IntArray:
    """The rows' numbers, and behind them those of the chunks."""
    return np.concatenate([rows, np.array(others, np.int64)]) if others else rows


def _are_sampled(output: SchedulerOutput) -> slice | list[bool]:
    """Which chunks are sampled, as an index of them."""
    num_rows = len(output.rows)
    if len(output.sampled) == num_rows + len(output.chunks):
        return slice(None)
    sampled = set(output.sampled[num_rows:])
    return [True] * num_rows + [chunk.sequence in sampled for chunk in output.chunks]


def _ids(output: SchedulerOutput, pending: PendingTokens | None, ends: IntArray) -> IntArray:
    """The token ids, those in flight as their marks."""
    if pending is None:
        known = (sequence.known_tokens(start, num_tokens) for sequence, start, num_tokens in output.scheduled)
        return np.fromiter(chain.from_iterable(known), np.int64)
    ids = np.empty(ends[-1], np.int64)
    ids[ends - 1] = pending.marks  # a chunk of several tokens has none in flight
    for row in np.flatnonzero(~pending.is_pending).tolist():
        sequence, start, num_tokens = output.chunk(row)
        ids[ends[row] - num_tokens : ends[row]] = sequence.known_tokens(start, num_tokens)
    return ids


def _blocks(chunks: Seq[Chunk], size: int) -> list[int]:
    """The cache block of each token."""
    blocks: list[int] = []
    for sequence, start, num_tokens in chunks:
        # Not the last of a table: drafts that failed leave it longer than its sequence.
        own = sequence.block_table[start // size : (start + num_tokens - 1) // size + 1]
        blocks += own if num_tokens == 1 else np.repeat(own, size)[start % size :][:num_tokens].tolist()
    return blocks
