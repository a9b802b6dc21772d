"""Which sequences run in the next step, and with how many tokens each."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

from adapters_store.errors import AdapterLoadFailed
from adapters_store.residency import AdapterResidency
from gateway.engine.block_manager import BlockManager
from gateway.engine.host_blocks import BlockCopy
from gateway.engine.sequence import Sequence, SequenceStatus

_LOOKAHEAD: Final = 32  # waiting sequences whose adapters are brought in before their turn


class Chunk(NamedTuple):
    """A sequence's part in one step: its tokens from `start` on."""

    sequence: Sequence
    start: int
    num_tokens: int


@dataclass(slots=True)
class SchedulerOutput:
    """One step's work: the chunks it runs, and the sequences that can never run (to be ended).

    number: of the step, counted from 1. Chunks of one token (decode rows) come first, by adapter slot. sampled: the
    sequences whose last token is in this step, in row order. saves, loads: the cache blocks that go to the host and
    come from it, in this order, before anything is computed.
    """

    number: int
    scheduled: list[Chunk] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, AdapterLoadFailed]] = field(default_factory=list)
    num_tokens: int = 0
    saves: list[BlockCopy] = field(default_factory=list)
    loads: list[BlockCopy] = field(default_factory=list)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence runs one token and samples the next."""
        return len(self.sampled) == len(self.scheduled) == self.num_tokens


class Scheduler:
    """First come, first served under a token budget; decode before prefill, prefill in chunks.

    A sequence keeps its adapter's pin from admission to its end, also while preempted. A sequence whose adapter is
    still loading is passed over; one whose adapter finds every slot pinned holds back the adapters behind it, so that
    it cannot starve. When blocks run out the last admitted sequence is preempted: its blocks go back, and later it
    finds again what the prefix cache still has of them, on the device or the host, and computes the rest.

    A step may be scheduled while the one before is in flight, that is before its `update`. What a step in flight uses
    stays as it is: nothing is preempted, and a sequence that ends gives its blocks and its pin back only when the last
    step that it is in is done.
    """

    def __init__(
        self,
        blocks: BlockManager,
        residency: AdapterResidency,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.blocks = blocks
        self.residency = residency
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._num_scheduled = 0  # steps
        self._num_done = 0
        self._ended_in_flight: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished or in flight."""
        return bool(self.waiting or self.running or self._ended_in_flight)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> SchedulerOutput:
        """Take blocks and slots for the next step, which the caller runs, and account for its tokens as computed.

        May come back empty while adapters load, and while a step in flight must end before anything else can run.
        """
        self.residency.poll()
        step: dict[Sequence, int] = {}
        output = SchedulerOutput(self._num_scheduled + 1)
        if self._schedule_running(step):
            self._admit(step, output)
        if self.waiting:
            upcoming = (sequence.adapter for sequence in islice(self.waiting, _LOOKAHEAD) if not sequence.pinned)
            self.residency.prefetch(adapter for adapter in upcoming if adapter is not None)
        if step:
            self._advance(step, output)
        return output

    def update(self, output: SchedulerOutput) -> None:
        """Account for a step that is done, steps in their order: what it computed may be shared.

        Called before the tokens that it sampled are appended to their sequences.
        """
        self._num_done = output.number
        size = self.blocks.block_size
        for sequence, start, num_tokens in output.scheduled:
            end = start + num_tokens
            if end // size > sequence.num_sealed and not sequence.finished:
                self.blocks.seal(sequence, end)
        self._release_ended()

    def abandon(self) -> None:
        """Account for steps in flight that nobody will `update`, after every sequence has been ended."""
        assert not self.waiting
        assert not self.running
        self._num_done = self._num_scheduled
        self._release_ended()
        self.blocks.forget_host()

    def finish(self, sequence: Sequence) -> None:
        """End a sequence at whatever stage it is; its blocks and its pin are free when no step in flight uses them."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self._ended_in_flight.append(sequence)
        self._release_ended()

    def check_integrity(self) -> None:
        """Assert that an idle scheduler holds nothing."""
        assert not self.has_work
        assert self.blocks.num_free == self.blocks.num_blocks
        self.blocks.check_integrity()

    def _schedule_running(self, step: dict[Sequence, int]) -> bool:
        """Fill `step` from the running sequences, decode first. False when blocks did not suffice for all of them.

        `step` is empty then if a step is in flight: what the next one could take is known when that is done.
        """
        enough = True
        budget = self.max_num_batched_tokens
        for sequence in self._runnable():
            num_tokens = min(sequence.num_tokens - sequence.num_computed, budget)
            if num_tokens == 0:
                break
            while sequence.status is SequenceStatus.RUNNING and not self.blocks.grow(
                sequence, sequence.num_computed + num_tokens
            ):
                enough = False
                if self._num_done < self._num_scheduled:
                    step.clear()
                    return False
                budget += self._preempt_last(step)
            if sequence.status is SequenceStatus.RUNNING:
                step[sequence] = num_tokens
                budget -= num_tokens
        return enough

    def _runnable(self) -> list[Sequence]:
        """The running sequences, decode first, without those whose last token is already in flight."""
        runnable = [s for s in self.running if s.num_tokens < s.max_tokens]
        if [s for s in runnable if s.num_tokens - s.num_computed > 1]:
            runnable.sort(key=lambda s: s.num_uncomputed > 1)
        return runnable

    def _preempt_last(self, step: dict[Sequence, int]) -> int:
        """Send the last admitted sequence back to the queue's head. Returns the tokens it had in this step."""
        victim = self.running.pop()
        victim.status = SequenceStatus.WAITING
        self.blocks.release(victim)
        self.waiting.appendleft(victim)
        self.num_preemptions += 1
        return step.pop(victim, 0)

    def _admit(self, step: dict[Sequence, int], output: SchedulerOutput) -> None:
        budget = self.max_num_batched_tokens - sum(step.values())
        passed_over: list[Sequence] = []
        slots_full = False
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.popleft()
            held_back = slots_full and sequence.adapter is not None and not sequence.pinned
            if held_back or _waits_for_leader(sequence) or not self._pin(sequence, output):
                passed_over.append(sequence)
                slots_full = slots_full or self._waits_for_room(sequence)
                continue
            self.blocks.adopt_prefix(sequence)
            num_tokens = min(sequence.num_uncomputed, budget)
            if not self.blocks.grow(sequence, sequence.num_computed + num_tokens, leave=self._reserve):
                self.blocks.release(sequence)
                passed_over.append(sequence)
                break
            output.loads += self.blocks.loads(sequence)
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            step[sequence] = num_tokens
            budget -= num_tokens
        self.waiting.extendleft(reversed(passed_over))

    def _advance(self, step: dict[Sequence, int], output: SchedulerOutput) -> None:
        """Make `step` the next step: its tokens count as computed, and those that it samples as tokens."""
        self._num_scheduled = output.number
        output.num_tokens = sum(step.values())
        output.saves = self.blocks.saves(output.loads)
        # Rows of one adapter lie together: kernels need not gather what is in a row already.
        for sequence, num_tokens in sorted(step.items(), key=lambda chunk: (chunk[1] > 1, chunk[0].slot)):
            output.scheduled.append(Chunk(sequence, sequence.num_computed, num_tokens))
            sequence.num_computed += num_tokens
            sequence.last_step = output.number
            if sequence.num_computed == sequence.num_tokens:
                sequence.num_tokens += 1
                output.sampled.append(sequence)

    @property
    def _reserve(self) -> int:
        """Blocks that admission leaves to the sequences already running, so that it does not cause preemption."""
        return len(self.running) // 2

    def _pin(self, sequence: Sequence, output: SchedulerOutput) -> bool:
        """Pin the sequence's adapter. False while it loads, and when it cannot be loaded at all."""
        if sequence.adapter is None or sequence.pinned:
            return True
        try:
            slot = self.residency.acquire(sequence.adapter)
        except AdapterLoadFailed as error:
            output.failed.append((sequence, error))
            return False
        if slot is None:
            return False
        sequence.slot, sequence.pinned = slot, True
        return True

    def _waits_for_room(self, sequence: Sequence) -> bool:
        return sequence.adapter is not None and self.residency.is_waiting_for_room(sequence.adapter.digest)

    def _release_ended(self) -> None:
        """Take blocks and pins back from the ended sequences that no step in flight uses."""
        ended, self._ended_in_flight = self._ended_in_flight, []
        for sequence in ended:
            if sequence.last_step > self._num_done:
                self._ended_in_flight.append(sequence)
            else:
                self.blocks.release(sequence)
                self._unpin(sequence)

    def _unpin(self, sequence: Sequence) -> None:
        if sequence.pinned and sequence.adapter is not None:
            self.residency.release(sequence.adapter.digest)
            sequence.slot, sequence.pinned = -1, False


def _waits_for_leader(sequence: Sequence) -> bool:
    """Whether the request's first sequence is still to compute the prompt that this one will find in the cache."""
    leader = sequence.request.sequences[0]
    if sequence is leader or leader.finished:
        return False
    # Its first token is known when the step that computed the end of the prompt is done.
    return leader.num_output == 0 or leader.num_computed < sequence.request.num_prompt
