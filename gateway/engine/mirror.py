"""A step's sequences on another rank: what they are there already, and what a step adds to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from operator import attrgetter, is_not
from typing import Final, NamedTuple, cast

import numpy as np

from adapters_store.slots import AdapterSlots, Place
from gateway.engine.decode_rows import DecodeRows
from gateway.engine.host_blocks import BlockCopy
from gateway.engine.pending import IntArray, PendingTokens
from gateway.engine.request import AdapterRef
from gateway.engine.scheduler_output import Chunk, SchedulerOutput
from gateway.engine.sequence import Sequence

_FORGET_EVERY: Final = 64  # steps
_key, _table, _num_blocks = attrgetter("key"), attrgetter("table"), attrgetter("num_blocks")
_block_table = attrgetter("block_table")


class ChunkNews(NamedTuple):
    """A chunk of the sequence with this key."""

    key: int
    start: int
    num_tokens: int
    slot: int
    samples: bool


class Growth(NamedTuple):
    """By how much a sequence has grown since it was told of; is_new_table: the blocks are all of a table of its own."""

    key: int
    is_new_table: bool
    num_tokens: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class StepNews:
    """A step for the ranks that have no scheduler, in few arrays, which are sent and read in no time.

    row_keys, rows: int64 [num_rows], of whom the step's rows are, and their `DecodeRows.numbers`. chunks, growth: int64
    [n, 5] and [n, 4], each line a `ChunkNews` or a `Growth`. token_ids, blocks: int64, what sequences have grown by,
    one after the other. ended: keys of sequences that come no more. freed, loaded: slots, and for slots digests and
    places, whose adapters have changed since the last step that used any, to be done in this order before the step.
    drafts: by key, where a sequence has any in the step. saves, loads, copies: the step's, of cache blocks. prefixes:
    the step's, as (key, start, num_tokens). num_pending, sources: of its `PendingTokens`, where it has any.
    """

    number: int
    row_keys: IntArray
    rows: IntArray
    chunks: IntArray
    growth: IntArray
    token_ids: IntArray
    blocks: IntArray
    ended: list[int]
    freed: list[int]
    loaded: list[tuple[int, str, Place]]
    drafts: dict[int, list[int]]
    saves: list[BlockCopy]
    loads: list[BlockCopy]
    copies: list[tuple[int, int]]
    prefixes: list[tuple[int, int, int]]
    num_pending: int = 0
    sources: IntArray | None = None


@dataclass(slots=True)
class _Told:
    """What the others know of a sequence."""

    key: int
    num_tokens: int = 0
    num_blocks: int = 0
    table: list[int] | None = None


class Announcer:
    """Rank 0's record of what the other ranks know; they all know the same.

    A row costs some work here where its table has grown, or where its token is known to the host: those that steps in
    flight make reach the others over the device, and are told with the row's next block, or when it stops being one.
    """

    def __init__(self) -> None:
        self._told: dict[Sequence, _Told] = {}
        self._generations: dict[int, int] = {}  # by slot, of what the others have in it
        self._keys = count()

    def news(self, output: SchedulerOutput, pending: PendingTokens | None, slots: AdapterSlots) -> StepNews:
        """What the others must hear to run the step that is run here next. Each step is told once, in order."""
        growth: list[Growth] = []
        tokens: list[int] = []
        blocks: list[int] = []
        for chunk in output.chunks:
            self._grow(chunk.sequence, growth, tokens, blocks)
        told = self._row_growth(output.rows, pending, growth, tokens, blocks)
        freed, loaded = self._slot_changes(output, slots)
        return StepNews(
            output.number,
            np.fromiter(map(_key, told), np.int64, len(told)),
            output.rows.numbers,
            np.array(self._chunks(output), np.int64).reshape(-1, len(ChunkNews._fields)),
            np.array(growth, np.int64).reshape(-1, len(Growth._fields)),
            np.array(tokens, np.int64),
            np.array(blocks, np.int64),
            self._forget_ended() if output.number % _FORGET_EVERY == 0 else [],
            freed,
            loaded,
            {self._told[guessed].key: guessed.drafts for guessed in (output.sampled[row] for row in output.drafted)},
            output.saves,
            output.loads,
            output.copies,
            [(self._told[sequence].key, start, num_tokens) for sequence, start, num_tokens in output.prefixes],
            len(pending.token_ids) if pending is not None else 0,
            pending.sources if pending is not None else None,
        )

    def _chunks(self, output: SchedulerOutput) -> list[ChunkNews]:
        sampled = set(output.sampled[len(output.rows) :])
        return [
            ChunkNews(self._told[sequence].key, start, num_tokens, sequence.slot, sequence in sampled)
            for sequence, start, num_tokens in output.chunks
        ]

    def _row_growth(
        self,
        rows: DecodeRows,
        pending: PendingTokens | None,
        growth: list[Growth],
        tokens: list[int],
        blocks: list[int],
    ) -> list[_Told]:
        """What the others know of the rows' sequences, which are told of what they must know besides."""
        told = list(map(self._told.__getitem__, rows.sequences))  # each was a chunk before
        lengths = np.fromiter(map(len, rows.block_tables), np.int64, len(rows))
        must = lengths != np.fromiter(map(_num_blocks, told), np.int64, len(rows))
        must |= np.fromiter(map(is_not, map(_table, told), rows.block_tables), np.bool_, len(rows))
        must |= True if pending is None else ~pending.is_pending[: len(rows)]
        for row in np.flatnonzero(must).tolist():
            self._grow(rows.sequences[row], growth, tokens, blocks)
        return told

    def _grow(self, sequence: Sequence, growth: list[Growth], tokens: list[int], blocks: list[int]) -> None:
        """Tell all that a sequence has grown by: adds it to `tokens` and `blocks`, and how much that is to `growth`."""
        told = self._told.get(sequence)
        if told is None:
            told = self._told[sequence] = _Told(next(self._keys))
        # A table only grows; blocks that were given back leave another list behind.
        is_new = told.table is not sequence.block_table
        if is_new:
            told.table, told.num_blocks = sequence.block_table, 0
        new_tokens, new_blocks = sequence.token_ids[told.num_tokens :], sequence.block_table[told.num_blocks :]
        told.num_tokens += len(new_tokens)
        told.num_blocks += len(new_blocks)
        tokens += new_tokens
        blocks += new_blocks
        if is_new or new_tokens or new_blocks:
            growth.append(Growth(told.key, is_new, len(new_tokens), len(new_blocks)))

    def _slot_changes(
        self, output: SchedulerOutput, slots: AdapterSlots
    ) -> tuple[list[int], list[tuple[int, str, Place]]]:
        """The others load what a step uses, when it does; what has left here is freed there to make room for it.

        All of it, whoever has its place now: what remains there is here too, in the same place, and so what is loaded
        finds its own place free.
        """
        news = {
            slot: (slots.generation(slot), adapter.digest)
            for slot, adapter in _adapters(output).items()
            if adapter is not None and self._generations.get(slot) != slots.generation(slot)
        }
        if not news:
            return [], []
        there = slots.slot_pages
        freed = [s for s, then in self._generations.items() if s not in there or slots.generation(s) != then]
        for slot in freed:
            del self._generations[slot]
        self._generations |= {slot: generation for slot, (generation, _) in news.items()}
        return freed, [(slot, digest, slots.place(slot)) for slot, (_, digest) in news.items()]

    def _forget_ended(self) -> list[int]:
        ended = [sequence for sequence in self._told if sequence.finished]
        return [self._told.pop(sequence).key for sequence in ended]


