"""What sampling keeps of a sequence from step to step."""

from __future__ import annotations

import secrets
from copy import copy
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from gateway.engine.pending import IntArray, PendingTokens
from gateway.engine.random_stream import random_stream
from gateway.engine.sampling_params import SamplingParams

_EMPTY: Final = np.empty(0, dtype=np.int64)


@dataclass(slots=True, eq=False)
class SamplingRow:
    """What the sampler keeps of one sequence: made once, passed at every step of the sequence's life.

    token_ids is the sequence's own list, `num_prompt` of the prompt and then those that the engine appends; the first
    `num_virtual` of the prompt are an adapter's, no tokens of the vocabulary, and not counted as seen. index:
    which of the request's `n` sequences. Random numbers depend on (seed, index, number of output tokens) only; without
    `params.seed` the sequence draws a seed of its own. drafts: guessed tokens, written by the scheduler; of them a row
    made by `ahead` counts the first num_ahead as output.
    """

    params: SamplingParams
    token_ids: list[int]
    num_prompt: int
    index: int = 0
    num_virtual: int = 0
    drafts: list[int] = field(default_factory=list)
    num_ahead: int = 0
    stream: np.uint64 = field(init=False)
    is_penalized: bool = field(init=False)
    is_edited: bool = field(init=False)
    is_filtered: bool = field(init=False)
    _seen: IntArray = field(init=False, default_factory=lambda: _EMPTY)
    _num_seen: int = field(init=False, default=0)
    _ahead: list[SamplingRow] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        p = self.params
        self.stream = random_stream(p.seed if p.seed is not None else secrets.randbits(64), self.index)
        self.is_penalized = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)
        self.is_edited = self.is_penalized or bool(p.logit_bias) or p.min_tokens > 0
        self.is_filtered = p.min_p > 0.0 or p.top_k > 0 or p.top_p < 1.0

    def ahead(self, num_drafts: int) -> SamplingRow:
        """The row of the same sequence once its first `num_drafts` (1 or more) drafts are tokens; made once."""
        while len(self._ahead) < num_drafts:
            self._ahead.append(copy(self))
            self._ahead[-1].num_ahead = len(self._ahead)
        return self._ahead[num_drafts - 1]

    def seen(self) -> tuple[IntArray, IntArray]:
        """(prompt and output token ids, output token ids); copies only what is new since the last call."""
        known = len(self.token_ids)
        total = known + self.num_ahead
        if total > len(self._seen):
            grown = np.empty(total + total // 2 + 64, dtype=np.int64)
            grown[: self._num_seen] = self._seen[: self._num_seen]
            self._seen = grown
        self._seen[self._num_seen : known] = self.token_ids[self._num_seen :]
        self._seen[known:total] = self.drafts[: self.num_ahead]
        self._num_seen = known
        return self._seen[self.num_virtual : total], self._seen[self.num_prompt : total]


class OutputCounts:
    """How many tokens the sequences of some rows of a batch have generated, from step to step.

    rows: (place in the batch, row).
    """

    def __init__(self, rows: list[tuple[int, SamplingRow]]) -> None:
        self._places = np.array([place for place, _ in rows], np.int64)
        self._token_ids = [row.token_ids for _, row in rows]
        self._beside = np.array([row.num_ahead - row.num_prompt for _, row in rows], np.int64)

    def now(self, pending: PendingTokens | None) -> IntArray:
        """The numbers of tokens, a pending one included: int64 [len(rows)]."""
        known = np.fromiter(map(len, self._token_ids), np.int64, len(self._token_ids)) + self._beside
        return known if pending is None else known + pending.is_pending[self._places]
