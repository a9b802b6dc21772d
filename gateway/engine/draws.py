"""Tokens drawn at random: temperature, min-p, top-k and top-p, then one uniform number a row."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from gateway.engine.pending import PendingTokens
from gateway.engine.random_stream import uniforms_at
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.sampling_row import OutputCounts, SamplingRow
from gateway.engine.transfers import send, send_list

_CHUNK: Final = 64


class Draws:
    """The rows that draw at random: temperature, filters, one uniform number each."""

    def __init__(self, rows: list[tuple[int, SamplingRow]], num_rows: int, device: torch.device) -> None:
        self._device = device
        self._counts = OutputCounts(rows)
        self._rows = send_list([i for i, _ in rows], np.int64, device)
        self._takes_all = len(rows) == num_rows
        self._streams = np.array([row.stream for _, row in rows], dtype=np.uint64)
        temperatures = [row.params.temperature for _, row in rows]
        self._temperatures = send_list(temperatures, np.float32, device)[:, None]
        self._is_tempered = set(temperatures) != {1.0}
        filtered = [(i, row.params) for i, (_, row) in enumerate(rows) if row.is_filtered]
        self._filter = TopFilter(filtered, len(rows), device) if filtered else None

    def draw_into(self, token_ids: Tensor, logits: Tensor, pending: PendingTokens | None) -> Tensor:
        """Draw the rows' tokens into `token_ids`; returns each row's mass [num_drawn]."""
        mine = logits if self._takes_all else logits[self._rows]
        if self._is_tempered:
            mine.div_(self._temperatures)
        # Filters work on probabilities: a mask of -inf in the logits makes exp() four times slower on a CPU.
        probs = mine.softmax(-1)
        if self._filter is not None:
            self._filter.apply(probs)
        token_ids[self._rows], totals = draw_tokens(probs, self._uniforms(pending))
        return totals

    def _uniforms(self, pending: PendingTokens | None) -> Tensor:
        """One number in [0, 1) a row."""
        uniforms = uniforms_at(self._streams, self._counts.now(pending))
        return send(uniforms, self._device)[:, None]


class TopFilter:
    """min-p, top-k and top-p as thresholds: smaller probabilities become zero, equal ones live or die together."""

    def __init__(self, rows: list[tuple[int, SamplingParams]], num_rows: int, device: torch.device) -> None:
        params = [p for _, p in rows]
        self._rows = send_list([i for i, _ in rows], np.int64, device)
        self._takes_all = len(rows) == num_rows
        self._min_p = send_list([p.min_p for p in params], np.float32, device)[:, None]
        self._has_min_p = any(p.min_p > 0.0 for p in params)
        top_ks = [p.top_k if p.top_k > 0 else torch.iinfo(torch.int64).max for p in params]
        self._top_k = send_list(top_ks, np.int64, device)[:, None]
        self._top_p = send_list([p.top_p for p in params], np.float64, device)[:, None]
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


def draw_tokens(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
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
