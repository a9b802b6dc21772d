"""Pages that no adapter has, as blocks of the KV cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from adapters_store.page_supply import PageSupply
from adapters_store.residency import AdapterResidency
from gateway.engine.block_manager import BlockManager


class LentPages:
    """Lends the pages of `residency`'s adapters to `blocks`, a page at a time.

    Pages that nobody has go first; then those of adapters that nobody has used for longer than the prefix that the
    cache would drop, or at all where sequences would wait. under: for each page the blocks that it lies over. A block
    over which several pages lie can be used while all of them are lent.
    """

    def __init__(
        self, under: Sequence[Sequence[int]], blocks: BlockManager, supply: PageSupply, residency: AdapterResidency
    ) -> None:
        self._under = under
        self._blocks = blocks
        self._supply = supply
        self._residency = residency
        self._in_the_way = Counter(chain.from_iterable(under))  # pages over a block that are not lent
        supply.borrower = self
        blocks.borrow = self.borrow

    def borrow(self, since: float) -> bool:
        """Add another page's blocks. False where there is none to be had.

        since: when what there would be no room for otherwise was used last.
        """
        while (page := self._supply.lend()) is None:
            if not (self._supply.may_lend and self._residency.give_up_pages(since)):
                return False
        self._in_the_way.subtract(self._under[page])
        self.keep(page)
        return True

    def used_at(self, page: int) -> float:
        """When the last of the prefixes in its blocks was used; 0 where there are none."""
        return max(map(self._blocks.used_at, self._usable(page)), default=0.0)

    def is_using(self, page: int) -> bool:
        """Whether a sequence has any of its blocks."""
        return self._blocks.holds_any(self._under[page])

    def must_save(self, page: int) -> bool:
        """Whether it holds prefixes that the next step brings to the host, once it is recalled."""
        return self._blocks.is_to_save(self._usable(page))

    def recall(self, page: int) -> None:
        """Have no sequence take any of its blocks."""
        for block in self._usable(page):
            self._blocks.withdraw(block)

    def keep(self, page: int) -> None:
        """Let sequences take its blocks."""
        for block in self._usable(page):
            self._blocks.add(block)

    def give_back(self, page: int) -> None:
        """Take its blocks away; no sequence has any, and what they hold is lost."""
        self.recall(page)
        self._blocks.drop_saves(self._under[page])
        self._in_the_way.update(self._under[page])

    def _usable(self, page: int) -> list[int]:
        return [block for block in self._under[page] if self._in_the_way[block] == 0]
