"""A step's sequences on another rank: what they are there already, and what a step adds to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Final, NamedTuple, cast

import numpy as np

from adapters_store.slots import AdapterSlots, Place
from gateway.engine.host_blocks import BlockCopy
from gateway.engine.pending import IntArray, PendingTokens
from gateway.engine.scheduler_output import Chunk, SchedulerOutput
from gateway.engine.sequence import Sequence

_FORGET_EVERY: Final = 64  # steps


class RowNews(NamedTuple):
    """A chunk, and by how much its sequence has grown since the last step that it was in.

    key: of the sequence. is_new_table: the blocks are all that it has, in a table of its own.
    """

    key: int
    start: int
    num_tokens: int
    slot: int
    samples: bool
    is_new_table: bool
    num_new_tokens: int
    num_new_blocks: int


@dataclass(frozen=True, slots=True)
class StepNews:
    """A step for the ranks that have no scheduler, in few arrays, which are sent and read in no time.

    rows: int64 [num_chunks, 8], each a `RowNews`. token_ids, blocks: int64, what the rows' sequences have grown by, row
    after row. ended: keys of sequences that come no more. freed, loaded: slots, and for slots digests and places, whose
    adapters have changed since the last step that used any, to be done in this order before the step. drafts: by key,
    where a sequence has any in the step. saves, loads, copies: the step's, of cache blocks. prefixes: the step's, as
    (key, start, num_tokens). num_pending, sources: of its `PendingTokens`, where it has any.
    """

    number: int
    rows: IntArray
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
    key: int
    num_tokens: int = 0
    num_blocks: int = 0
    table: list[int] | None = None


class Announcer:
    """Rank 0's record of what the other ranks know; they all know the same."""

    def __init__(self) -> None:
        self._told: dict[Sequence, _Told] = {}
        self._generations: dict[int, int] = {}  # by slot, of what the others have in it
        self._keys = count()

    def news(self, output: SchedulerOutput, pending: PendingTokens | None, slots: AdapterSlots) -> StepNews:
        """What the others must hear to run the step that is run here next. Each step is told once, in order."""
        sampled = set(output.sampled)
        tokens: list[int] = []
        blocks: list[int] = []
        scheduled = output.scheduled
        rows = [self._row(chunk, chunk.sequence in sampled, tokens, blocks) for chunk in scheduled]
        freed, loaded = self._slot_changes(scheduled, slots)
        return StepNews(
            output.number,
            np.fromiter(chain.from_iterable(rows), np.int64).reshape(len(rows), -1),
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

    def _row(self, chunk: Chunk, samples: bool, tokens: list[int], blocks: list[int]) -> RowNews:
        """The chunk's row; adds what its sequence has grown by to `tokens` and `blocks`."""
        sequence, start, num_tokens = chunk
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
        return RowNews(told.key, start, num_tokens, sequence.slot, samples, is_new, len(new_tokens), len(new_blocks))

    def _slot_changes(
        self, chunks: Iterable[Chunk], slots: AdapterSlots
    ) -> tuple[list[int], list[tuple[int, str, Place]]]:
        """The others load what a step uses, when it does; what has left here is freed there to make room for it.

        All of it, whoever has its place now: what remains there is here too, in the same place, and so what is loaded
        finds its own place free.
        """
        adapters = {chunk.sequence.slot: chunk.sequence.adapter for chunk in chunks}
        news = {
            slot: (slots.generation(slot), adapter.digest)
            for slot, adapter in adapters.items()
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
        output = SchedulerOutput(news.number, saves=news.saves, loads=news.loads, copies=news.copies)
        tokens, blocks = iter(news.token_ids.tolist()), iter(news.blocks.tolist())
        for row in map(RowNews._make, news.rows.tolist()):
            mirrored = self._updated(row, tokens, blocks)
            mirrored.drafts = news.drafts.get(row.key, [])
            sequence = cast("Sequence", mirrored)  # `ModelRunner` takes either: it reads nothing else
            output.chunks.append(Chunk(sequence, row.start, row.num_tokens))
            output.num_tokens += row.num_tokens
            if row.samples:
                output.sampled.append(sequence)
        for key, start, num_tokens in news.prefixes:
            output.prefixes.append(Chunk(cast("Sequence", self._sequences[key]), start, num_tokens))
        for key in news.ended:
            del self._sequences[key]
        return output

    def _updated(self, row: RowNews, tokens: Iterator[int], blocks: Iterator[int]) -> MirroredSequence:
        sequence = self._sequences.get(row.key)
        if sequence is None:
            sequence = self._sequences[row.key] = MirroredSequence()
        sequence.slot = row.slot
        if row.is_new_table:
            sequence.block_table = []
        sequence.token_ids += islice(tokens, row.num_new_tokens)
        sequence.block_table += islice(blocks, row.num_new_blocks)
        return sequence
