"""Logits to tokens, for a batch whose rows each have their own parameters.

The order is vLLM's: logit bias, minimum length, repetition, presence and frequency penalties, temperature,
min-p, top-k, top-p, then the draw. A row pays only for what it asks for, and the host waits for the device
once, when it asks for the result. A row may be sampled while the host does not know its last token yet: its number
is known, and penalties take the token where it lies on the device.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gateway.engine.pending import IntArray, PendingTokens, resolve
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.transfers import HostCopy, send
from lora_kernels.argmax import row_argmax

UIntArray = npt.NDArray[np.uint64]

_CHUNK: Final = 64
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
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
    is_plain: bool = field(init=False)
    _seen: IntArray = field(init=False, default_factory=lambda: _EMPTY)
    _num_seen: int = field(init=False, default=0)
    _ahead: list[SamplingRow] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        p = self.params
        self.stream = _stream(p.seed if p.seed is not None else secrets.randbits(64), self.index)
        self.is_penalized = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)
        self.is_edited = self.is_penalized or bool(p.logit_bias) or p.min_tokens > 0
        self.is_filtered = p.min_p > 0.0 or p.top_k > 0 or p.top_p < 1.0
        self.is_plain = p.greedy and not self.is_edited and p.logprobs is None

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

    @property
    def num_output(self) -> int:
        """Tokens generated so far, as far as the host knows them."""
        return len(self.token_ids) - self.num_prompt + self.num_ahead


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
        self._edits = _Edits(edited, vocab_size, device, eos_token_ids) if edited else None
        self._greedy = _send(edited_greedy, np.int64, device) if edited_greedy else None
        self._draws = _Draws(drawn, len(rows), device) if drawn else None
        self._drawn_rows = [i for i, _ in drawn]
        self._logprob_rows = [i for i, row in numbered if row.params.logprobs is not None]
        self._logprob_index = _send(self._logprob_rows, np.int64, device)
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


class _Edits:
    """Changes to single logits: bias, minimum length, penalties. The cost is by the tokens concerned."""

    def __init__(
        self,
        rows: list[tuple[int, SamplingRow]],
        vocab_size: int,
        device: torch.device,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._device = device
        bias = {
            i * vocab_size + token_id: value
            for i, row in rows
            for token_id, value in row.params.logit_bias.items()
            if 0 <= token_id < vocab_size
        }
        self._vocab_size = vocab_size
        self._bias_index = _send(list(bias), np.int64, device) if bias else None
        self._bias = _send(list(bias.values()), np.float32, device)
        self._enders = [
            (i, row, _ids_within(eos_token_ids + row.params.stop_token_ids, vocab_size) + i * vocab_size)
            for i, row in rows
            if row.params.min_tokens > 0
        ]
        self._penalized = [(i, row) for i, row in rows if row.is_penalized]

    def apply(self, logits: Tensor, pending: PendingTokens | None) -> None:
        """Change logits [num_rows, vocab_size] in place."""
        flat = logits.view(-1)
        if self._bias_index is not None:
            flat.index_add_(0, self._bias_index, self._bias)
        numbers = _num_outputs([(i, row) for i, row, _ in self._enders], pending)
        forbidden = [
            ids for (_, row, ids), number in zip(self._enders, numbers, strict=True) if number < row.params.min_tokens
        ]
        if forbidden:
            flat.index_fill_(0, send(np.concatenate(forbidden), self._device), -torch.inf)
        self._penalize(flat, pending)

    def _penalize(self, flat: Tensor, pending: PendingTokens | None) -> None:
        repeated, repeated_by, put_out, presences, frequencies = [], [], [], [], []
        for i, row in self._penalized:
            params = row.params
            seen, outputs = row.seen()
            if params.repetition_penalty != 1.0:
                repeated.append((i, seen))
                repeated_by.append(params.repetition_penalty)
            if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
                put_out.append((i, outputs))
                presences.append(params.presence_penalty)
                frequencies.append(params.frequency_penalty)
        if repeated:
            index, (penalty,) = self._spread(repeated, [repeated_by], pending)
            values = flat[index]
            # A token seen twice is written twice with one value: once penalized.
            flat[index] = torch.where(values > 0, values / penalty, values * penalty)
        if put_out:
            index, (presence, frequency) = self._spread(put_out, [presences, frequencies], pending)
            flat[index] = flat[index] - presence
            flat.index_add_(0, index, -frequency)

    def _spread(
        self, tokens: list[tuple[int, IntArray]], weights: list[list[float]], pending: PendingTokens | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Where the rows' tokens lie in the flat logits, the pending ones too, and each row's weights at its tokens."""
        rows = [i for i, _ in tokens]
        ids = [known for _, known in tokens]
        if pending is not None:
            ids = [self._with_pending(known, i, pending) for i, known in tokens]
        lengths = [len(part) for part in ids]
        index = send(np.concatenate(ids), self._device)
        if pending is not None:
            index = resolve(index, pending.token_ids)
        starts = np.repeat(np.array(rows, dtype=np.int64) * self._vocab_size, lengths)
        spread = [np.repeat(np.array(values, dtype=np.float32), lengths) for values in weights]
        return index + send(starts, self._device), [send(values, self._device) for values in spread]

    @staticmethod
    def _with_pending(known: IntArray, row: int, pending: PendingTokens) -> IntArray:
        return np.append(known, pending.marks[row]) if pending.is_pending[row] else known


