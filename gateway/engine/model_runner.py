"""One step on the device: from scheduled sequences to the logits of those that sample."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from adapters_store.slots import AdapterSlots
from gateway.engine.decode_graphs import DecodeGraphs
from gateway.engine.kv_cache import KVCache
from gateway.engine.scheduler import SchedulerOutput
from gateway.engine.sequence import Sequence
from gateway.layers.forward_batch import ForwardBatch
from gateway.layers.rotary import RotaryTable
from gateway.models.decoder import Decoder
from lora_kernels.attention import AttentionMetadata
from lora_kernels.segments import LoRASegments


class ModelRunner:
    """Turns sequences into a `ForwardBatch` and runs the decoder over it."""

    def __init__(self, decoder: Decoder, cache: KVCache, slots: AdapterSlots, max_model_len: int) -> None:
        self.decoder = decoder
        self.cache = cache
        self.slots = slots
        self.max_model_len = max_model_len
        config = decoder.config
        self.rotary = RotaryTable(
            config.inv_freq, config.rope_attention_scaling, max_model_len, decoder.device, decoder.dtype
        )

        self._attention: AttentionMetadata | None = None  # of the last step
        self._graphs: DecodeGraphs | None = None

    def capture_graphs(self, max_rows: int, max_rank: int) -> None:
        """Record decode steps of up to `max_rows` sequences with adapters of up to `max_rank`. On CUDA only."""
        self._graphs = DecodeGraphs(
            self.decoder,
            self.cache,
            self.slots,
            self.rotary,
            max_rows=max_rows,
            max_len=self.max_model_len,
            max_rank=max_rank,
        )
        self._graphs.capture()

    def execute(self, output: SchedulerOutput) -> torch.Tensor:
        """Run the step. Returns the fp32 logits of `output.sampled`: [num_sampled, vocab]."""
        if self._graphs is not None and output.is_decode:
            logits = self._graphs.run(output.sampled)
            if logits is not None:
                return logits
        return self.decoder(self._batch(output), self.cache.layers)

    def _batch(self, output: SchedulerOutput) -> ForwardBatch:
        scheduled = output.scheduled
        device = self.decoder.device
        query_lens = [num_tokens for _, num_tokens in scheduled]
        input_ids, positions, slot_mapping = self._tokens(scheduled)
        cos, sin = self.rotary.at(_to(positions, device))
        self._attention = AttentionMetadata.build(
            query_lens,
            [s.num_computed + n for s, n in scheduled],
            [s.block_table for s, _ in scheduled],
            self.cache.block_size,
            device,
            previous=self._attention,
        )
        return ForwardBatch(
            input_ids=_to(input_ids, device),
            slot_mapping=_to(slot_mapping, device),
            attention=self._attention,
            cos=cos,
            sin=sin,
            last_rows=_to(_last_rows(output, query_lens), device),
            adapters=self.slots,
            segments=self._segments([s for s, _ in scheduled], query_lens),
        )

    def _tokens(self, scheduled: Seq[tuple[Sequence, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The step's token ids, positions and cache slots, each int64 [num_tokens]."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        size = self.cache.block_size
        for sequence, num_tokens in scheduled:
            first = sequence.num_computed
            table = sequence.block_table
            ids.extend(sequence.token_ids[first : first + num_tokens])
            positions.extend(range(first, first + num_tokens))
            slots.extend(table[p // size] * size + p % size for p in range(first, first + num_tokens))
        return np.array(ids, np.int64), np.array(positions, np.int64), np.array(slots, np.int64)

    def _segments(self, sequences: Seq[Sequence], query_lens: Seq[int]) -> LoRASegments | None:
        slots = np.array([s.slot for s in sequences], np.int32)
        if (slots < 0).all():
            return None
        pages = {int(slot): self.slots.pages_of(int(slot)) for slot in np.unique(slots) if slot >= 0}
        return LoRASegments.build(np.repeat(slots, query_lens), pages, self.decoder.device)


def _last_rows(output: SchedulerOutput, query_lens: Seq[int]) -> np.ndarray:
    """The row of each sampled sequence's last token: int64 [num_sampled]."""
    sampled = set(map(id, output.sampled))
    ends = np.cumsum(query_lens) - 1
    return ends[[id(s) in sampled for s, _ in output.scheduled]].astype(np.int64)


def _to(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
