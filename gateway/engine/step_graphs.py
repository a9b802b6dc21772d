"""Small steps recorded as CUDA graphs: the host launches one graph instead of hundreds of kernels."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from adapters_store.lora_layout import num_pages_for
from adapters_store.slots import AdapterSlots
from gateway.engine.kv_cache import KVCache
from gateway.engine.pending import PendingTokens
from gateway.engine.step_inputs import StepInputs
from gateway.engine.step_tokens import StepTokens
from gateway.layers.rotary import RotaryTable
from gateway.models.decoder import Decoder
from lora_kernels.argmax import row_argmax
from lora_kernels.nf4_lora import page_limits

# At 8B on an H200 the device takes as long for about so many rows as the host to launch their kernels one by one.
MAX_ROWS: Final = 512
# Rows to record: no batch is padded by more than a half of its rows or seven. Below 32 a ragged step costs the same.
_DECODE_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
_RAGGED_SIZES: Final = (32, 64, 96, 128, 192, 256, 384)
_WARM_UPS: Final = 2  # the first loads kernels, the second sees that nothing more is allocated


class _Shape(NamedTuple):
    """What a graph is recorded for: rows, whether chunks of prompts and vectors are among them, and the most pages."""

    size: int
    is_ragged: bool
    has_vectors: bool
    most_pages: int


class StepGraphs:
    """Graphs of decode rows alone, and of decode rows beside chunks of prompts, by their numbers of rows.

    A step is padded to the next size. Each size has graphs for no, few, some and many pages of adapters: what is done
    beside the base's product and what behind it (`lora_kernels.nf4_lora`) depends on how many there may be. Decode rows
    of which some have vectors have two more: of no pages, and of many.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        slots: AdapterSlots,
        rotary: RotaryTable,
        *,
        max_rows: int,
        max_tokens: int,
        max_len: int,
        max_rank: int,
        invariant: bool,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._decode_sizes, self._ragged_sizes = _sizes(_DECODE_SIZES, max_rows), _sizes(_RAGGED_SIZES, max_tokens)
        self._max_pages = num_pages_for(max_rank)
        self._invariant = invariant
        self._may_have_vectors = slots.vectors is not None
        self._inputs = StepInputs(
            cache,
            slots,
            rotary,
            decoder.device,
            size=max(self._decode_sizes[-1], self._ragged_sizes[-1]),
            max_blocks=-(-max_len // cache.block_size),
            max_pages=self._max_pages,
            max_pending=max_rows,
            invariant=invariant,
        )
        # Shared by all graphs: at a vocabulary of 128,256 those of each graph would take 2 GB together. No step samples
        # more than the most decode rows.
        self._logits = torch.empty(
            self._decode_sizes[-1], decoder.num_logits, dtype=torch.float32, device=decoder.device
        )
        self._graphs: dict[_Shape, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Record all graphs over padding alone, the largest first, so that the others fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        for shape in self._shapes():
            for _ in range(_WARM_UPS):
                self._forward(shape, self._decoder)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._forward(shape, self._decoder)
            self._graphs[shape] = graph

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Call all kernels that `capture` and sampling do, for one layer of each kind: to have them compiled."""
        decoder = self._decoder.abridged()
        for shape in self._shapes():
            self._forward(shape, decoder)
        if decoder.num_logits:
            row_argmax(self._logits)

    def run(self, tokens: StepTokens, pending: PendingTokens | None) -> torch.Tensor | None:
        """The logits [num_sampled, vocab] of `tokens.last_rows`, until the next call overwrites them.

        None where no graph fits: too many rows, an adapter above the engine's highest rank, vectors in a ragged step.
        """
        sizes = self._decode_sizes if tokens.is_decode else self._ragged_sizes
        size = next((size for size in sizes if size >= len(tokens)), None)
        num_pages = self._inputs.route(tokens, size) if size is not None else None
        if size is None or num_pages is None:
            return None
        has_vectors = self._inputs.send_vectors(tokens, size)
        fitting = (shape for shape in self._of_size(size, not tokens.is_decode) if shape.most_pages >= num_pages)
        shape = next((shape for shape in fitting if shape.has_vectors == has_vectors), None)
        if shape is None:
            return None
        self._inputs.fill(tokens, pending, size)
        self._graphs[shape].replay()
        return self._logits[: len(tokens.last_rows)]

    def _shapes(self) -> list[_Shape]:
        """The largest first."""
        kinds = (self._decode_sizes, False), (self._ragged_sizes, True)
        shapes = (shape for sizes, is_ragged in kinds for size in sizes for shape in self._of_size(size, is_ragged))
        return sorted(shapes, reverse=True)

    def _of_size(self, size: int, is_ragged: bool) -> list[_Shape]:
        """The shapes of one size and kind, with vectors last, each of these two the fewest pages first."""
        limits = self._page_limits(size)
        with_vectors = sorted({limits[0], limits[-1]}) if self._may_have_vectors and not is_ragged else []
        return [
            *(_Shape(size, is_ragged, False, limit) for limit in limits),
            *(_Shape(size, is_ragged, True, limit) for limit in with_vectors),
        ]

    def _page_limits(self, size: int) -> list[int]:
        """How many pages of adapters each of a size's graphs takes, ascending."""
        most = size * self._max_pages
        return [0, most] if self._invariant else [0, *page_limits(size, most)]

    def _forward(self, shape: _Shape, decoder: Decoder) -> None:
        sampled = min(shape.size, len(self._logits))
        most_sampled = sampled if shape.is_ragged else None
        batch = self._inputs.batch(shape.size, shape.most_pages, most_sampled, has_vectors=shape.has_vectors)
        self._logits[:sampled].copy_(decoder(batch, self._cache.layers[: len(decoder.layers)]))


def _sizes(among: tuple[int, ...], most: int) -> list[int]:
    """The numbers of rows to record, up to `most`."""
    most = min(most, MAX_ROWS)
    return [*(size for size in among if size < most), most]
