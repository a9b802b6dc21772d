"""Adapters of many ranks in a small pool, for the tests of kernels that read pages."""

import torch

from lora_kernels.segments import PAGE_RANK, AdapterPages

NUM_PAGES = 30
PAGES = {
    0: AdapterPages(16, (3,)),
    1: AdapterPages(20, (4, 9)),
    2: AdapterPages(64, (1, 2, 7, 11)),
    3: AdapterPages(1, (12,)),
    4: AdapterPages(16, (5,)),
    5: AdapterPages(8, (6,)),
    6: AdapterPages(256, tuple(range(13, 29))),
}


def zero_beyond_rank(pool: torch.Tensor, dim: int) -> torch.Tensor:
    """What `AdapterSlots` leaves beyond an adapter's rank; `dim` of a page counts the ranks."""
    for pages in PAGES.values():
        if rest := -pages.rank % PAGE_RANK:
            pool[pages.ids[-1]].narrow(dim, PAGE_RANK - rest, rest).zero_()
    return pool
