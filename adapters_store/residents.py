"""The adapters that have a slot on the device, which of them go first, and how many one tenant may have."""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, ItemsView, Iterator
from dataclasses import dataclass
from typing import Final, Self

# 84 MB at Llama-3.1-8B's shape take 0.14 s from a disk, and 1.7 to 3 ms from pinned memory.
_FROM_STORE: Final = 50.0
_FROM_HOST: Final = 1.0


@dataclass(slots=True)
class Resident:
    """An adapter in a slot.

    pins: by those who use it. used_at: when it was used last, on the monotonic clock. clock: what had been evicted
    then, as `Residents` counts.
    """

    name: str
    tenant: str
    slot: int
    num_pages: int
    pins: int = 0
    used_at: float = 0.0
    clock: float = 0.0


class Residents:
    """digest -> `Resident`, in the order in which they go as in GreedyDual-Size (Cao and Irani, USITS 1997).

    An adapter is worth what a page of it costs to come back, `in_host` memory or from the store, above what had been
    evicted when it was used last; the least worth goes first, among equals the least recently used.
    """

    def __init__(self, in_host: Callable[[str], bool]) -> None:
        self._in_host = in_host
        self._entries: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._clock = 0.0

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def __getitem__(self, digest: str) -> Resident:
        return self._entries[digest]

    def values(self) -> Collection[Resident]:
        """All, the least recently used first."""
        return self._entries.values()

    def items(self) -> ItemsView[str, Resident]:
        """All by digest, the least recently used first."""
        return self._entries.items()

    def get(self, digest: str) -> Resident | None:
        """The adapter, if it is there."""
        return self._entries.get(digest)

    def add(self, digest: str, entry: Resident) -> None:
        """Count an adapter that comes in."""
        self._entries[digest] = entry
        self.touch(digest)

    def touch(self, digest: str) -> None:
        """Note that an adapter is used."""
        entry = self._entries[digest]
        entry.used_at, entry.clock = time.monotonic(), self._clock
        self._entries.move_to_end(digest)

    def evict(self, digest: str) -> Resident:
        """Count an adapter that leaves."""
        self._clock = max(self._clock, self._worth(digest))
        return self._entries.pop(digest)

    def idle(self, keep: Collection[str] = (), since: float = math.inf) -> list[str]:
        """Those that may leave and have not been used since then, but for some to `keep`: the first to go first."""
        old = itertools.takewhile(lambda item: item[1].used_at < since, self._entries.items())
        idle = (digest for digest, entry in old if entry.pins == 0 and digest not in keep)
        return sorted(idle, key=self._worth)

    def _worth(self, digest: str) -> float:
        return self._entries[digest].clock + (_FROM_HOST if self._in_host(digest) else _FROM_STORE)


@dataclass(frozen=True)
class TenantShare:
    """The most slots and pages that one tenant's adapters may take together; one adapter always may."""

    num_slots: float
    num_pages: float

    @classmethod
    def of(cls, share: float, num_slots: int, num_pages: int) -> Self:
        """A part of all; the whole is no limit beside that there is no more."""
        return cls(share * num_slots, share * num_pages) if share < 1 else cls(math.inf, math.inf)

    @property
    def is_whole(self) -> bool:
        """Whether there is no limit, so that nothing need be counted."""
        return math.isinf(self.num_slots)

    def has_room(self, held: Collection[int], num_pages: int) -> bool:
        """Whether a tenant may have an adapter of so many pages more; held: the pages of each that it has."""
        return not held or (len(held) + 1 <= self.num_slots and sum(held) + num_pages <= self.num_pages)
