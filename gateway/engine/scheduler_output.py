"""What one step runs, as the scheduler has decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

from adapters_store.errors import StoreError
from gateway.engine.decode_rows import DecodeRows
from gateway.engine.host_blocks import BlockCopy
from gateway.engine.sequence import Sequence


class Chunk(NamedTuple):
    """A sequence's part in one step: its tokens from `start` on."""

    sequence: Sequence
    start: int
    num_tokens: int


@dataclass(slots=True)
class SchedulerOutput:
    """One step's work: the tokens it runs, and the sequences that can never run (to be ended).

    number: of the step, counted from 1. rows: the sequences with a token in each step. chunks: what comes behind them,
    first those of one token, then the longer ones, each by adapter slot. sampled: the sequences whose last token is in
    this step, in this order, the rows' first. A sequence's drafts follow its last token, each a chunk of its own that
    samples what follows it; drafted: where in `sampled` they are, and the how-manieth of the sequence's.
    saves, loads: the cache blocks that go to the host and come from it, in this order, before anything is computed;
    copies: (source, target) blocks that are then copied on the device. prefixes: tokens whose keys and values are
    their adapter's own, and then written to their sequences' blocks.
    """

    number: int
    chunks: list[Chunk] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    drafted: dict[int, int] = field(default_factory=dict)
    copies: list[tuple[int, int]] = field(default_factory=list)
    prefixes: list[Chunk] = field(default_factory=list)
    failed: list[tuple[Sequence, StoreError]] = field(default_factory=list)
    num_tokens: int = 0
    saves: list[BlockCopy] = field(default_factory=list)
    loads: list[BlockCopy] = field(default_factory=list)
    rows: DecodeRows = field(default_factory=DecodeRows)

    def chunk(self, index: int) -> Chunk:
        """One of `scheduled`."""
        num_rows = len(self.rows)
        if index >= num_rows:
            return self.chunks[index - num_rows]
        return Chunk(self.rows.sequences[index], int(self.rows.starts[index]), 1)

    @property
    def scheduled(self) -> list[Chunk]:
        """All of the step's chunks, the rows first."""
        return [*map(Chunk, self.rows.sequences, self.rows.starts.tolist(), repeat(1)), *self.chunks]