class _Draws:
    """The rows that draw at random: temperature, filters, one uniform number each."""

    def __init__(self, rows: list[tuple[int, SamplingRow]], num_rows: int, device: torch.device) -> None:
        self._device = device
        self._numbered = rows
        self._rows = _send([i for i, _ in rows], np.int64, device)
        self._takes_all = len(rows) == num_rows
        self._streams = np.array([row.stream for _, row in rows], dtype=np.uint64)
        temperatures = [row.params.temperature for _, row in rows]
        self._temperatures = _send(temperatures, np.float32, device)[:, None]
        self._is_tempered = set(temperatures) != {1.0}
        filtered = [(i, row.params) for i, (_, row) in enumerate(rows) if row.is_filtered]
        self._filter = _Filter(filtered, len(rows), device) if filtered else None

    def draw_into(self, token_ids: Tensor, logits: Tensor, pending: PendingTokens | None) -> Tensor:
        """Draw the rows' tokens into `token_ids`; returns each row's mass [num_drawn]."""
        mine = logits if self._takes_all else logits[self._rows]
        if self._is_tempered:
            mine.div_(self._temperatures)
        # Filters work on probabilities: a mask of -inf in the logits makes exp() four times slower on a CPU.
        probs = mine.softmax(-1)
        if self._filter is not None:
            self._filter.apply(probs)
        token_ids[self._rows], totals = _draw(probs, self._uniforms(pending))
        return totals

    def _uniforms(self, pending: PendingTokens | None) -> Tensor:
        """One number in [0, 1) a row: step `position` of SplitMix64 from the state `stream`."""
        steps = _num_outputs(self._numbered, pending).astype(np.uint64) + np.uint64(1)
        uniforms = (_mix(self._streams + steps * _GOLDEN) >> np.uint64(11)) * 2.0**-53
        return send(uniforms, self._device)[:, None]


