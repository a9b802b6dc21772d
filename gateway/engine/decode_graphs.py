"""Decode steps recorded as CUDA graphs: the host launches one graph instead of hundreds of kernels."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from adapters_store.slots import AdapterSlots, num_pages_for
from gateway.engine.kv_cache import KVCache
from gateway.engine.pending import PendingTokens, resolve
from gateway.engine.scheduler import Chunk
from gateway.layers.forward_batch import ForwardBatch
from gateway.layers.rotary import RotaryTable
from gateway.models.decoder import Decoder
from lora_kernels.attention import AttentionMetadata
from lora_kernels.segments import LoRASegments, Routing, fixed_size, order_capacity

_MAX_ROWS = 512
_WARM_UPS = 2  # the first compiles kernels, the second sees that nothing more is allocated


class _Inputs:
    """What a decode step reads, at addresses that never change, each beside its pinned twin on the host.

    For up to `size` rows: input_ids, positions, slot_mapping int64 [size]; context_len int32 [size]; block_table int32
    [size, max_blocks]; routing int32 [fixed_size(size, max_pages)], as `LoRASegments.fixed` takes it.
    """

    def __init__(self, size: int, max_blocks: int, max_pages: int, device: torch.device) -> None:
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "input_ids": ((size,), torch.int64),
            "positions": ((size,), torch.int64),
            "slot_mapping": ((size,), torch.int64),
            "context_len": ((size,), torch.int32),
            "block_table": ((size, max_blocks), torch.int32),
            "routing": ((fixed_size(size, max_pages),), torch.int32),
        }
        self.device = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
        self._pinned = {name: torch.zeros(shape, dtype=dtype).pin_memory() for name, (shape, dtype) in shapes.items()}
        self.host: dict[str, npt.NDArray[np.int64]] = {name: tensor.numpy() for name, tensor in self._pinned.items()}

    def send(self, rows: int, names: Seq[str]) -> None:
        """Copy the first `rows` rows of some inputs to the device."""
        for name in names:
            self.device[name][:rows].copy_(self._pinned[name][:rows], non_blocking=True)


class DecodeGraphs:
    """One graph a batch size, with adapters and without; a batch is padded to the next size.

    A padding row attends to nothing and writes its key and value to the cache's scratch block.
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
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._slots = slots
        self._rotary = rotary
        self._sizes = _sizes(max_rows)
        max_blocks = -(-max_len // cache.block_size)
        self._max_pages = num_pages_for(max_rank)
        self._inputs = _Inputs(self._sizes[-1], max_blocks, self._max_pages, decoder.device)
        self._query_start = torch.arange(self._sizes[-1] + 1, dtype=torch.int32, device=decoder.device)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Record all graphs, the largest first, so that the others fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        self._inputs.host["slot_mapping"][:] = self._cache.scratch_slot
        self._inputs.send(self._sizes[-1], ["slot_mapping"])
        for size in reversed(self._sizes):
            for has_adapters in (True, False):
                for _ in range(_WARM_UPS):
                    self._forward(size, has_adapters)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    logits = self._forward(size, has_adapters)
                self._graphs[size, has_adapters] = graph, logits

    def run(self, chunks: Seq[Chunk], pending: PendingTokens | None) -> torch.Tensor | None:
        """The fp32 logits [len(chunks), vocab] of one more token each, until the next call overwrites them.

        None where no graph fits: too many rows, or an adapter above the engine's highest rank.
        """
        rows = len(chunks)
        size = next((size for size in self._sizes if size >= rows), None)
        if size is None:
            return None
        token_slots = np.array([sequence.slot for sequence, _, _ in chunks], np.int32)
        has_adapters = bool((token_slots >= 0).any())
        if has_adapters and not self._fill_adapters(token_slots, size):
            return None
        self._fill(chunks, size, pending)
        graph, logits = self._graphs[size, has_adapters]
        graph.replay()
        return logits[:rows]

    def _fill(self, chunks: Seq[Chunk], size: int, pending: PendingTokens | None) -> None:
        host, block_size = self._inputs.host, self._cache.block_size
        rows = len(chunks)
        positions = np.array([start for _, start, _ in chunks])
        host["input_ids"][:rows] = -1 if pending is None else pending.marks
        for row in np.flatnonzero(host["input_ids"][:rows] == (-1 if pending is None else 0)).tolist():
            sequence, start, _ = chunks[row]
            host["input_ids"][row] = sequence.token_ids[start]
        host["positions"][:rows] = positions
        host["context_len"][:rows] = positions + 1
        host["context_len"][rows:size] = 0
        table = host["block_table"]
        for row, (sequence, _, _) in enumerate(chunks):
            table[row, : len(sequence.block_table)] = sequence.block_table
        blocks = table[np.arange(rows), positions // block_size].astype(np.int64)
        host["slot_mapping"][:rows] = blocks * block_size + positions % block_size
        host["slot_mapping"][rows:size] = self._cache.scratch_slot
        self._inputs.send(size, ["input_ids", "positions", "slot_mapping", "context_len", "block_table"])
        if pending is not None:
            ids = self._inputs.device["input_ids"][:rows]
            ids.copy_(resolve(ids, pending.token_ids))

    def _fill_adapters(self, token_slots: npt.NDArray[np.int32], size: int) -> bool:
        """Write the routing; returns whether it fits."""
        routing = Routing.of(token_slots, size, self._slots.slot_pages)
        if routing.max_pages > self._max_pages:
            return False
        packed = routing.packed(order_capacity(self._sizes[-1]))
        self._inputs.host["routing"][: len(packed)] = packed
        self._inputs.send(len(packed), ["routing"])
        return True

    def _forward(self, size: int, has_adapters: bool) -> torch.Tensor:
        inputs = {name: tensor[:size] for name, tensor in self._inputs.device.items()}
        cos, sin = self._rotary.at(inputs["positions"])
        attention = AttentionMetadata.fixed(
            inputs["block_table"], inputs["context_len"], self._query_start[: size + 1], self._cache.block_size
        )
        batch = ForwardBatch(
            input_ids=inputs["input_ids"],
            slot_mapping=inputs["slot_mapping"],
            attention=attention,
            cos=cos,
            sin=sin,
            last_rows=None,
            adapters=self._slots,
            segments=LoRASegments.fixed(
                self._inputs.device["routing"], size, self._sizes[-1], self._max_pages, size * self._max_pages
            )
            if has_adapters
            else None,
        )
        return self._decoder(batch, self._cache.layers)


def _sizes(most: int) -> list[int]:
    """The batch sizes to record, up to `most` rows: no batch is padded by more than a half of its rows or seven."""
    most = min(most, _MAX_ROWS)
    return [*(size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384) if size < most), most]
