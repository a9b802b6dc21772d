"""Host memory in frames of one adapter page each, pinned for a GPU to read."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Final

import torch
from torch import Tensor

from adapters_store.lora_layout import num_pages_for
from adapters_store.page_image import PageImage

_VECTORS_SHARE: Final = 16


class HostPages:
    """As many frames as fit `max_bytes`; an image's come back when nobody holds the image any more.

    Two pieces of memory, pinned once: pinning takes about 0.3 ms a MB, in which other threads' launches may wait, and
    frames of one size cannot be fragmented. PyTorch's own pinned memory is rounded up to powers of two. Where it is
    not pinned, the system gives a frame memory when it is first written. `take` by one thread at a time.

    vector_size: numbers of an adapter's vectors, whose frames take a sixteenth of the memory; 0 where there are none.
    bottleneck_bytes: of a bottleneck adapter's page, of which a frame holds several; 0 where there are none.
    """

    def __init__(
        self, max_bytes: int, page_bytes: int, vector_size: int = 0, bottleneck_bytes: int = 0, *, pinned: bool
    ) -> None:
        num_rows = max_bytes // _VECTORS_SHARE // (4 * vector_size) if vector_size else 0
        self._rows = torch.empty(num_rows, vector_size)
        self.num_pages = (max_bytes - self._rows.nbytes) // page_bytes
        self._bottleneck_bytes = bottleneck_bytes
        self._frames = torch.empty(self.num_pages, page_bytes, dtype=torch.uint8)
        self._free = list(reversed(range(self.num_pages)))
        self._free_rows = list(reversed(range(num_rows)))
        addresses = [_pin(memory) for memory in (self._frames, self._rows)] if pinned else []
        self.close = weakref.finalize(self, _unpin, addresses)
        """Unpin the memory, of which no copy may be under way; it stays readable."""

    @property
    def num_free(self) -> int:
        """Page frames that no image holds."""
        return len(self._free)

    def may_hold(self, num_pages: int, has_vectors: bool) -> bool:
        """Whether an image of this size fits when no other is there."""
        return num_pages <= self.num_pages and (not has_vectors or len(self._rows) > 0)

    def num_frames_for(self, blank: PageImage) -> int:
        """Page frames that an adapter takes."""
        if blank.bottleneck is None:
            return num_pages_for(blank.rank)
        in_a_frame = self._frames.shape[1] // self._bottleneck_bytes
        return -(-blank.bottleneck.num_pages // in_a_frame) if in_a_frame else self.num_pages + 1

    def take(self, blank: PageImage, has_vectors: bool = False) -> PageImage | None:
        """An adapter's image, to be filled; None when too few frames are free. blank: the same without any memory."""
        num_frames = self.num_frames_for(blank)
        if num_frames > len(self._free) or has_vectors > len(self._free_rows):
            return None
        frames = [self._free.pop() for _ in range(num_frames)]
        rows = [self._free_rows.pop()] if has_vectors else []
        pages = tuple(self._frames[frame] for frame in frames)
        if blank.bottleneck is not None:
            size = self._bottleneck_bytes
            parts = (page[start : start + size] for page in pages for start in range(0, len(page) - size + 1, size))
            pages = tuple(islice(parts, blank.bottleneck.num_pages))
        image = replace(blank, pages=pages, vectors=self._rows[rows[0]] if has_vectors else None)
        weakref.finalize(image, _give_back, (self._free, frames), (self._free_rows, rows))
        return image


def _give_back(*lists: tuple[list[int], list[int]]) -> None:
    """On whatever thread; extending a list is atomic."""
    for free, frames in lists:
        free.extend(frames)


def _pin(memory: Tensor) -> int | None:
    """Returns the address; None when there is nothing to pin."""
    if not memory.nbytes:
        return None
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)  # type: ignore[no-untyped-call]
    if int(error) != 0:
        raise RuntimeError(
            f"CUDA cannot pin {memory.nbytes >> 20:,} MiB of host memory for adapters (error {int(error)}); lower"
            " engine.host_cache_bytes."
        )
    return memory.data_ptr()


def _unpin(addresses: Iterable[int | None]) -> None:
    for address in addresses:
        if address is not None:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