class _Filter:
    """min-p, top-k and top-p as thresholds: smaller probabilities become zero, equal ones live or die together."""

    def __init__(self, rows: list[tuple[int, SamplingParams]], num_rows: int, device: torch.device) -> None:
        params = [p for _, p in rows]
        self._rows = _send([i for i, _ in rows], np.int64, device)
        self._takes_all = len(rows) == num_rows
        self._min_p = _send([p.min_p for p in params], np.float32, device)[:, None]
        self._has_min_p = any(p.min_p > 0.0 for p in params)
        top_ks = [p.top_k if p.top_k > 0 else torch.iinfo(torch.int64).max for p in params]
        self._top_k = _send(top_ks, np.int64, device)[:, None]
        self._top_p = _send([p.top_p for p in params], np.float64, device)[:, None]
        self._has_top_p = any(p.top_p < 1.0 for p in params)
        self._has_top_k = any(p.top_k > 0 for p in params)
        self._largest_k = max(top_ks)

    def apply(self, probs: Tensor) -> None:
        """Set what is filtered out of probs [num_rows, vocab_size] to zero."""
        mine = probs if self._takes_all else probs[self._rows]
        if self._has_min_p:
            _drop_below(mine, mine.amax(-1, keepdim=True) * self._min_p)
        if self._has_top_k or self._has_top_p:
            _drop_below(mine, self._top_threshold(mine))
        if not self._takes_all:
            probs[self._rows] = mine

    def _top_threshold(self, probs: Tensor) -> Tensor:
        vocab_size = probs.shape[1]
        size = min(self._largest_k, vocab_size)
        if size == vocab_size and probs.device.type == "cpu":
            # A full sort of [64, 8192] takes 38 ms on one CPU core; the largest 64 take 2 ms and mostly
            # suffice. Not on a GPU: to look whether they suffice would make the host wait.
            size = min(_CHUNK, vocab_size)
            threshold, is_enough = self._threshold_by_head(probs, size)
            while not is_enough.all():
                size = min(8 * size, vocab_size)
                threshold, is_enough = self._threshold_by_head(probs, size)
            return threshold
        return self._threshold_by_head(probs, size)[0]

    def _threshold_by_head(self, probs: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The thresholds [n, 1] that the `size` largest give, and where [n, 1] those are enough.

        Drops by top-k on the way, as top-p counts what top-k left.
        """
        vocab_size = probs.shape[1]
        top_k = self._top_k.clamp(max=vocab_size)
        head = probs.topk(size).values
        has_kth = top_k <= size
        kth = torch.where(has_kth, head.gather(1, top_k.clamp(max=size) - 1), 0.0)
        if not self._has_top_p:
            return kth, has_kth | (top_k == vocab_size)
        if self._has_top_k:
            _drop_below(probs, kth)
        head = head.double() * (head >= kth)
        # Kept while the mass before it is under top_p; the first always.
        mass = self._top_p * probs.sum(-1, keepdim=True)
        num_kept = ((head.cumsum(-1) - head) < mass).sum(-1, keepdim=True).clamp(min=1)
        is_whole = self._top_p >= 1.0
        pth = torch.where(is_whole, kth, head.gather(1, num_kept - 1).float())
        return pth, has_kth | ((top_k == vocab_size) & (is_whole | (num_kept < size)))


def _drop_below(probs: Tensor, threshold: Tensor) -> None:
    # A sixth of the time of masked_fill_ with a bool mask, on a CPU.
    keep = torch.empty_like(probs)
    torch.ge(probs, threshold, out=keep)
    probs.mul_(keep)


def _draw(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Invert each row's distribution function at uniforms [n, 1]: (token ids [n], sums of probs [n]).

    Probabilities [n, vocab_size] need not sum to one. The search runs over chunks first and inside one chunk
    after.
    """
    vocab_size = probs.shape[1]
    chunks = torch.nn.functional.pad(probs, (0, -vocab_size % _CHUNK)).view(len(probs), -1, _CHUNK)
    outer = chunks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = uniforms * outer[:, -1:]
    chunk = torch.searchsorted(outer, target, right=True).clamp_(max=outer.shape[1] - 1)
    below = torch.where(chunk > 0, outer.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    rest = ((target - below) / (outer.gather(1, chunk) - below)).clamp(0.0, 1.0 - 2.0**-53)
    inner = _take_chunk(chunks, chunk[:, 0]).cumsum(-1, dtype=torch.float64)
    # right=True and a target under the total: never a token of probability zero.
    within = torch.searchsorted(inner, rest * inner[:, -1:], right=True)
    token_ids = (chunk * _CHUNK + within).clamp_(max=vocab_size - 1)
    return token_ids[:, 0], outer[:, -1]


def _take_chunk(chunks: Tensor, index: Tensor) -> Tensor:
    """Row i of the result [n, _CHUNK] is chunks[i, index[i]]."""
    return chunks.gather(1, index[:, None, None].expand(-1, 1, _CHUNK))[:, 0]


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


def _num_outputs(rows: list[tuple[int, SamplingRow]], pending: PendingTokens | None) -> IntArray:
    """The number of tokens of each (place in the batch, row), a pending one included: int64 [len(rows)]."""
    known = np.array([row.num_output for _, row in rows], dtype=np.int64)
    return known if pending is None else known + pending.is_pending[[i for i, _ in rows]]


def _send(values: list[Any], dtype: npt.DTypeLike, device: torch.device) -> Tensor:
    return send(np.array(values, dtype=dtype), device)


def _ids_within(ids: Iterable[int], vocab_size: int) -> IntArray:
    return np.array([token_id for token_id in ids if 0 <= token_id < vocab_size], dtype=np.int64)


def _stream(seed: int, index: int) -> np.uint64:
    """The random stream of one sequence."""
    keys = np.array([seed & (2**64 - 1), index], dtype=np.uint64)
    mixed = _mix(keys + _GOLDEN)
    return np.uint64(_mix(mixed[:1] ^ (mixed[1:] * _GOLDEN))[0])


def _mix(z: UIntArray) -> UIntArray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
