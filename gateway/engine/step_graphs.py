"""Decode steps recorded as CUDA graphs: the host launches one graph instead of hundreds of kernels."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from adapters_store.lora_layout import num_pages_for
from adapters_store.slots import AdapterSlots
from gateway.engine.decode_inputs import DecodeInputs
from gateway.engine.kv_cache import KVCache
from gateway.engine.pending import PendingTokens
from gateway.engine.scheduler import Chunk
from gateway.layers.rotary import RotaryTable
from gateway.models.decoder import Decoder
from lora_kernels.nf4_lora import page_limits

MAX_ROWS = 512
_WARM_UPS = 2  # the first compiles kernels, the second sees that nothing more is allocated


class DecodeGraphs:
    """Graphs of each batch size, for steps of no, few, some and many pages of adapters; a batch is padded to a size.

    What is done beside the base's product and what behind it (`lora_kernels.nf4_lora`) depends on how many pages there
    may be.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        slots: AdapterSlots,
        rotary: RotaryTable,
        *,
        max_rows: int,
        max_len: int,
        max_rank: int,
        invariant: bool,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._sizes = _sizes(max_rows)
        self._max_pages = num_pages_for(max_rank)
        self._invariant = invariant
        self._inputs = DecodeInputs(
            cache,
            slots,
            rotary,
            decoder.device,
            size=self._sizes[-1],
            max_blocks=-(-max_len // cache.block_size),
            max_pages=self._max_pages,
            max_pending=max_rows,
            invariant=invariant,
        )
        # Shared by all graphs: at a vocabulary of 128,256 those of each graph would take 1.3 GB together.
        self._logits = torch.empty(self._sizes[-1], decoder.num_logits, dtype=torch.float32, device=decoder.device)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}  # by size and most pages

    @torch.inference_mode()
    def capture(self) -> None:
        """Record all graphs, the largest first, so that the others fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        self._inputs.fill([], None)
        for size in reversed(self._sizes):
            for most_pages in self._page_limits(size):
                for _ in range(_WARM_UPS):
                    self._forward(size, most_pages)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._forward(size, most_pages)
                self._graphs[size, most_pages] = graph

    def run(self, chunks: Seq[Chunk], pending: PendingTokens | None) -> torch.Tensor | None:
        """The fp32 logits [len(chunks), vocab] of one more token each, until the next call overwrites them.

        None where no graph fits: too many rows, or an adapter above the engine's highest rank.
        """
        rows = len(chunks)
        size = next((size for size in self._sizes if size >= rows), None)
        if size is None:
            return None
        token_slots = np.array([chunk.sequence.slot for chunk in chunks], np.int32)
        num_pages = self._inputs.route(token_slots, size) if (token_slots >= 0).any() else 0
        if num_pages is None:
            return None
        self._inputs.fill(chunks, pending)
        most_pages = next(limit for limit in self._page_limits(size) if limit >= num_pages)
        self._graphs[size, most_pages].replay()
        return self._logits[:rows]

    def _page_limits(self, size: int) -> list[int]:
        """How many pages of adapters each of a size's graphs takes, ascending."""
        most = size * self._max_pages
        return [0, most] if self._invariant else [0, *page_limits(size, most)]

    def _forward(self, size: int, most_pages: int) -> None:
        batch = self._inputs.batch(size, most_pages)
        self._logits[:size].copy_(self._decoder(batch, self._cache.layers))


def _sizes(most: int) -> list[int]:
    """The batch sizes to record, up to `most` rows: no batch is padded by more than a half of its rows or seven."""
    most = min(most, MAX_ROWS)
    return [*(size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384) if size < most), most]
