"""The sequences that have one token in each step, and that token's numbers in arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from gateway.engine.pending import IntArray
from gateway.engine.sampling_row import SamplingRow
from gateway.engine.sequence import Sequence
from gateway.engine.tenant import Tenant

_START, _BLOCK, _MAX_TOKENS, _SLOT = range(4)  # of `numbers`
_UNKNOWN: Final = -1

_sampling, _block_table, _tenant = attrgetter("sampling"), attrgetter("block_table"), attrgetter("tenant")


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Sequences of which a step computes one token each, by adapter slot. Never changed, so that a step may keep it.

    What a step costs here is a few operations on arrays, and some work for each row that comes, goes or enters a block.

    samplings, block_tables: the sequences' own. tenants: whose they are, and how many. numbers: int64 [4, num_rows]:
    the token's place in its sequence, the cache block that its key and value go to (-1 until `in_blocks`), how many
    tokens the sequence may become, and its slot.
    """

    sequences: list[Sequence] = field(default_factory=list)
    samplings: list[SamplingRow] = field(default_factory=list)
    block_tables: list[list[int]] = field(default_factory=list)
    tenants: Counter[Tenant] = field(default_factory=Counter)
    numbers: IntArray = field(default_factory=lambda: np.zeros((4, 0), np.int64))

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.sequences)

    @property
    def starts(self) -> IntArray:
        """Where the tokens are in their sequences: int64 [num_rows]."""
        own: IntArray = self.numbers[_START]
        return own

    @property
    def blocks(self) -> IntArray:
        """The cache block of each token: int64 [num_rows]."""
        own: IntArray = self.numbers[_BLOCK]
        return own

    @property
    def slots(self) -> IntArray:
        """The slots of their adapters, ascending; -1 for the bare base: int64 [num_rows]."""
        own: IntArray = self.numbers[_SLOT]
        return own

    def ending(self) -> list[Sequence]:
        """Those that have no token to compute: their last is in flight."""
        return self._where(self.starts + 1 >= self.numbers[_MAX_TOKENS])

    def entering(self, block_size: int) -> list[Sequence]:
        """Those whose token is the first of a block."""
        return self._where(self.starts % block_size == 0)

    def filling(self, block_size: int) -> list[tuple[Sequence, int]]:
        """Those whose token is the last of a block, each with its number of tokens up to there."""
        ends = self.starts + 1
        filled = ends % block_size == 0
        return list(zip(self._where(filled), ends[filled].tolist(), strict=True))

    def joined_by(self, others: Iterable[Sequence]) -> Self:
        """These and others, behind those of the same slot."""
        sequences = [*self.sequences, *others]
        news = [(s.num_computed, _UNKNOWN, s.max_tokens, s.slot) for s in sequences[len(self) :]]
        numbers = np.concatenate([self.numbers, np.array(news, np.int64).reshape(-1, 4).T], axis=1)
        order = np.argsort(numbers[_SLOT], kind="stable")
        return self._of([sequences[i] for i in order.tolist()], numbers[:, order])

    def without(self, others: Collection[Sequence]) -> Self:
        """These but for others."""
        kept = ~np.fromiter(map(others.__contains__, self.sequences), np.bool_, len(self))
        return self._of(self._where(kept), self.numbers[:, kept])

    def moved(self) -> Self:
        """The same after some of the sequences got other blocks."""
        numbers = self.numbers.copy()
        numbers[_BLOCK] = _UNKNOWN
        return self._of(self.sequences, numbers)

    def in_blocks(self, block_size: int) -> Self:
        """The same with each token's block, which its sequence holds by now."""
        news = np.flatnonzero((self.blocks == _UNKNOWN) | (self.starts % block_size == 0))
        if not len(news):
            return self
        numbers = self.numbers.copy()
        places = zip(news.tolist(), (self.starts[news] // block_size).tolist(), strict=True)
        numbers[_BLOCK, news] = [self.block_tables[row][place] for row, place in places]
        return replace(self, numbers=numbers)

    def advanced(self) -> Self:
        """The same with each sequence's next token."""
        numbers = self.numbers.copy()
        numbers[_START] += 1
        return replace(self, numbers=numbers)

    def _where(self, chosen: npt.NDArray[np.bool_]) -> list[Sequence]:
        return [self.sequences[row] for row in np.flatnonzero(chosen).tolist()]

    @classmethod
    def _of(cls, sequences: list[Sequence], numbers: IntArray) -> Self:
        """With what is of the sequences."""
        samplings, block_tables = list(map(_sampling, sequences)), list(map(_block_table, sequences))
        return cls(sequences, samplings, block_tables, Counter(map(_tenant, sequences)), numbers)
