"""The distinct adapters of the running sequences, whose pages every step reads."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Final

from adapters_store.lora_layout import num_pages_for
from gateway.engine.request import AdapterRef
from gateway.engine.sequence import Sequence

_MAX_OVERTAKEN: Final = 16


@dataclass(frozen=True)
class _RoomSeeker:
    """Who waits for room on the device, the running adapter that is `drained` for it, and whose would take it."""

    sequence: Sequence
    drained: str
    contends: Callable[[str], bool]


class BatchAdapters:
    """Counts pages of adapters that run, and says who may bring in another adapter past those that wait to.

    A sequence that would pass `max_pages` is overtaken by others of its priority, whose adapters fit or run already,
    `_MAX_OVERTAKEN` times. Then it is the `holder`: no adapter passes it.

    For one that waits for a slot, or for what else an adapter takes on the device, one of the adapters that hold some
    of what it lacks is drained, the one that will be done the soonest: no more sequences with that one are admitted,
    nor with adapters that do not run and would take some of it too; all others are. Where one waits for its own
    tenant's, whose share of the slots is taken, no adapter of that tenant passes it.
    """

    def __init__(self, max_pages: int | None) -> None:
        self.holder: Sequence | None = None
        self._room_seekers: list[_RoomSeeker] = []
        self._max_pages = max_pages
        self._num_pages = 0
        self._pages: dict[str, int] = {}  # of the adapters that run, by their digests
        self._running: dict[str, dict[Sequence, None]] = {}
        self._overtaken: list[Sequence] = []
        self._waiting_tenants: set[str] = set()

    def begin_step(self) -> None:
        """Forget who waits; they will be looked at again."""
        self.holder = None
        self._room_seekers.clear()
        self._overtaken.clear()
        self._waiting_tenants.clear()

    def has_room(self, adapter: AdapterRef, given_up: Set[str] = frozenset()) -> bool:
        """Whether a sequence with this adapter may run in the same steps as those that run.

        given_up: digests of adapters among those that are not to count.
        """
        if self._max_pages is None or adapter.digest in self._running or len(given_up) == len(self._running):
            return True
        num_pages = self._num_pages - sum(map(self._pages.__getitem__, given_up))
        return num_pages + num_pages_for(adapter.rank) <= self._max_pages

    def wait_for_pages(self, sequence: Sequence) -> None:
        """Note that the sequence found no room in this step, and who may pass it."""
        if sequence.num_overtaken < _MAX_OVERTAKEN:
            self._overtaken.append(sequence)
        else:
            self.holder = sequence

    def wait_for_slot(self, sequence: Sequence, contends: Callable[[str], bool]) -> None:
        """Note that the sequence found no slot, or no room beside it, in this step.

        contends: whether an adapter, by its digest, has or would take what this one's lacks. Of those that run the one
        is drained whose longest sequence has the fewest tokens left.
        """
        left = {
            digest: max(other.max_tokens - other.num_tokens for other in running)
            for digest, running in self._running.items()
            if contends(digest)
        }
        if left:
            self._room_seekers.append(_RoomSeeker(sequence, min(left, key=left.__getitem__), contends))

    def keeps_place(self, sequence: Sequence) -> bool:
        """Whether nobody of its priority is to be looked at before it in the next step."""
        return sequence is self.holder or any(sequence is seeker.sequence for seeker in self._room_seekers)

    def wait_for_own(self, tenant: str) -> None:
        """Note that a sequence waits for its tenant's own adapters in this step."""
        self._waiting_tenants.add(tenant)

    def holds_back(self, sequence: Sequence, adapter: AdapterRef) -> bool:
        """Whether one before this sequence, which has this adapter, would wait longer if it ran."""
        if self.holder is not None or adapter.tenant in self._waiting_tenants:
            return True
        for seeker in self._room_seekers:
            takes_room = adapter.digest not in self._running and seeker.contends(adapter.digest)
            if (takes_room or adapter.digest == seeker.drained) and seeker.sequence.priority <= sequence.priority:
                return True
        return bool(self._overtaken) and self._overtaken[0].priority < sequence.priority

    def add(self, sequence: Sequence) -> None:
        """Count a sequence that runs from now on."""
        adapter = sequence.adapter
        if adapter is None:
            return
        if adapter.digest not in self._running:
            self._running[adapter.digest] = {}
            self._pages[adapter.digest] = num_pages_for(adapter.rank)
            self._num_pages += self._pages[adapter.digest]
        self._running[adapter.digest][sequence] = None
        for other in self._overtaken:
            other.num_overtaken += 1
            if other.num_overtaken == _MAX_OVERTAKEN:
                self.holder = other

    def remove(self, sequence: Sequence) -> None:
        """Count a sequence that runs no more."""
        adapter = sequence.adapter
        if adapter is None:
            return
        running = self._running[adapter.digest]
        del running[sequence]
        if not running:
            del self._running[adapter.digest]
            self._num_pages -= self._pages.pop(adapter.digest)
