"""Host memory in frames of one adapter page each, pinned for a GPU to read."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from adapters_store.lora_layout import num_pages_for
from adapters_store.page_image import PageImage


class HostPages:
    """As many frames as fit `max_bytes`; an image's come back when nobody holds the image any more.

    One piece of memory, pinned once: pinning takes about 0.3 ms a MB, in which other threads' launches may wait, and
    frames of one size cannot be fragmented. PyTorch's own pinned memory is rounded up to powers of two. Where it is
    not pinned, the system gives a frame memory when it is first written. `take` by one thread at a time.
    """

    def __init__(self, max_bytes: int, page_bytes: int, *, pinned: bool) -> None:
        self.num_pages = max_bytes // page_bytes
        self._frames = torch.empty(self.num_pages, page_bytes, dtype=torch.uint8)
        self._free = list(reversed(range(self.num_pages)))
        self.close = weakref.finalize(self, _unpin, _pin(self._frames) if pinned else None)
        """Unpin the memory, of which no copy may be under way; it stays readable."""

    @property
    def num_free(self) -> int:
        """Frames that no image holds."""
        return len(self._free)

    def take(self, rank: int) -> PageImage | None:
        """An adapter's image, to be filled; None when too few frames are free."""
        num_pages = num_pages_for(rank)
        if num_pages > len(self._free):
            return None
        frames = [self._free.pop() for _ in range(num_pages)]
        image = PageImage(rank, tuple(self._frames[frame] for frame in frames))
        weakref.finalize(image, self._free.extend, frames)  # on whatever thread; extending a list is atomic
        return image


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


def _unpin(address: int | None) -> None:
    if address is not None:
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
