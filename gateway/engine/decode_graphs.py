"""Decode steps recorded as CUDA graphs: the host launches one graph instead of hundreds of kernels."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from adapters_store.slots import AdapterSlots, num_pages_for
from gateway.engine.decode_inputs import DecodeInputs
from gateway.engine.kv_cache import KVCache
from gateway.engine.pending import PendingTokens
from gateway.engine.scheduler import Chunk
from gateway.layers.rotary import RotaryTable
from gateway.models.decoder import Decoder

_MAX_ROWS = 512
_WARM_UPS = 2  # the first compiles kernels, the second sees that nothing more is allocated


class DecodeGraphs:
    """One graph a batch size, with adapters and without; a batch is padded to the next size."""

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
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._sizes = _sizes(max_rows)
        self._inputs = DecodeInputs(
            cache,
            slots,
            rotary,
            decoder.device,
            size=self._sizes[-1],
            max_blocks=-(-max_len // cache.block_size),
            max_pages=num_pages_for(max_rank),
            max_pending=max_rows,
        )
        # Shared by all graphs: at a vocabulary of 128,256 those of each graph would take 1.3 GB together.
        self._logits = torch.empty(
            self._sizes[-1], decoder.config.vocab_size, dtype=torch.float32, device=decoder.device
        )
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Record all graphs, the largest first, so that the others fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        self._inputs.fill([], None)
        for size in reversed(self._sizes):
            for has_adapters in (True, False):
                for _ in range(_WARM_UPS):
                    self._forward(size, has_adapters)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._forward(size, has_adapters)
                self._graphs[size, has_adapters] = graph

    def run(self, chunks: Seq[Chunk], pending: PendingTokens | None) -> torch.Tensor | None:
        """The fp32 logits [len(chunks), vocab] of one more token each, until the next call overwrites them.

        None where no graph fits: too many rows, or an adapter above the engine's highest rank.
        """
        rows = len(chunks)
        size = next((size for size in self._sizes if size >= rows), None)
        if size is None:
            return None
        token_slots = np.array([chunk.sequence.slot for chunk in chunks], np.int32)
        has_adapters = bool((token_slots >= 0).any())
        if has_adapters and not self._inputs.route(token_slots, size):
            return None
        self._inputs.fill(chunks, pending)
        self._graphs[size, has_adapters].replay()
        return self._logits[:rows]

    def _forward(self, size: int, has_adapters: bool) -> None:
        batch = self._inputs.batch(size, has_adapters=has_adapters)
        self._logits[:size].copy_(self._decoder(batch, self._cache.layers))


def _sizes(most: int) -> list[int]:
    """The batch sizes to record, up to `most` rows: no batch is padded by more than a half of its rows or seven."""
    most = min(most, _MAX_ROWS)
    return [*(size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384) if size < most), most]
