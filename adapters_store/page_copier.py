"""Copies from host memory into the pages of the serving device, beside what the device computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapters_store.lora_layout import LoRALayout, PagePools
from adapters_store.page_image import PageImage


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

    def __init__(self, layout: LoRALayout, dtype: torch.dtype, pools: Sequence[PagePools]) -> None:
        self._layout = layout
        self._dtype = dtype
        self._pools = pools
        self._device = pools[0].a.device
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._staging = torch.empty(layout.page_bytes(dtype), dtype=torch.uint8, device=self._device)
            self._staged = layout.split(self._staging, dtype)
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            # What had the staging page's memory before may still be used.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def start(self, image: PageImage, page_ids: Sequence[int]) -> PageCopy:
        """Start to copy an image into these pages; returns before it is there. The image may not change until then."""
        if self._stream is None:
            for page, page_id in zip(image.pages, page_ids, strict=True):
                self._place(self._layout.split(page, self._dtype), page_id)
            return PageCopy(image, None)
        launched = torch.cuda.current_stream(self._device).record_event()
        with torch.cuda.stream(self._stream):
            for page, page_id in zip(image.pages, page_ids, strict=True):
                self._staging.copy_(page, non_blocking=True)
                self._stream.wait_event(launched)
                self._place(self._staged, page_id)
            return PageCopy(image, self._stream.record_event())

    def wait(self) -> None:
        """Block until no copy is under way."""
        if self._stream is not None:
            self._stream.synchronize()

    def _place(self, page: Sequence[PagePools], page_id: int) -> None:
        for pools, parts in zip(self._pools, page, strict=True):
            for pool, part in zip(pools.arrays, parts.arrays, strict=True):
                pool[:, page_id].copy_(part)
