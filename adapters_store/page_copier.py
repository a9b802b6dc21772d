"""Copies from host memory into the pages of the serving device, beside what the device computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from adapters_store.bottleneck_slots import BottleneckSlots
from adapters_store.lora_layout import LoRALayout, PagePools
from adapters_store.page_image import PageImage
from adapters_store.token_pool import TokenPool
from adapters_store.vector_slots import VectorSlots


class PageCopy:
    """One adapter's copy, which keeps the memory it reads from alive."""

    def __init__(self, image: PageImage, arrival: torch.cuda.Event | None) -> None:
        self.image = image
        self._arrival = arrival

    @property
    def is_done(self) -> bool:
        """Whether a step that is launched from now on finds the pages; asked, never waited for."""
        return self._arrival is None or bool(self._arrival.query())  # type: ignore[no-untyped-call]

    def hold_stream(self) -> None:
        """Make the current stream wait for it, and not the host: what is launched from now on finds the pages."""
        if self._arrival is not None:
            self._arrival.wait()


class PageCopier:
    """Fills pages of the pools, each one [num_layers, num_pages, ...]. One thread only.

    On CUDA a page comes in one copy to a staging page, which overlaps with the step that runs, and goes to its
    places in the pools when that step is done: it may still read what lay there. Copies go one after the other, on a
    stream of their own. Host memory that is not pinned makes the caller wait. On the CPU a copy is done at once.
    """

    def __init__(
        self,
        layout: LoRALayout,
        dtype: torch.dtype,
        pools: Sequence[PagePools],
        vectors: VectorSlots | None = None,
        bottlenecks: BottleneckSlots | None = None,
        tokens: TokenPool | None = None,
    ) -> None:
        self._layout = layout
        self._vectors = vectors
        self._bottlenecks = bottlenecks
        self._tokens = tokens
        self._dtype = dtype
        self._pools = pools
        self._device = pools[0].a.device
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            largest = max(layout.page_bytes(dtype), bottlenecks.layout.page_bytes if bottlenecks is not None else 0)
            self._staging = torch.empty(largest, dtype=torch.uint8, device=self._device)
            self._staged_row = torch.empty(vectors.layout.size if vectors is not None else 0, device=self._device)
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            # What had the staging page's memory before may still be used.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def start(self, image: PageImage, page_ids: Sequence[int], row: int = -1, token_row: int = -1) -> PageCopy:
        """Start to copy an image into these pages, its vectors into a row, and its tokens' rows from `token_row` on.

        Returns before it is there; the image may not change until then.
        """
        if self._stream is None:
            for page, page_id in zip(image.pages, page_ids, strict=True):
                self._place(image, page, page_id)
            if image.vectors is not None:
                self._place_vectors(image.vectors, row)
            self._place_tokens(image, token_row)
            return PageCopy(image, None)
        launched = torch.cuda.current_stream(self._device).record_event()
        with torch.cuda.stream(self._stream):
            for page, page_id in zip(image.pages, page_ids, strict=True):
                staged = self._staging[: len(page)]
                staged.copy_(page, non_blocking=True)
                self._stream.wait_event(launched)
                self._place(image, staged, page_id)
            if image.vectors is not None:
                self._staged_row.copy_(image.vectors, non_blocking=True)
                self._stream.wait_event(launched)
                self._place_vectors(self._staged_row, row)
            if image.token_tables:
                self._stream.wait_event(launched)
                self._place_tokens(image, token_row)
            return PageCopy(image, self._stream.record_event())

    def wait(self) -> None:
        """Block until no copy is under way."""
        if self._stream is not None:
            self._stream.synchronize()

    def _place(self, image: PageImage, page: Tensor, page_id: int) -> None:
        """page: uint8 [page_bytes], one of the image's, on the pools' device."""
        if image.bottleneck is None:
            for pools, parts in zip(self._pools, self._layout.split(page, self._dtype), strict=True):
                _place(pools.arrays, page_id, parts.arrays)
        else:
            assert self._bottlenecks is not None
            _place(self._bottlenecks.all_layers.arrays, page_id, self._bottlenecks.layout.split(page).arrays)

    def _place_tokens(self, image: PageImage, row: int) -> None:
        for table in image.token_tables:
            assert self._tokens is not None
            self._tokens.rows[row : row + len(table.rows)].copy_(table.rows, non_blocking=True)
            row += len(table.rows)

    def _place_vectors(self, vectors: Tensor, row: int) -> None:
        assert self._vectors is not None
        for name, part in self._vectors.layout.split(vectors).items():
            self._vectors.pools[name][:, row].copy_(part)


def _place(pools: Iterable[Tensor], page_id: int, parts: Iterable[Tensor]) -> None:
    for pool, part in zip(pools, parts, strict=True):
        pool[:, page_id].copy_(part)
