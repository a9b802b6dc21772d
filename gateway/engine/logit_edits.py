"""Logits as requests want them changed before anything is chosen: bias, minimum length, penalties."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from gateway.engine.pending import IntArray, PendingTokens, resolve
from gateway.engine.sampling_row import OutputCounts, SamplingRow
from gateway.engine.transfers import send, send_list


class LogitEdits:
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
        self._bias_index = send_list(list(bias), np.int64, device) if bias else None
        self._bias = send_list(list(bias.values()), np.float32, device)
        self._enders = [
            (i, row, _ids_within(eos_token_ids + row.params.stop_token_ids, vocab_size) + i * vocab_size)
            for i, row in rows
            if row.params.min_tokens > 0
        ]
        self._counts = OutputCounts([(i, row) for i, row, _ in self._enders])
        self._penalized = [(i, row) for i, row in rows if row.is_penalized]

    def apply(self, logits: Tensor, pending: PendingTokens | None) -> None:
        """Change logits [num_rows, vocab_size] in place."""
        flat = logits.view(-1)
        if self._bias_index is not None:
            flat.index_add_(0, self._bias_index, self._bias)
        numbers = self._counts.now(pending).tolist()
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


def _ids_within(ids: Iterable[int], vocab_size: int) -> IntArray:
    return np.array([token_id for token_id in ids if 0 <= token_id < vocab_size], dtype=np.int64)
