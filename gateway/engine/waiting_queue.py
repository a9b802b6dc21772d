"""The sequences that wait to run, in the order in which they may."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice, zip_longest
from typing import Final

from gateway.engine.sequence import Sequence
from gateway.engine.tenant import Tenant

# How many sequences a step may look at in vain: of one tenant and priority, and of all.
_MAX_PASSED_OF_LINE: Final = 16
_MAX_PASSED: Final = 256


class WaitingQueue:
    """Sequences by priority (lower is earlier), then by the service that their tenants have had, then by arrival.

    Service is counted in the virtual tokens that tenants are charged (VTC: Sheng et al., Fairness in Serving Large
    Language Models, arXiv 2401.00588): who was served least comes first, and who comes back is lifted to the least
    served of those that wait, so that nobody saves up service while away. One whose sequences wait at lower priorities
    alone is away. The queue remembers every tenant that it has seen.

    A step asks for the `next` sequence, takes it or passes it over, and so on, and ends with `rewind`. It looks at a
    bounded number in vain, and costs what it looks at, however many wait.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._priorities: list[int] = []  # of the levels, ascending
        self._tenants: defaultdict[str, Tenant] = defaultdict(Tenant)
        self._served_last = 0.0
        self._passed: list[_Level] = []  # of each sequence that the step has passed over
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        for priority in self._priorities:
            yield from self._levels[priority]

    def soon(self, number: int) -> Iterator[Sequence]:
        """Who is likely to run next: of each priority one of each tenant in turn, roughly the least served first."""
        return islice(chain.from_iterable(self._levels[priority].soon(number) for priority in self._priorities), number)

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """Put a sequence behind, or before, all others of its tenant and priority."""
        request = sequence.request.request
        tenant = sequence.tenant = self._tenants[request.tenant]
        tenant.weight = request.tenant_weight
        level = self._level(sequence.priority)
        if not any(self._levels[p].has(tenant) for p in self._priorities if p <= sequence.priority):
            tenant.served = max(tenant.served, self._least_served(level))
        level.put(sequence, first=first)
        self._num_waiting += 1

    def next(self, *, before: int | None = None) -> Sequence | None:
        """The first sequence that this step has not passed over; None when it has looked at enough.

        before: a priority, to have only what is more urgent.
        """
        if len(self._passed) == _MAX_PASSED:
            return None
        for priority in self._priorities:
            if before is not None and priority >= before:
                return None
            if (sequence := self._levels[priority].next()) is not None:
                return sequence
        return None

    def pass_over(self, sequence: Sequence, *, keeps_place: bool = False) -> None:
        """Look behind the `next` sequence until the step's `rewind`.

        keeps_place: it is the next of its priority until it is taken, whatever its tenant is served meanwhile. Of
        several it is the first for which this is asked.
        """
        level = self._levels[sequence.priority]
        level.pass_over(sequence, keeps_place=keeps_place)
        self._passed.append(level)

    def take(self, sequence: Sequence) -> None:
        """Take the `next` sequence out, to be served."""
        self._served_last = max(self._served_last, sequence.tenant.served)
        self.discard(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence out; nothing when it is not in."""
        level = self._levels.get(sequence.priority)
        if level is None or not level.discard(sequence):
            return
        self._num_waiting -= 1
        if level.num_waiting == 0:
            del self._levels[sequence.priority]
            self._priorities.remove(sequence.priority)

    def rewind(self) -> None:
        """End a step: what it has passed over is looked at again by the next one."""
        for level in self._passed:
            level.rewind()
        self._passed.clear()

    def _level(self, priority: int) -> _Level:
        if priority not in self._levels:
            self._levels[priority] = _Level()
            insort(self._priorities, priority)
        return self._levels[priority]

    def _least_served(self, level: _Level) -> float:
        """What lifts a tenant that comes back: the least served of the level, or else who was served last of all."""
        first = level.first(None)
        return self._served_last if first is None else first.tenant.served


@dataclass(eq=False, slots=True)
class _Line:
    """One tenant's sequences of one priority, as they arrived. num_passed: how many a step has passed over."""

    tenant: Tenant
    sequences: OrderedDict[Sequence, None] = field(default_factory=OrderedDict)
    num_passed: int = 0
    in_heap: bool = False

    def next(self, head: Sequence | None) -> Sequence | None:
        """The first that the step has not passed over, but for the level's head."""
        if head is None and self.num_passed == 0:
            return next(iter(self.sequences), None)
        if self.num_passed == _MAX_PASSED_OF_LINE:
            return None
        return next(islice((s for s in self.sequences if s is not head), self.num_passed, None), None)


class _Level:
    """The lines of one priority."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self._head: Sequence | None = None  # the one that keeps its place; it stays in its line
        self._head_passed = False
        self._lines: dict[Tenant, _Line] = {}
        # By what their tenants were served when they were pushed, then by arrival. What is served only grows, so that a
        # line on top whose entry is still true is the first of all.
        self._heap: list[tuple[float, float, int, _Line]] = []
        self._numbers = count()
        self._walked: list[_Line] = []  # lines that the step has passed over, in part or as a whole

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(line.sequences for line in self._lines.values())

    def soon(self, number: int) -> Iterator[Sequence]:
        # The least served of all is on top of the heap, and who comes next lies near.
        lines = sorted((line for *_, line in self._heap[:number]), key=lambda line: line.tenant.served)
        turns = zip_longest(*(line.sequences for line in lines))
        return (sequence for turn in turns for sequence in turn if sequence is not None)

    def has(self, tenant: Tenant) -> bool:
        line = self._lines.get(tenant)
        return line is not None and bool(line.sequences)

    def put(self, sequence: Sequence, *, first: bool) -> None:
        line = self._lines.get(sequence.tenant)
        if line is None:
            line = self._lines[sequence.tenant] = _Line(sequence.tenant)
        line.sequences[sequence] = None
        line.sequences.move_to_end(sequence, last=not first)
        self.num_waiting += 1
        self._push(line)

    def discard(self, sequence: Sequence) -> bool:
        """Take a sequence out. False when it is not in."""
        line = self._lines.get(sequence.tenant)
        if line is None or sequence not in line.sequences:
            return False
        del line.sequences[sequence]
        self.num_waiting -= 1
        if sequence is self._head:
            self._head, self._head_passed = None, False
        return True

    def next(self) -> Sequence | None:
        if self._head is not None and not self._head_passed:
            return self._head
        return self.first(self._head)

    def first(self, head: Sequence | None) -> Sequence | None:
        """The next sequence, but for the head, of the tenant that was served least."""
        while self._heap:
            served, _, _, line = self._heap[0]
            if served < line.tenant.served and line.sequences:
                heapq.heapreplace(self._heap, self._entry(line))
            elif (sequence := line.next(head)) is not None:
                return sequence
            else:
                self._set_aside(line)
        return None

    def pass_over(self, sequence: Sequence, *, keeps_place: bool) -> None:
        if keeps_place and self._head is None:
            self._head = sequence
        if sequence is self._head:
            self._head_passed = True
        else:
            line = self._lines[sequence.tenant]
            line.num_passed += 1
            self._walked.append(line)

    def rewind(self) -> None:
        self._head_passed = False
        for line in self._walked:
            line.num_passed = 0
            if line.sequences:
                self._push(line)
        self._walked.clear()

    def _set_aside(self, line: _Line) -> None:
        """Take the line on top off the heap: for good when it is empty, else until the step's end."""
        heapq.heappop(self._heap)
        line.in_heap = False
        if line.sequences:
            self._walked.append(line)
        else:
            del self._lines[line.tenant]

    def _push(self, line: _Line) -> None:
        if not line.in_heap:
            heapq.heappush(self._heap, self._entry(line))
            line.in_heap = True

    def _entry(self, line: _Line) -> tuple[float, float, int, _Line]:
        arrived_at = next(iter(line.sequences)).request.arrived_at
        return line.tenant.served, arrived_at, next(self._numbers), line
