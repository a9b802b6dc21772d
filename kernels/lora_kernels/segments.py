"""Which rows of a step use which adapter: built once on the host, shared by every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PAGE_RANK = 16
CHUNK_TOKENS = 16
# Segments up to this many tokens are padded to one width and multiplied in one batched call by the plain PyTorch path.
_SHORT_TOKENS = 32
CHUNK_HEADER = 3  # a chunk's first token, its length, its number of pages; then the page ids


@dataclass(frozen=True)
class Segment:
    """The tokens of one adapter: `tokens` int64 [n] ascending row numbers, `pages` the adapter's page ids."""

    tokens: npt.NDArray[np.int64]
    pages: tuple[int, ...]


@dataclass(frozen=True)
class BatchedSegments:
    """Short segments padded to one width, for a batched product in plain PyTorch.

    rows: int64 [num_segments * width], the token at each padded position (padding repeats a token of the segment).
    tokens: int64 [n] the tokens, ascending, or None when they are all the tokens of the step.
    positions: int64 [n] where each of these tokens sits in `rows`.
    pages: int64 [num_segments * max_pages] (padding repeats a page of the segment).
    page_run: (first, past the last) when `pages` counts up by one, so that a view of the pool does instead of a copy.
    rank_mask: fp32 [n, 1, max_pages * PAGE_RANK], 0 beyond a token's own pages; None when no segment is padded.
    """

    num_segments: int
    rows: Tensor
    tokens: Tensor | None
    positions: Tensor
    pages: Tensor
    page_run: tuple[int, int] | None
    rank_mask: Tensor | None


