"""Host bookkeeping of the KV cache's second tier: which prefix links' blocks host memory holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Final, NamedTuple


class BlockCopy(NamedTuple):
    """One block's way between the tiers: which on the device, which on the host."""

    block: int
    host_block: int


class _Rates(NamedTuple):
    link: float  # bytes a second between host and device
    compute: float  # operations a second of a prefill
    start: float  # seconds that a fetch takes whatever its size


# CUDA's are stated: a link of PCIe 4 and a prefill at 40 % of an H200's peak. Both favour computing, so that what is
# fetched is worth it on better links and slower devices too. The CPU's were measured with the embedded base on 2 cores,
# a fetch with the save that makes room for it.
_RATES: Final = {"cuda": _Rates(20e9, 4e14, 200e-6), "cpu": _Rates(0.4e9, 8e10, 0.0)}


def least_fetch(block_bytes: int, block_operations: int, device_type: str) -> int | None:
    """The fewest blocks that come from the host sooner than they are computed again; None when more never do.

    Fetching n blocks takes start + n * block_bytes / link seconds, computing them n * block_operations / compute.
    """
    rates = _RATES[device_type]
    gain = block_operations / rates.compute - block_bytes / rates.link
    return int(rates.start / gain) + 1 if gain > 0 else None


class HostBlocks:
    """Host blocks by the prefix link whose content they hold, least recently used first.

    What the device drops is saved here; what is fetched stays here as well. Only steps read and write the blocks,
    and a step's saves spare what its loads read: beyond that nothing is pinned, since copies keep the order of steps.
    Without blocks there is no second tier.
    Invariant: blocks with a link + free blocks = num_blocks (`check_integrity`).
    """

    def __init__(self, num_blocks: int, least_fetch: int = 1) -> None:
        self.num_blocks = num_blocks
        self.num_saved = 0
        self.num_loaded = 0
        self._least_fetch = least_fetch
        self._block_of: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(num_blocks))

    @property
    def usage(self) -> float:
        """The share of blocks that hold a link, 0 to 1."""
        return len(self._block_of) / max(1, self.num_blocks)

    def count(self, links: Seq[bytes]) -> int:
        """How many of the first links are here and worth fetching: all or none of them."""
        found = next((i for i, link in enumerate(links) if link not in self._block_of), len(links))
        return found if found >= self._least_fetch else 0

    def has(self, links: Iterable[bytes]) -> bool:
        """Whether all of these are here."""
        return all(link in self._block_of for link in links)

    def fetch(self, links: Seq[bytes]) -> list[int]:
        """The blocks of links that are here, which count as used."""
        for link in reversed(links):  # a chain's end leaves before its start, without which it is of no use
            self._block_of.move_to_end(link)
        self.num_loaded += len(links)
        return [self._block_of[link] for link in links]

    def save(self, left: Mapping[bytes, int], loads: Seq[BlockCopy]) -> list[BlockCopy]:
        """Take in the links that left the device, each with the block that held it; returns the copies to be made.

        The least recently used make room, but for those that the same step's `loads` read.
        """
        read = {load.host_block for load in loads}
        block_in: dict[int, int] = {}  # a small tier may take several blocks of one step in one place: the last stays
        for link, block in left.items():
            if link in self._block_of:
                self._block_of.move_to_end(link)
            elif (place := self._make_room(read)) is not None:
                self._block_of[link] = place
                block_in[place] = block
        self.num_saved += len(block_in)
        return [BlockCopy(block, place) for place, block in block_in.items()]

    def forget(self, links: Iterable[bytes]) -> None:
        """Have none of these any more."""
        for link in links:
            if (place := self._block_of.pop(link, None)) is not None:
                self._free.append(place)

    def clear(self) -> None:
        """Forget everything: copies may not have been made."""
        self._block_of.clear()
        self._free = list(range(self.num_blocks))

    def check_integrity(self) -> None:
        """Assert that each block is free or holds exactly one link."""
        assert sorted([*self._block_of.values(), *self._free]) == list(range(self.num_blocks))

    def _make_room(self, read: set[int]) -> int | None:
        if self._free:
            return self._free.pop()
        link = next((link for link, place in self._block_of.items() if place not in read), None)
        return self._block_of.pop(link) if link is not None else None
