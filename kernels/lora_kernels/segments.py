"""Which rows of a step use which adapter: built once on the host, shared by every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PAGE_RANK = 16
FIELDS = 8  # int32 in a row of the chunk table: 32 bytes, one sector
FEW_PAGES = 16  # of a step whose pages may be columns beside those of the base
_PAGES_AT_ONCE = 8  # kernels may read so many at a time
SHORT_STEP = 512  # rows
TILE_TOKENS = 16  # of a chunk in a short step: a tile of the matrix unit
# Segments up to this many tokens are padded to one width and multiplied in one batched call by the plain PyTorch path.
_SHORT_TOKENS = 32


@dataclass(frozen=True)
class AdapterPages:
    """Where an adapter lies in the pools: its rank, and the ids of its ceil(rank / PAGE_RANK) pages."""

    rank: int
    ids: tuple[int, ...]

    def __len__(self) -> int:
        """The number of pages."""
        return len(self.ids)


@dataclass(frozen=True)
class Segment:
    """The tokens of one adapter: `tokens` int64 [n], ascending row numbers."""

    tokens: npt.NDArray[np.int64]
    pages: AdapterPages


@dataclass(frozen=True)
class BatchedSegments:
    """Short segments padded to one width, for a batched product in plain PyTorch.

    rows: int64 [num_segments * width], the token at each padded position (padding repeats a token of the segment).
    tokens: int64 [n] the tokens, ascending, or None when they are all the tokens of the step.
    positions: int64 [n] where each of these tokens sits in `rows`.
    pages: int64 [num_segments * max_pages] (padding repeats a page of the segment).
    page_run: (first, past the last) when `pages` counts up by one, so that a view of the pool does instead of a copy.
    rank_mask: fp32 [n, 1, max_pages * PAGE_RANK], 0 beyond a token's own pages; None when no segment is padded.
    in_order: `rows` are all the tokens of the step in their order, and so need not be gathered.
    """

    num_segments: int
    rows: Tensor
    tokens: Tensor | None
    positions: Tensor
    pages: Tensor
    page_run: tuple[int, int] | None
    rank_mask: Tensor | None
    in_order: bool


@dataclass(frozen=True)
class Routing:
    """The kernels' view of a step on the host.

    token_order: int32 [n] the tokens that have an adapter, grouped by adapter.
    page_ids: int32 [num_pages] the pages of its adapters, one adapter after the other.
    table: int32 [1 + num_rows, FIELDS]. A chunk is a piece of one adapter's tokens; every page of every chunk has a
        row: first the first pages of the chunks of one token, then those of the other chunks, then the further pages.
        Row 0 holds (num_chunks, num_rows, number of chunks of one token, number of their rows, num_pages), the third
        and fourth 0 where every chunk is to be a tile of the matrix unit (`LoRASegments.invariant`); the others
        (first index into token_order, number of tokens, rank, the first token, page id, how many pages precede it in
        the adapter, the chunk's row of its second page, the page's place in page_ids), where rows count from 0 at the
        second row of the table.
    """

    token_order: npt.NDArray[np.int32]
    page_ids: npt.NDArray[np.int32]
    table: npt.NDArray[np.int32]
    max_pages: int

    @property
    def num_pages(self) -> int:
        """Pages of all adapters of the step."""
        return len(self.page_ids)

    @classmethod
    def of(
        cls,
        token_slots: npt.NDArray[np.int32],
        num_tokens: int,
        slot_pages: Mapping[int, AdapterPages],
        invariant: bool = False,
    ) -> "Routing":
        """Routes a step of `num_tokens` rows, padding among them. The other arguments are `LoRASegments.build`'s."""
        segments = _split_by_slot(token_slots, slot_pages)
        if not segments:
            return cls(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((1, FIELDS), np.int32), 0)
        return cls._of_segments(segments, num_tokens, invariant)

    @classmethod
    def _of_segments(cls, segments: Sequence[Segment], num_tokens: int, invariant: bool) -> "Routing":
        order = np.concatenate([segment.tokens for segment in segments]).astype(np.int32)
        page_ids = np.concatenate([segment.pages.ids for segment in segments]).astype(np.int32)
        table = _table(segments, order, page_ids, chunk_tokens(num_tokens, invariant), has_vectors=not invariant)
        return cls(order, page_ids, table, max(len(segment.pages) for segment in segments))

    def packed(self, capacity: int) -> npt.NDArray[np.int32]:
        """One array to send: token_order, padded to `capacity`, page_ids, cut or padded to FEW_PAGES, the table."""
        page_ids = self.page_ids[:FEW_PAGES]
        padding = [np.zeros(count, np.int32) for count in (capacity - len(self.token_order), FEW_PAGES - len(page_ids))]
        return np.concatenate([self.token_order, padding[0], page_ids, padding[1], self.table.reshape(-1)])


