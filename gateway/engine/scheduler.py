"""Which sequences run in the next step, and with how many tokens each."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from adapters_store.errors import AdapterLoadFailed
from adapters_store.residency import AdapterResidency
from gateway.engine.block_manager import BlockManager
from gateway.engine.sequence import Sequence, SequenceStatus


@dataclass(slots=True)
class SchedulerOutput:
    """One step's work: sequences with the number of tokens each runs, and those that can never run (to be ended).

    Sequences of one token (decode rows) come first. sampled: those whose last token is in this step, in row order.
    """

    scheduled: list[tuple[Sequence, int]] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, AdapterLoadFailed]] = field(default_factory=list)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence runs one token and samples the next."""
        return len(self.sampled) == len(self.scheduled) == self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole step."""
        return sum(num_tokens for _, num_tokens in self.scheduled)


class Scheduler:
    """First come, first served under a token budget; decode before prefill, prefill in chunks.

    A sequence keeps its adapter's pin from admission to its end, also while preempted. A sequence whose adapter is
    still loading is passed over; one whose adapter finds every slot pinned holds back the adapters behind it, so that
    it cannot starve. When blocks run out the last admitted sequence is preempted: its blocks go back and
    it is computed again later.
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

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> SchedulerOutput:
        """Take blocks and slots for the next step. May come back empty while adapters load."""
        self.residency.poll()
        step: dict[Sequence, int] = {}
        preempted = self._schedule_running(step)
        output = SchedulerOutput()
        if not preempted:
            self._admit(step, output)
        output.scheduled = sorted(step.items(), key=lambda item: item[1] > 1)
        output.sampled = [s for s, num_tokens in output.scheduled if num_tokens == s.num_uncomputed]
        return output

    def update(self, output: SchedulerOutput) -> None:
        """Account for a step that has run: its tokens are in the cache."""
        for sequence, num_tokens in output.scheduled:
            sequence.num_computed += num_tokens
            self.blocks.seal(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence at whatever stage it is; its blocks and its pin are free again."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.blocks.release(sequence)
        self._unpin(sequence)

    def check_integrity(self) -> None:
        """Assert that an idle scheduler holds nothing."""
        assert not self.has_work
        assert self.blocks.num_free == self.blocks.num_blocks
        self.blocks.check_integrity()

    def _schedule_running(self, step: dict[Sequence, int]) -> bool:
        """Fill `step` from the running sequences, decode first. True when any had to be preempted."""
        preempted = False
        budget = self.max_num_batched_tokens
        for sequence in sorted(self.running, key=lambda s: s.num_uncomputed > 1):
            num_tokens = min(sequence.num_uncomputed, budget)
            if num_tokens == 0:
                break
            while sequence.status is SequenceStatus.RUNNING and not self.blocks.grow(
                sequence, sequence.num_computed + num_tokens
            ):
                budget += self._preempt_last(step)
                preempted = True
            if sequence.status is SequenceStatus.RUNNING:
                step[sequence] = num_tokens
                budget -= num_tokens
        return preempted

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
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            step[sequence] = num_tokens
            budget -= num_tokens
        self.waiting.extendleft(reversed(passed_over))

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

    def _unpin(self, sequence: Sequence) -> None:
        if sequence.pinned and sequence.adapter is not None:
            self.residency.release(sequence.adapter.digest)
            sequence.slot, sequence.pinned = -1, False


def _waits_for_leader(sequence: Sequence) -> bool:
    """Whether the request's first sequence is still to compute the prompt that this one will find in the cache."""
    leader = sequence.request.sequences[0]
    return sequence is not leader and not leader.finished and leader.num_computed < sequence.request.num_prompt
