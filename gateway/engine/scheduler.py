"""Which sequences run in the next step, and with how many tokens each."""

from __future__ import annotations

from bisect import insort
from operator import attrgetter
from typing import Final

from adapters_store.errors import StoreError
from adapters_store.residency import AdapterResidency
from gateway.engine.batch_adapters import BatchAdapters
from gateway.engine.block_manager import BlockManager
from gateway.engine.decode_rows import DecodeRows
from gateway.engine.request import AdapterRef
from gateway.engine.scheduler_output import Chunk, SchedulerOutput
from gateway.engine.sequence import Clock, Sequence, SequenceStatus
from gateway.engine.speculation import Speculation
from gateway.engine.waiting_queue import WaitingQueue

# Virtual tokens of a prompt's token that is computed and of a token that is generated, as in the paper on VTC.
_PROMPT_COST: Final = 1
_OUTPUT_COST: Final = 2
_BY_PRIORITY: Final = attrgetter("priority")
_LOOKAHEAD: Final = 32  # waiting sequences whose adapters are brought in before their turn


class Scheduler:
    """Who is most urgent and was served least, under a token budget; decode before prefill, prefill in chunks.

    Waiting sequences run in the order of `WaitingQueue`: by priority, by what their tenants were served, by arrival.
    When blocks run out the sequence of the lowest priority is preempted, the last admitted among equals: its blocks and
    its adapter's pin go back. Later it finds again what the prefix cache still has of them, on the device or the host,
    and computes the rest. A waiting sequence preempts those of lower priority too when it lacks blocks, a place among
    `max_num_seqs` or room for its adapter, and theirs would do; they run again only after it.

    A sequence whose adapter is still loading is passed over. One that finds too few blocks holds back all behind it, as
    does one whose adapter waits for pages that the cache is to give back, and one whose adapter finds no room such
    adapters as would take some of what it lacks; each is the next of its priority then, so that it cannot starve.
    `max_adapter_pages` limits the pages of distinct adapters that run in one step (an adapter of more pages runs with
    no other adapter): at the limit those whose adapter runs already go first (`BatchAdapters`).

    Prompts are computed by priority, by what their tenants were served, by admission. One that would take all that is
    left of a step leaves half of it where one that is more urgent waits, or one of a tenant that was served less; what
    nobody is admitted to take of that, it gets back.

    The first of a request's sequences computes the prompt; the others wait for it outside the queue, then share its
    blocks.

    A step may be scheduled while the one before is in flight, that is before its `update`. What a step in flight uses
    stays as it is: nothing is preempted, and a sequence that ends gives its blocks and its pin back only when the last
    step that it is in is done.

    Sequences that speculate get drafts from what a step has left (`Speculation`), up to `max_rows` rows in all.

    Sequences that decode without drafts are rows (`DecodeRows`): they are in every step, and go forward together. So
    that there is a token of each step for whoever runs, no more sequences run than `max_num_batched_tokens`.
    """

    def __init__(
        self,
        blocks: BlockManager,
        residency: AdapterResidency,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_rows: int,
        max_adapter_pages: int | None = None,
    ) -> None:
        self.blocks = blocks
        self.residency = residency
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.speculation = Speculation(blocks, max_num_batched_tokens=max_num_batched_tokens, max_rows=max_rows)
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # by priority, then by admission
        self.num_preemptions = 0
        self._rows = DecodeRows()
        self._gone: set[Sequence] = set()  # which the rows still have
        self._clock = Clock()  # of the rows
        self._apart: dict[Sequence, None] = {}  # those that run, in no rows, by admission
        self._adapters = BatchAdapters(max_adapter_pages)
        self._waits_to_preempt = False
        self._num_scheduled = 0  # steps
        self._num_done = 0
        self._ended_in_flight: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished or in flight."""
        return bool(self.waiting or self.running or self._ended_in_flight)

    def add(self, sequence: Sequence) -> None:
        """Queue the first sequence of a new request."""
        self.waiting.add(sequence)
        self.speculation.add(sequence.request.sequences)

    def schedule(self) -> SchedulerOutput:
        """Take blocks and slots for the next step, which the caller runs, and account for its tokens as computed.

        May come back empty while adapters load, and while a step in flight must end before anything else can run.
        """
        output = SchedulerOutput(self._num_scheduled + 1)
        if self._waits_to_preempt and self._is_in_flight:
            return output
        self._waits_to_preempt = False
        step: dict[Sequence, int] = {}
        halved: list[Sequence] = []
        self._regroup()
        has_blocks = self._schedule_running(step, halved)
        if self._waits_to_preempt:
            return output
        if has_blocks:
            self.residency.poll(is_idle=not self.running)
            self._admit(step, output)
            self._give_back(step, halved)
            self.waiting.rewind()
            upcoming = (sequence.adapter for sequence in self.waiting.soon(_LOOKAHEAD))
            self.residency.prefetch(adapter for adapter in upcoming if adapter is not None)
        if self.speculation:
            self.speculation.draft(step, self._num_rows, leave=self._reserve)
        if step or self._num_rows:
            self._advance(step, output)
        elif not self._is_in_flight:
            self.blocks.drop_saves()
        return output

    def update(self, output: SchedulerOutput) -> None:
        """Account for a step that is done, steps in their order: what it computed may be shared.

        Called before the tokens that it sampled are appended to their sequences.
        """
        self._num_done = output.number
        if self.blocks.enable_prefix_caching:
            size = self.blocks.block_size
            for sequence, end in output.rows.filling(size):
                if not sequence.finished:
                    self.blocks.seal(sequence, end)
            for sequence, start, num_tokens in output.chunks:
                end = start + num_tokens
                # What lies beyond the known tokens is a draft: its block waits for `accept`.
                if end // size > sequence.num_sealed and end <= len(sequence.token_ids) and not sequence.finished:
                    self.blocks.seal(sequence, end)
        self._release_ended()

    def accept(self, sequence: Sequence) -> bool:
        """Whether the next draft of a step that is done is what the sequence's last token turned out to be.

        It is a token as any other then, computed already; if not, nothing is left of it and of those behind it.
        """
        if not self.speculation.verify(sequence):
            return False
        sequence.num_computed += 1
        sequence.num_tokens += 1
        sequence.tenant.charge(_OUTPUT_COST)
        self.blocks.seal(sequence, sequence.num_computed)
        return True

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
            self._stop_running(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.discard(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.speculation.remove(sequence)
        self._ended_in_flight.append(sequence)
        self._release_ended()

    def check_integrity(self) -> None:
        """Assert that an idle scheduler holds nothing."""
        assert not self.has_work
        assert not self._num_rows
        assert not self._apart
        assert self.blocks.num_free == self.blocks.num_blocks
        self.blocks.check_integrity()

    def _regroup(self) -> None:
        """Take those out of the rows that are done, and in those that decode from now on."""
        for sequence in self._rows.ending():
            self._leave_rows(sequence)
        self._drop_gone()
        joining: list[Sequence] = []
        for sequence in list(self._apart):
            if sequence.num_tokens >= sequence.max_tokens:
                del self._apart[sequence]  # its last token is in flight
            elif _decodes(sequence) and sequence.lookup is None:
                del self._apart[sequence]
                sequence.follow(self._clock)
                joining.append(sequence)
        if joining:
            self._rows = self._rows.joined_by(joining)

    def _leave_rows(self, sequence: Sequence) -> None:
        sequence.follow(None)
        sequence.last_step = self._num_scheduled
        self._gone.add(sequence)

    def _drop_gone(self) -> None:
        if self._gone:
            self._rows, self._gone = self._rows.without(self._gone), set()

    @property
    def _num_rows(self) -> int:
        return len(self._rows) - len(self._gone)

    def _budget(self, step: dict[Sequence, int]) -> int:
        """How many tokens the step may still take."""
        return self.max_num_batched_tokens - self._num_rows - sum(step.values())

    def _schedule_running(self, step: dict[Sequence, int], halved: list[Sequence]) -> bool:
        """Fill `step` from the running sequences behind the rows. False when blocks did not suffice for all of them.

        Where it has to wait for the step in flight (`_may_preempt`), what the next one could take is known when that
        is done. halved: gets those that have left some of the step to who waits.
        """
        has_blocks = True
        for sequence in self._rows.entering(self.blocks.block_size):
            has_blocks &= self._take_more_blocks(sequence, sequence.num_computed + 1, step)
            if self._waits_to_preempt:
                return False
        budget = self._budget(step)
        for sequence in self._runnable():
            num_tokens = sequence.num_uncomputed
            if num_tokens >= budget:
                if budget == 0:
                    break
                num_tokens = budget
                if self._leaves_some(sequence):
                    num_tokens = -(-budget // 2)
                    halved.append(sequence)
            if not self._take_more_blocks(sequence, sequence.num_computed + num_tokens, step):
                if self._waits_to_preempt:
                    return False
                has_blocks = False
                budget = self._budget(step)
            if sequence.status is SequenceStatus.RUNNING:
                step[sequence] = num_tokens
                budget -= num_tokens
        return has_blocks

    def _take_more_blocks(self, sequence: Sequence, num_tokens: int, step: dict[Sequence, int]) -> bool:
        """Take blocks for a running sequence's first tokens; while too few are free, preempt the last, maybe itself.

        False when too few were free; with `_waits_to_preempt` it has not got them then.
        """
        is_enough = True
        while sequence.status is SequenceStatus.RUNNING and not self.blocks.grow(sequence, num_tokens):
            is_enough = False
            if not self._may_preempt():
                break
            self._preempt_last(step)
        return is_enough

    def _runnable(self) -> list[Sequence]:
        """Who runs behind the rows, decode first, without those whose last token in flight had better be known."""
        decoding = [s for s in self._apart if s.num_uncomputed == 1]
        prompts = [s for s in self._apart if s.num_uncomputed > 1]
        runnable = sorted(decoding, key=_BY_PRIORITY) + sorted(prompts, key=lambda s: (s.priority, s.tenant.served))
        if self.speculation:
            return [s for s in runnable if not self.speculation.had_better_wait(s)]
        return runnable

    def _leaves_some(self, sequence: Sequence) -> bool:
        """Whether the next that waits should not have to wait for all of this one's prompt."""
        if len(self.running) >= self.max_num_seqs or (other := self.waiting.next()) is None:
            return False
        if other.priority != sequence.priority:
            return other.priority < sequence.priority
        return other.tenant is not sequence.tenant and other.tenant.served <= sequence.tenant.served

    def _preempt_last(self, step: dict[Sequence, int]) -> None:
        """Preempt the last admitted of the lowest priority."""
        self._preempt(self.running[-1], step)

    def _preempt(self, victim: Sequence, step: dict[Sequence, int]) -> None:
        """Send a sequence back to the head of its tenant's queue, with what it had in this step."""
        self._stop_running(victim)
        victim.status = SequenceStatus.WAITING
        self.blocks.release(victim)
        self._unpin(victim)
        self.waiting.add(victim, first=True)
        self.num_preemptions += 1
        step.pop(victim, None)

    def _admit(self, step: dict[Sequence, int], output: SchedulerOutput) -> None:
        budget = self._budget(step)
        self._adapters.begin_step()
        while budget > 0 and (sequence := self._next_waiting()) is not None:
            if not self._take_adapter(sequence, step, output):
                lacks_blocks = self._waits_for_lent_pages(sequence)
                self.waiting.pass_over(sequence, keeps_place=lacks_blocks or self._adapters.keeps_place(sequence))
                if lacks_blocks:
                    break
                continue
            parent, copied = _parent(sequence), None
            if parent is None:
                num_cached = self.blocks.adopt_prefix(sequence)
                sequence.num_computed = max(num_cached, self.residency.num_prefix_tokens(sequence.slot))
            else:
                copied = self.blocks.fork(parent, sequence)
                num_cached = sequence.num_computed
            num_tokens = min(sequence.num_uncomputed, budget)
            if not self._take_blocks(sequence, num_tokens, step):
                self.blocks.release(sequence)
                self._unpin(sequence)
                self.waiting.pass_over(sequence, keeps_place=True)
                break
            self.blocks.count_reuse(sequence, num_cached)
            if parent is None:
                output.loads += self.blocks.loads(sequence, num_cached)
                if num_cached < sequence.num_computed:
                    output.prefixes.append(Chunk(sequence, num_cached, sequence.num_computed - num_cached))
            elif copied is not None:
                output.copies.append((copied, sequence.block_table[-1]))
            self._start_running(sequence)
            step[sequence] = num_tokens
            budget -= num_tokens

    def _give_back(self, step: dict[Sequence, int], halved: list[Sequence]) -> None:
        """Give what admission has left of the step to those that had made room for it."""
        left = self._budget(step)
        for sequence in halved:
            if sequence not in step:
                continue  # preempted by who was admitted
            num_tokens = min(sequence.num_uncomputed, step[sequence] + left)
            if self.blocks.grow(sequence, sequence.num_computed + num_tokens, leave=self._reserve, may_borrow=False):
                left -= num_tokens - step[sequence]
                step[sequence] = num_tokens

    def _next_waiting(self) -> Sequence | None:
        """The next that may run; when no more may, the next that may preempt."""
        if len(self.running) < self.max_num_seqs:
            return self.waiting.next()
        return self.waiting.next(before=self.running[-1].priority)

    def _take_adapter(self, sequence: Sequence, step: dict[Sequence, int], output: SchedulerOutput) -> bool:
        """Pin the sequence's adapter, if it has one. False while it loads or finds no room, or when it has failed."""
        adapter = sequence.adapter
        if adapter is None:
            return True
        if self._adapters.holds_back(sequence, adapter):
            return False
        while True:
            has_pages = self._adapters.has_room(adapter)
            try:
                slot = self.residency.acquire(adapter) if has_pages else None
            except StoreError as error:
                output.failed.append((sequence, error))
                return False
            if slot is not None:
                sequence.slot, sequence.pinned = slot, True
                return True
            if has_pages and self.residency.exceeds_share(adapter):
                self._adapters.wait_for_own(adapter.tenant)
                return False
            if has_pages and not self.residency.is_waiting_for_room(adapter.digest):
                return False
            if not self._make_adapter_yield(sequence, adapter, step, has_pages=has_pages):
                if has_pages:
                    self._adapters.wait_for_slot(sequence, self.residency.contention(adapter.digest))
                else:
                    self._adapters.wait_for_pages(sequence)
                return False

    def _waits_for_lent_pages(self, sequence: Sequence) -> bool:
        return sequence.adapter is not None and self.residency.is_waiting_for_lent_pages(sequence.adapter.digest)

    def _make_adapter_yield(
        self, sequence: Sequence, adapter: AdapterRef, step: dict[Sequence, int], *, has_pages: bool
    ) -> bool:
        """Preempt all that run with an adapter which nobody as urgent as the sequence uses, for what its own lacks.

        has_pages: that is room on the device, not pages of a step. False if all such adapters together would not do.
        """
        if not self.running or self.running[-1].priority <= sequence.priority:
            return False
        adapted = [(s, s.adapter.digest) for s in self.running if s.adapter is not None]
        kept = {digest for s, digest in adapted if s.priority <= sequence.priority}
        yielding = [digest for _, digest in reversed(adapted) if digest not in kept]
        if has_pages:
            yielding = list(filter(self.residency.contention(adapter.digest), yielding))
            would_do = self.residency.would_fit(adapter.digest, yielding)
        else:
            would_do = self._adapters.has_room(adapter, set(yielding))
        if not yielding or not would_do or not self._may_preempt():
            return False
        for victim in [s for s, digest in adapted if digest == yielding[0]]:
            self._preempt(victim, step)
        return True

    def _take_blocks(self, sequence: Sequence, num_tokens: int, step: dict[Sequence, int]) -> bool:
        """Take blocks for the sequence's next tokens and its place among those that run, from others if need be."""
        end = sequence.num_computed + num_tokens
        while (
            not (has_blocks := self.blocks.grow(sequence, end, leave=self._reserve))
            or len(self.running) >= self.max_num_seqs
        ):
            less_urgent = [s for s in self.running if s.priority > sequence.priority]
            given_up = sum(len(s.block_table) for s in less_urgent)
            would_do = has_blocks or self.blocks.num_lacking(sequence, end) <= given_up
            if not less_urgent or not would_do or not self._may_preempt():
                return False
            self._preempt_last(step)
        return True

    def _may_preempt(self) -> bool:
        """Whether no step is in flight; else the next one is scheduled when there is none."""
        self._waits_to_preempt = self._is_in_flight
        return not self._is_in_flight

    def _start_running(self, sequence: Sequence) -> None:
        self.waiting.take(sequence)
        if sequence.last_step == 0:  # what is computed again after a preemption is no service
            sequence.tenant.charge(_PROMPT_COST * sequence.num_uncomputed)
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=_BY_PRIORITY)
        self._apart[sequence] = None
        self._adapters.add(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._apart.pop(sequence, None)
        if sequence.is_row:
            self._leave_rows(sequence)
        if not self.running:
            self._drop_gone()
        self._adapters.remove(sequence)

    def _advance(self, step: dict[Sequence, int], output: SchedulerOutput) -> None:
        """Make the rows and `step` the next step: its tokens count as computed, and those that it samples as tokens."""
        self._num_scheduled = output.number
        self._drop_gone()
        output.num_tokens = len(self._rows) + sum(step.values())
        moves = self.blocks.move(self.running, spared={target for _, target in output.copies})
        output.copies += moves
        output.saves = self.blocks.saves(output.loads)
        self._advance_rows(output, have_moved=bool(moves))
        if step:
            self._advance_apart(step, output)

    def _advance_rows(self, output: SchedulerOutput, *, have_moved: bool) -> None:
        rows = self._rows.moved() if have_moved else self._rows
        output.rows = rows.in_blocks(self.blocks.block_size)
        output.sampled = rows.sequences
        self._rows = output.rows.advanced()
        self._clock.now += 1
        for tenant, number in rows.tenants.items():
            tenant.charge(_OUTPUT_COST * number)

    def _advance_apart(self, step: dict[Sequence, int], output: SchedulerOutput) -> None:
        output.sampled = output.sampled.copy()
        # Rows of one adapter lie together: kernels need not gather what is in a row already.
        for sequence, num_tokens in sorted(step.items(), key=lambda chunk: (chunk[1] > 1, chunk[0].slot)):
            start = sequence.num_computed
            output.chunks.append(Chunk(sequence, start, num_tokens))
            sequence.num_computed = computed = start + num_tokens
            sequence.last_step = output.number
            if computed == sequence.num_tokens:
                sequence.num_tokens = computed + 1
                sequence.tenant.charge(_OUTPUT_COST)
                output.sampled.append(sequence)
                if sequence.followers:
                    self._queue_followers(sequence)
                if sequence.drafts:
                    self._add_drafts(sequence, output)

    @staticmethod
    def _add_drafts(sequence: Sequence, output: SchedulerOutput) -> None:
        output.num_tokens += len(sequence.drafts)
        for number in range(1, len(sequence.drafts) + 1):
            output.drafted[len(output.sampled)] = number
            output.sampled.append(sequence)
            output.chunks.append(Chunk(sequence, sequence.num_computed + number - 1, 1))

    def _queue_followers(self, sequence: Sequence) -> None:
        """Queue those that waited for the prompt, before all others of their tenant."""
        for follower in reversed(sequence.followers):
            self.waiting.add(follower, first=True)
        sequence.followers = []

    @property
    def _is_in_flight(self) -> bool:
        return self._num_done < self._num_scheduled

    @property
    def _reserve(self) -> int:
        """Blocks that admission leaves to the sequences already running, so that it does not cause preemption."""
        return len(self.running) // 2

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


def _decodes(sequence: Sequence) -> bool:
    """Whether each step computes one of its own tokens from now on."""
    return sequence.num_uncomputed == 1 and sequence.num_computed >= sequence.request.num_given


def _parent(sequence: Sequence) -> Sequence | None:
    """One of the request's other sequences that has computed the prompt in a step before, and runs."""
    request = sequence.request
    if len(request.sequences) == 1 or sequence.num_tokens > request.num_given:
        return None
    ready = (s for s in request.sequences if s.status is SequenceStatus.RUNNING)
    return next((s for s in ready if s.num_computed >= request.num_given), None)
