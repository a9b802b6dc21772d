"""Logits to tokens, for a batch whose rows each have their own parameters.

The order is vLLM's: logit bias, minimum length, repetition, presence and frequency penalties, temperature,
min-p, top-k, top-p, then the draw. A row pays only for what it asks for, and the host waits for the device
once, when it asks for the result. A row may be sampled while the host does not know its last token yet: its number
is known, and penalties take the token where it lies on the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gateway.engine.draws import Draws
from gateway.engine.logit_edits import LogitEdits
from gateway.engine.pending import PendingTokens
from gateway.engine.sampling_row import SamplingRow
from gateway.engine.transfers import HostCopy, send_list
from lora_kernels.argmax import row_argmax


@dataclass(frozen=True, slots=True)
class RawLogprob:
    """Natural log probabilities by the model's own distribution, before any of the request's parameters.

    top_ids, top_logprobs: the `params.logprobs` most likely tokens, best first.
    """

    token_id: int
    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One entry a row. bad_rows: rows whose logits are not finite; their token and logprob mean nothing."""

    token_ids: list[int]
    logprobs: list[RawLogprob | None]
    bad_rows: list[int]


class Sampled:
    """One step's tokens: on the device at once, on the host when they have arrived.

    token_ids: int64 [num_rows], valid ids also of bad rows.
    """

    def __init__(self, plan: _Plan, token_ids: Tensor, parts: list[Tensor]) -> None:
        self.token_ids = token_ids
        self._plan = plan
        self._ends = np.cumsum([part.numel() for part in parts])
        # One copy for everything; fp64 holds token ids and fp32 values exactly.
        self._copy = HostCopy(torch.cat([part.double().flatten() for part in parts]))

    def result(self) -> SamplerOutput:
        """Waits for the device."""
        return self._plan.unpack(np.split(self._copy.wait(), self._ends[:-1]))


class Sampler:
    """Samples one token a row. What depends only on the batch's make-up is kept until that changes.

    eos_token_ids: what `min_tokens` forbids, beside each request's stop ids. invariant: log-probabilities are to
    depend on no other row, bit for bit.
    """

    def __init__(self, eos_token_ids: Iterable[int] = (), *, invariant: bool = False) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._invariant = invariant
        self._plan: _Plan | None = None

    def __call__(self, logits: Tensor, rows: list[SamplingRow], pending: PendingTokens | None = None) -> Sampled:
        """Sample from logits [len(rows), vocab_size], fp32, bf16 or fp16, rows contiguous, which are overwritten.

        pending: where the rows' last tokens are, unless the host knows them all. What edits or draws does so in fp32.
        """
        assert logits.shape[0] == len(rows)
        if self._plan is None or self._plan.rows != rows:
            self._plan = _Plan(rows, logits.shape[1], logits.device, self._eos_token_ids, self._invariant)
        return self._plan.run(logits, pending)


class _Plan:
    """Which rows of one batch need what, as index and parameter tensors."""

    def __init__(
        self,
        rows: list[SamplingRow],
        vocab_size: int,
        device: torch.device,
        eos_token_ids: tuple[int, ...],
        invariant: bool,
    ) -> None:
        self.rows = rows
        numbered = list(enumerate(rows))
        edited = [(i, row) for i, row in numbered if row.is_edited]
        edited_greedy = [i for i, row in edited if row.params.greedy]
        drawn = [(i, row) for i, row in numbered if not row.params.greedy]
        self._edits = LogitEdits(edited, vocab_size, device, eos_token_ids) if edited else None
        self._greedy = send_list(edited_greedy, np.int64, device) if edited_greedy else None
        self._draws = Draws(drawn, len(rows), device) if drawn else None
        self._drawn_rows = [i for i, _ in drawn]
        self._logprob_rows = [i for i, row in numbered if row.params.logprobs is not None]
        self._logprob_index = send_list(self._logprob_rows, np.int64, device)
        self._num_tops = [min(rows[i].params.logprobs or 0, vocab_size) for i in self._logprob_rows]
        self._invariant = invariant

    def run(self, logits: Tensor, pending: PendingTokens | None) -> Sampled:
        raw = logits[self._logprob_index].float() if self._logprob_rows else None
        highest, token_ids = row_argmax(logits)
        results = [highest, token_ids]
        if self._edits is not None or self._draws is not None:
            logits = logits.float().contiguous()
        if self._edits is not None:
            self._edits.apply(logits, pending)
        if self._greedy is not None:
            token_ids[self._greedy] = row_argmax(logits[self._greedy])[1]
        if self._draws is not None:
            results.append(self._draws.draw_into(token_ids, logits, pending))
        if raw is not None:
            logprobs = _raw_logprobs_by_row if self._invariant else _raw_logprobs
            results += logprobs(raw, token_ids[self._logprob_index], self._num_tops)
        return Sampled(self, token_ids, results)

    def unpack(self, parts: list[npt.NDArray[np.float64]]) -> SamplerOutput:
        is_finite = np.isfinite(parts[0])
        token_ids: list[int] = parts[1].astype(np.int64).tolist()
        if self._draws is not None:
            is_finite[self._drawn_rows] &= np.isfinite(parts[2])
        logprobs: list[RawLogprob | None] = [None] * len(self.rows)
        if self._logprob_rows:
            chosen, top_ids, top_logprobs = (part.reshape(len(self._logprob_rows), -1) for part in parts[-3:])
            for i, row in enumerate(self._logprob_rows):
                count = self.rows[row].params.logprobs
                ids = tuple(top_ids[i, :count].astype(np.int64).tolist())
                top = tuple(top_logprobs[i, :count].tolist())
                logprobs[row] = RawLogprob(token_ids[row], float(chosen[i, 0]), ids, top)
        return SamplerOutput(token_ids, logprobs, np.flatnonzero(~is_finite).tolist())


def _raw_logprobs(raw: Tensor, token_ids: Tensor, num_tops: list[int]) -> list[Tensor]:
    """[log probabilities of token_ids, ids of the top tokens, theirs] from raw logits [n, vocab]."""
    log_total = raw.logsumexp(-1, keepdim=True)
    top = raw.topk(max(num_tops))
    return [raw.gather(1, token_ids[:, None]) - log_total, top.indices, top.values - log_total]


def _raw_logprobs_by_row(raw: Tensor, token_ids: Tensor, num_tops: list[int]) -> list[Tensor]:
    """`_raw_logprobs`, each row by itself: the order of a sum, and which of equals is on top, depend on the others."""
    width = max(num_tops)
    rows = []
    for i, num_top in enumerate(num_tops):
        chosen, *tops = _raw_logprobs(raw[i : i + 1].clone(), token_ids[i : i + 1], [num_top])
        rows.append([chosen, *(torch.nn.functional.pad(top, (0, width - num_top)) for top in tops)])
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]