@dataclass(frozen=True)
class LoRASegments:
    """One step's routing; a page id is valid in every layer's pools.

    token_order: int32 [n] the tokens that have an adapter, grouped by adapter.
    chunks: int32 [num_chunks, 3 + max_pages], pieces of at most 16 tokens of one adapter, the kernels' unit of work:
        first index into token_order, number of tokens, number of pages, page ids (the last one repeated beyond).
    """

    num_tokens: int
    max_pages: int
    segments: tuple[Segment, ...]
    token_order: Tensor
    chunks: Tensor

    @classmethod
    def build(
        cls,
        token_slots: npt.NDArray[np.int32],
        slot_pages: Mapping[int, Sequence[int]],
        device: torch.device | str,
    ) -> "LoRASegments | None":
        """Routes each token of a step.

        token_slots: int32 [num_tokens], the adapter slot of each row, -1 for the bare base.
        slot_pages: slot -> the ids of its pages, in order of rank. Returns None when no token has an adapter.
        """
        segments = _split_by_slot(token_slots, slot_pages)
        if not segments:
            return None
        order, chunks = _tables(segments)
        packed = torch.from_numpy(np.concatenate([order, chunks.reshape(-1)])).to(device, non_blocking=True)
        return cls(
            num_tokens=len(token_slots),
            max_pages=chunks.shape[1] - CHUNK_HEADER,
            segments=tuple(segments),
            token_order=packed[: len(order)],
            chunks=packed[len(order) :].view(chunks.shape),
        )

    @classmethod
    def fixed(cls, token_order: Tensor, chunks: Tensor) -> "LoRASegments":
        """A routing at fixed addresses, for kernels alone; who records a CUDA graph fills it in before a replay.

        token_order: int32 [num_tokens]. chunks: int32 [num_tokens, 3 + max_pages]; unused ones have no tokens and no
        pages.
        """
        return cls(len(token_order), chunks.shape[1] - CHUNK_HEADER, (), token_order, chunks)

    @cached_property
    def batched(self) -> BatchedSegments | None:
        """The short segments, padded to one width (for the plain PyTorch path)."""
        short = [segment for segment in self.segments if len(segment.tokens) <= _SHORT_TOKENS]
        return _batch(short, self.num_tokens, self.max_pages, self.chunks.device) if short else None

    @cached_property
    def long(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(tokens int64 [n], pages int64 [num_pages]) of each long segment (for the plain PyTorch path)."""
        device = self.chunks.device
        return tuple(
            (torch.from_numpy(segment.tokens).to(device), torch.tensor(segment.pages, device=device))
            for segment in self.segments
            if len(segment.tokens) > _SHORT_TOKENS
        )


def chunk_tables(
    token_slots: npt.NDArray[np.int32], slot_pages: Mapping[int, Sequence[int]]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """`LoRASegments`' token_order and chunks on the host, of a step that has at least one adapter."""
    return _tables(_split_by_slot(token_slots, slot_pages))


def _tables(segments: list[Segment]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    order = np.concatenate([segment.tokens for segment in segments]).astype(np.int32)
    return order, _chunk_table(segments, max(len(segment.pages) for segment in segments))


def _split_by_slot(slots: npt.NDArray[np.int32], slot_pages: Mapping[int, Sequence[int]]) -> list[Segment]:
    """The segments, in order of their first page, so that adapters loaded in turn lie in a run of pages."""
    order = np.argsort(slots, kind="stable")
    ordered = slots[order]
    cuts = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(order)] if len(order) else []
    segments = [
        Segment(tokens=order[start:end], pages=tuple(slot_pages[slot]))
        for start, end in pairwise(cuts)
        if (slot := int(ordered[start])) >= 0
    ]
    return sorted(segments, key=lambda segment: segment.pages)


def _chunk_table(segments: list[Segment], max_pages: int) -> npt.NDArray[np.int32]:
    rows: list[list[int]] = []
    start = 0
    for segment in segments:
        tail = [len(segment.pages), *_padded(segment.pages, max_pages)]
        end = start + len(segment.tokens)
        rows += [[at, min(CHUNK_TOKENS, end - at), *tail] for at in range(start, end, CHUNK_TOKENS)]
        start = end
    return np.array(rows, dtype=np.int32)


def _padded(pages: tuple[int, ...], width: int) -> tuple[int, ...]:
    return pages + pages[-1:] * (width - len(pages))


def _batch(segments: list[Segment], num_tokens: int, max_pages: int, device: torch.device) -> BatchedSegments:
    lengths = np.array([len(segment.tokens) for segment in segments])[:, None]
    tokens = np.concatenate([segment.tokens for segment in segments])
    column = np.arange(lengths.max())
    rows = tokens[np.minimum(column, lengths - 1) + np.cumsum(lengths)[:, None] - lengths]
    by_token = np.argsort(tokens)
    positions = np.flatnonzero(column < lengths)[by_token]
    pages = np.array([_padded(segment.pages, max_pages) for segment in segments]).reshape(-1)
    first, last = int(pages[0]), int(pages[-1])
    is_run = (pages == np.arange(first, first + len(pages))).all()
    return BatchedSegments(
        num_segments=len(segments),
        rows=torch.from_numpy(rows.reshape(-1)).to(device),
        tokens=None if len(tokens) == num_tokens else torch.from_numpy(tokens[by_token]).to(device),
        positions=torch.from_numpy(positions).to(device),
        pages=torch.from_numpy(pages).to(device),
        page_run=(first, last + 1) if is_run else None,
        rank_mask=_rank_mask(segments, lengths, by_token, max_pages, device),
    )


def _rank_mask(
    segments: list[Segment],
    lengths: npt.NDArray[np.int64],
    by_token: npt.NDArray[np.int64],
    max_pages: int,
    device: torch.device,
) -> Tensor | None:
    ranks = np.array([len(segment.pages) for segment in segments]) * PAGE_RANK
    if (ranks == max_pages * PAGE_RANK).all():
        return None
    mask = np.arange(max_pages * PAGE_RANK) < np.repeat(ranks, lengths[:, 0])[by_token, None]
    return torch.from_numpy(mask.astype(np.float32)).unsqueeze(1).to(device)
