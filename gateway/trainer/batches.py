"""Tokenized examples as padded batches of like lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gateway.trainer.dataset import TokenizedExample

# Examples are sorted by length within windows of this many batches: little padding, and still a shuffle.
BUCKET_BATCHES = 16
# One forward pass holds at most this many padded tokens; a larger batch is split and its gradients are added up.
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded rows. Causal attention never looks right, so padding needs no attention mask.

    input_ids: int64 [rows, width], 0 where padded. positions: int64 [k], the flat indices (row * width + column) whose
    hidden states predict the tokens to learn. targets: int64 [k], those tokens. num_tokens: without padding.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    num_tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(self.input_ids.to(device), self.positions.to(device), self.targets.to(device), self.num_tokens)


def collate(examples: Sequence[TokenizedExample]) -> Batch:
    """Pad `examples` into one batch."""
    width = max(len(example) for example in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.int64)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = torch.from_numpy(example.input_ids)
        mask[row, : len(example)] = torch.from_numpy(example.loss_mask)
    targets = mask.flatten().nonzero().squeeze(1)
    return Batch(input_ids, targets - 1, input_ids.flatten()[targets], sum(map(len, examples)))


def shuffled_batches(
    examples: Sequence[TokenizedExample], batch_size: int, generator: torch.Generator
) -> Iterator[list[TokenizedExample]]:
    """One epoch: every example once, in an order that depends on `generator` alone."""
    order: list[int] = torch.randperm(len(examples), generator=generator).tolist()
    batches: list[list[int]] = []
    window = batch_size * BUCKET_BATCHES
    for start in range(0, len(order), window):
        bucket = sorted(order[start : start + window], key=lambda i: len(examples[i]))
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield [examples[j] for j in batches[i]]


def micro_batches(examples: Sequence[TokenizedExample], max_tokens: int = MICRO_BATCH_TOKENS) -> Iterator[Batch]:
    """`examples`, shortest first, as few batches of at most `max_tokens` padded tokens (one row may pass it)."""
    rows: list[TokenizedExample] = []
    for example in sorted(examples, key=len):
        if rows and (len(rows) + 1) * len(example) > max_tokens:
            yield collate(rows)
            rows = []
        rows.append(example)
    yield collate(rows)