def _adapters(output: SchedulerOutput) -> dict[int, AdapterRef | None]:
    """The adapter in each slot that the step uses; the rows of one are together."""
    slots = output.rows.slots
    firsts = np.flatnonzero(np.diff(slots, prepend=-2)).tolist()
    of_rows = {int(slots[row]): output.rows.sequences[row].adapter for row in firsts}
    return of_rows | {chunk.sequence.slot: chunk.sequence.adapter for chunk in output.chunks}


@dataclass(eq=False, slots=True)
class MirroredSequence:
    """What running a step reads of a `Sequence`."""

    slot: int = -1
    token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)

    def known_tokens(self, start: int, num_tokens: int) -> list[int]:
        """As `Sequence.known_tokens`."""
        known = self.token_ids[start : start + num_tokens]
        return known or self.drafts[start - len(self.token_ids) :][:num_tokens]


class Mirror:
    """Another rank's record of the sequences that steps have told it of."""

    def __init__(self) -> None:
        self._sequences: dict[int, MirroredSequence] = {}

    def output(self, news: StepNews) -> SchedulerOutput:
        """The step as rank 0 has scheduled it, of mirrored sequences."""
        tokens, blocks = iter(news.token_ids.tolist()), iter(news.blocks.tolist())
        for growth in map(Growth._make, news.growth.tolist()):
            self._grow(growth, tokens, blocks)
        rows = self._rows(news)
        output = SchedulerOutput(news.number, saves=news.saves, loads=news.loads, copies=news.copies, rows=rows)
        output.sampled += rows.sequences
        output.num_tokens = len(rows)
        for chunk in map(ChunkNews._make, news.chunks.tolist()):
            sequence = self._sequences[chunk.key]
            sequence.slot, sequence.drafts = chunk.slot, news.drafts.get(chunk.key, [])
            output.chunks.append(Chunk(_as_sequence(sequence), chunk.start, chunk.num_tokens))
            output.num_tokens += chunk.num_tokens
            if chunk.samples:
                output.sampled.append(_as_sequence(sequence))
        for key, start, num_tokens in news.prefixes:
            output.prefixes.append(Chunk(_as_sequence(self._sequences[key]), start, num_tokens))
        for key in news.ended:
            del self._sequences[key]
        return output

    def _rows(self, news: StepNews) -> DecodeRows:
        """Without what only sampling and scheduling read."""
        sequences = list(map(self._sequences.__getitem__, news.row_keys.tolist()))
        tables = list(map(_block_table, sequences))
        return DecodeRows(cast("list[Sequence]", sequences), block_tables=tables, numbers=news.rows)

    def _grow(self, growth: Growth, tokens: Iterator[int], blocks: Iterator[int]) -> None:
        sequence = self._sequences.get(growth.key)
        if sequence is None:
            sequence = self._sequences[growth.key] = MirroredSequence()
        if growth.is_new_table:
            sequence.block_table = []
        sequence.token_ids += islice(tokens, growth.num_tokens)
        sequence.block_table += islice(blocks, growth.num_blocks)


def _as_sequence(mirrored: MirroredSequence) -> Sequence:
    """`ModelRunner` takes either: it reads nothing else."""
    return cast("Sequence", mirrored)