@dataclass(frozen=True)
class DeviceRouting:
    """`Routing`'s arrays on the device, for the kernels of a GPU; page_ids are there up to FEW_PAGES.

    most_chunks, most_rows: the table has no more of them. chunk_tokens: the most tokens of a chunk.
    """

    token_order: Tensor
    page_ids: Tensor
    table: Tensor
    most_chunks: int
    most_rows: int
    chunk_tokens: int

    @classmethod
    def of(
        cls,
        packed: Tensor,
        num_tokens: int,
        capacity: int,
        most_chunks: int,
        most_rows: int,
        invariant: bool = False,
    ) -> "DeviceRouting":
        """Views of `Routing.packed(capacity)` of a step of so many tokens."""
        order, page_ids, table = packed.split_with_sizes((capacity, FEW_PAGES, len(packed) - capacity - FEW_PAGES))
        return cls(order, page_ids, table.view(-1, FIELDS), most_chunks, most_rows, chunk_tokens(num_tokens, invariant))


@dataclass(frozen=True)
class LoRASegments:
    """One step's routing; a page id is valid in every layer's pools.

    max_pages: pages of the highest rank. most_pages: all adapters together have no more. invariant: a row's bits are to
    depend on no other row, nor on how many there are: every chunk is a tile of TILE_TOKENS, one token too.
    """

    num_tokens: int
    max_pages: int
    most_pages: int
    segments: tuple[Segment, ...]
    device: torch.device
    invariant: bool = False
    recorded: DeviceRouting | None = None
    _columns: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, compare=False)

    @classmethod
    def build(
        cls,
        token_slots: npt.NDArray[np.int32],
        slot_pages: Mapping[int, AdapterPages],
        device: torch.device | str,
        invariant: bool = False,
    ) -> "LoRASegments | None":
        """Routes each token of a step.

        token_slots: int32 [num_tokens], the adapter slot of each row, -1 for the bare base.
        slot_pages: slot -> its pages, in order of rank; an adapter of none is as the bare base. Returns None when no
            token has an adapter.
        """
        segments = _split_by_slot(token_slots, slot_pages)
        if not segments:
            return None
        counts = [len(segment.pages) for segment in segments]
        return cls(len(token_slots), max(counts), sum(counts), tuple(segments), torch.device(device), invariant)

    @classmethod
    def fixed(
        cls,
        packed: Tensor,
        num_tokens: int,
        max_tokens: int,
        max_pages: int,
        most_pages: int,
        invariant: bool = False,
    ) -> "LoRASegments":
        """A routing at fixed addresses, for kernels alone; who records a CUDA graph fills it in before a replay.

        packed: int32 [fixed_size(max_tokens, max_pages)], `Routing.packed(order_capacity(max_tokens))` at its start.
        """
        capacity, most_rows = order_capacity(max_tokens), num_tokens * max_pages
        recorded = DeviceRouting.of(packed, num_tokens, capacity, num_tokens, most_rows, invariant)
        return cls(num_tokens, max_pages, min(most_pages, most_rows), (), packed.device, invariant, recorded)

    @cached_property
    def routing(self) -> DeviceRouting:
        """What the kernels read; sent at the first use in a step, as the plain PyTorch path has none."""
        if self.recorded is not None:
            return self.recorded
        routing = Routing._of_segments(self.segments, self.num_tokens, self.invariant)
        capacity = order_capacity(len(routing.token_order))
        packed = torch.from_numpy(routing.packed(capacity)).to(self.device, non_blocking=True)
        num_chunks, num_rows = routing.table[0, :2].tolist()
        return DeviceRouting.of(packed, self.num_tokens, capacity, num_chunks, num_rows, self.invariant)

    def columns(self, num_slices: int, dtype: torch.dtype) -> Tensor:
        """[num_tokens, num_slices, columns], zeros at first: PAGE_RANK columns for each of the step's pages, and a few.

        One for all layers. Each writes the same places, those of a token's own adapter's pages, and leaves the others.
        """
        if (num_slices, dtype) not in self._columns:
            width = -(-self.most_pages // _PAGES_AT_ONCE) * _PAGES_AT_ONCE * PAGE_RANK
            shape = (self.num_tokens, num_slices, width)
            self._columns[num_slices, dtype] = torch.zeros(shape, dtype=dtype, device=self.device)
        return self._columns[num_slices, dtype]

    @cached_property
    def batched(self) -> BatchedSegments | None:
        """The short segments, padded to one width (for the plain PyTorch path)."""
        short = [segment for segment in self.segments if len(segment.tokens) <= _SHORT_TOKENS]
        return _batch(short, self.num_tokens, self.max_pages, self.device) if short else None

    @cached_property
    def long(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(tokens int64 [n], pages int64 [num_pages]) of each long segment (for the plain PyTorch path)."""
        device = self.device
        return tuple(
            (torch.from_numpy(segment.tokens).to(device), torch.tensor(segment.pages.ids, device=device))
            for segment in self.segments
            if len(segment.tokens) > _SHORT_TOKENS
        )


def chunk_tokens(num_tokens: int, invariant: bool = False) -> int:
    """The most tokens of a chunk in a step of so many rows: few in a short step, to occupy more of the GPU."""
    return TILE_TOKENS if invariant or num_tokens <= SHORT_STEP else 64


def order_capacity(num_tokens: int) -> int:
    """Places for the token order in front of the table, which then begins at a whole row."""
    return -(-num_tokens // FIELDS) * FIELDS


def fixed_size(max_tokens: int, max_pages: int) -> int:
    """Length of the packed routing of any step of so many tokens, each with an adapter of so many pages."""
    return order_capacity(max_tokens) + FEW_PAGES + FIELDS * (1 + max_tokens * max_pages)


def _split_by_slot(slots: npt.NDArray[np.int32], slot_pages: Mapping[int, AdapterPages]) -> list[Segment]:
    """The segments that have pages, in order of the first, so that adapters loaded in turn lie in a run of pages."""
    order = np.argsort(slots, kind="stable")
    ordered = slots[order]
    cuts = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(order)] if len(order) else []
    segments = [
        Segment(tokens=order[start:end], pages=slot_pages[slot])
        for start, end in pairwise(cuts)
        if (slot := int(ordered[start])) >= 0 and len(slot_pages[slot])
    ]
    return sorted(segments, key=lambda segment: segment.pages.ids)


def _table(
    segments: Sequence[Segment],
    order: npt.NDArray[np.int32],
    page_ids: npt.NDArray[np.int32],
    size: int,
    has_vectors: bool,
) -> npt.NDArray[np.int32]:
    lengths = np.array([len(segment.tokens) for segment in segments])
    ranks = np.array([segment.pages.rank for segment in segments])
    num_pages = np.array([len(segment.pages) for segment in segments])
    token_ends, page_ends = np.cumsum(lengths), np.cumsum(num_pages)
    # Chunks of the highest ranks first: what takes longest should not begin last.
    by_rank = np.argsort(-ranks, kind="stable")
    of_chunk, nth_chunk = _ragged(by_rank, (-(-lengths // size))[by_rank])
    first = (token_ends - lengths)[of_chunk] + nth_chunk * size
    length = np.minimum(size, token_ends[of_chunk] - first)
    vectors_first = np.argsort(length > 1, kind="stable")
    of_chunk, first, length = of_chunk[vectors_first], first[vectors_first], length[vectors_first]
    rows = np.zeros((len(of_chunk), FIELDS), np.int32)
    rows[:, 0] = first
    rows[:, 1] = length
    rows[:, 2] = ranks[of_chunk]
    rows[:, 3] = order[first]
    rows[:, 7] = (page_ends - num_pages)[of_chunk]
    rows[:, 4] = page_ids[rows[:, 7]]
    further = num_pages[of_chunk] - 1
    rows[:, 6] = len(rows) + np.cumsum(further) - further
    chunk, nth = _ragged(np.arange(len(rows)), further)
    more = rows[chunk]
    more[:, 7] += 1 + nth
    more[:, 4] = page_ids[more[:, 7]]
    more[:, 5] = 1 + nth
    head = np.zeros((1, FIELDS), np.int32)
    is_vector = (length == 1) & has_vectors
    num_vectors = is_vector.sum()
    head[0, :5] = len(rows), len(rows) + len(more), num_vectors, num_vectors + further[is_vector].sum(), len(page_ids)
    return np.concatenate([head, rows, more])


def _ragged(
    values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each value repeated `counts` times, and the number of each repetition."""
    ends = np.cumsum(counts)
    return np.repeat(values, counts), np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)


def _padded(pages: tuple[int, ...], width: int) -> tuple[int, ...]:
    return pages + pages[-1:] * (width - len(pages))


def _batch(segments: list[Segment], num_tokens: int, max_pages: int, device: torch.device) -> BatchedSegments:
    lengths = np.array([len(segment.tokens) for segment in segments])[:, None]
    tokens = np.concatenate([segment.tokens for segment in segments])
    column = np.arange(lengths.max())
    rows = tokens[np.minimum(column, lengths - 1) + np.cumsum(lengths)[:, None] - lengths]
    by_token = np.argsort(tokens)
    positions = np.flatnonzero(column < lengths)[by_token]
    pages = np.array([_padded(segment.pages.ids, max_pages) for segment in segments]).reshape(-1)
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
        in_order=rows.size == num_tokens and (rows.reshape(-1) == np.arange(num_tokens)).all().item(),
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
