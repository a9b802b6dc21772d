"""One sequence being generated, and the request that it belongs to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from gateway.engine.detokenizer import IncrementalDetokenizer
from gateway.engine.prompt_lookup import PromptLookup
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.sampling_row import SamplingRow
from gateway.engine.tenant import Tenant


class SequenceStatus(Enum):
    """Where a sequence is in its life. FINISHED is final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


_FINISHED: Final = SequenceStatus.FINISHED  # asked for each row of each step, where the class is slow to tell


@dataclass(eq=False, slots=True)
class Clock:
    """Counts the steps of the sequences that have a token in each."""

    now: int = 0


_STANDING: Final = Clock()


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's `n` sequences; all of its state.

    token_ids: the adapter's virtual tokens (ids from vocab_size on), the prompt, then the output as far as the host
    knows it; end_ids: the tokens that end it; max_tokens: the most that it may become.
    followers: the request's other sequences, while they wait for it to compute the prompt. tenant: set by the queue.
    last_step: the number of the last step that it is in; of a row, written when it stops being one.
    block_table: its cache blocks, a new list after each release; block_hashes: the chain over its full blocks, as far
    as hashed; num_sealed: how many of its blocks were offered to other sequences. slot: the adapter's slot while pinned
    (-1: the bare base). lookup: guesses its next tokens, where the request asked for it. drafts: guesses that a step in
    flight verifies, each in a row of its own; they count neither as tokens nor as computed. num_overtaken:
    how many were admitted before it for want of pages of adapters in a step.
    """

    request: RunningRequest
    index: int
    token_ids: list[int]
    prefix_root: bytes
    sampling: SamplingRow
    detokenizer: IncrementalDetokenizer
    end_ids: frozenset[int] = frozenset()
    lookup: PromptLookup | None = None
    status: SequenceStatus = SequenceStatus.WAITING
    followers: list[Sequence] = field(default_factory=list)
    priority: int = field(init=False)
    tenant: Tenant = field(default_factory=Tenant)
    max_tokens: int = field(init=False)
    drafts: list[int] = field(init=False)
    last_step: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_sealed: int = 0
    slot: int = -1
    pinned: bool = False
    num_overtaken: int = 0
    _num_tokens: int = field(init=False)  # this and the next at the clock's zero
    _num_computed: int = field(init=False, default=0)
    _clock: Clock = field(init=False, default=_STANDING)

    def __post_init__(self) -> None:
        self.priority = self.request.request.priority
        self._num_tokens = len(self.token_ids)
        self.max_tokens = self._num_tokens + self.request.max_tokens
        self.drafts = self.sampling.drafts

    @property
    def num_tokens(self) -> int:
        """The length of token_ids, and one for each step in flight that samples the sequence."""
        return self._num_tokens + self._clock.now

    @num_tokens.setter
    def num_tokens(self, number: int) -> None:
        self._num_tokens = number - self._clock.now

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in the cache, or will be after the steps in flight."""
        return self._num_computed + self._clock.now

    @num_computed.setter
    def num_computed(self, number: int) -> None:
        self._num_computed = number - self._clock.now

    @property
    def is_row(self) -> bool:
        """Whether it has a token in each step, by which `num_tokens` and `num_computed` grow."""
        return self._clock is not _STANDING

    def follow(self, clock: Clock | None) -> None:
        """Have `num_tokens` and `num_computed` grow with the clock from now on; without one they stay as they are."""
        new = clock if clock is not None else _STANDING
        passed = self._clock.now - new.now
        self._num_tokens += passed
        self._num_computed += passed
        self._clock = new

    @property
    def params(self) -> SamplingParams:
        """How its tokens are picked."""
        return self.request.request.sampling

    @property
    def adapter(self) -> AdapterRef | None:
        """The adapter version that it runs with, fixed at admission."""
        return self.request.request.adapter

    @property
    def num_output(self) -> int:
        """Tokens generated so far, as far as the host knows them."""
        return len(self.token_ids) - self.request.num_given

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the next steps must run through the model; 1 for a decoding sequence."""
        return self.num_tokens - self.num_computed

    def awaits_tokens(self, may_guess: bool) -> bool:
        """Whether to run it once its tokens in flight are known: drafts are among them, or a guess goes on there."""
        in_flight = self.num_tokens > len(self.token_ids)
        goes_on = may_guess and in_flight and self.lookup is not None and self.lookup.guess()
        return bool(self.drafts or goes_on)

    def known_tokens(self, start: int, num_tokens: int) -> list[int]:
        """Its tokens from `start` on, or its drafts where those begin; empty for a token that is in flight."""
        known = self.token_ids[start : start + num_tokens]
        return known or self.drafts[start - len(self.token_ids) :][:num_tokens]

    @property
    def finished(self) -> bool:
        """Whether its last delta has been made."""
        return self.status is _FINISHED


@dataclass(eq=False, slots=True)
class RunningRequest:
    """One accepted request: its sequences, its deadline of tokens and its clock (seconds, monotonic).

    num_drafts, num_accepted: tokens guessed for its sequences, and those of them that came.
    """

    request: GenerateRequest
    num_prompt: int
    max_tokens: int
    sequences: list[Sequence] = field(default_factory=list)
    num_cached: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    arrived_at: float = field(default_factory=time.monotonic)
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None

    @property
    def num_given(self) -> int:
        """Tokens that each sequence begins with: the adapter's virtual ones and the prompt's."""
        return self.request.num_virtual_tokens + self.num_prompt

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finished for sequence in self.sequences)

    @property
    def num_output(self) -> int:
        """Tokens generated by all its sequences."""
        return sum(sequence.num_output for sequence in self.sequences)
