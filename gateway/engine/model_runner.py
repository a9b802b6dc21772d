"""One step on the device: from scheduled sequences to the logits of those that sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from adapters_store.bottleneck_slots import BottleneckSlots
from adapters_store.slots import AdapterSlots
from adapters_store.token_pool import TokenPool
from adapters_store.vector_slots import VectorSlots
from gateway.config import EngineConfig
from gateway.engine.arena import Arena
from gateway.engine.host_tier import HostTier
from gateway.engine.kv_cache import cache_dtype
from gateway.engine.memory_plan import MemoryPlan
from gateway.engine.pending import PendingTokens, resolve
from gateway.engine.raw_vectors import RawVectors
from gateway.engine.scheduler_output import Chunk, SchedulerOutput
from gateway.engine.step_graphs import MAX_ROWS, StepGraphs
from gateway.engine.step_tokens import StepTokens
from gateway.engine.transfers import send
from gateway.errors import ConfigInvalid
from gateway.layers.bottleneck import BottleneckRows
from gateway.layers.forward_batch import ForwardBatch, OwnTokens, VirtualRows
from gateway.layers.rotary import RotaryTable
from gateway.models.decoder import Decoder
from gateway.models.loader import resolve_adapter_dtype
from lora_kernels.argmax import row_argmax
from lora_kernels.attention import AttentionMetadata
from lora_kernels.launch import compiled_ahead
from lora_kernels.nf4_lora import most_fused_pages
from lora_kernels.segments import PAGE_RANK, AdapterPages, LoRASegments


class ModelRunner:
    """Turns sequences into a `ForwardBatch` and runs the decoder over it."""

    def __init__(
        self,
        decoder: Decoder,
        arena: Arena,
        slots: AdapterSlots,
        max_model_len: int,
        host_tier: HostTier | None = None,
        *,
        invariant: bool = False,
    ) -> None:
        self.decoder = decoder
        self.invariant = invariant
        self.arena = arena
        self.cache = arena.cache
        self.host_tier = host_tier
        self.slots = slots
        self.max_model_len = max_model_len
        config = decoder.config
        self.rotary = RotaryTable(
            config.inv_freq, config.rope_attention_scaling, max_model_len, decoder.device, decoder.dtype
        )

        self.raw_vectors = RawVectors(decoder, slots, slots.vectors) if slots.vectors is not None else None
        self._attention: AttentionMetadata | None = None  # of the last step
        self._graphs: StepGraphs | None = None

    @classmethod
    def build(cls, config: EngineConfig, decoder: Decoder, plan: MemoryPlan) -> Self:
        """With the cache, its second tier and the slots of `plan`, and on CUDA with graphs, unless `enforce_eager`.

        Raises `ConfigInvalid` when the longest sequence fits neither the base nor the cache.
        """
        cache_tokens = plan.num_blocks * plan.block_size
        max_model_len = _max_model_len(config, decoder.config.max_position_embeddings, cache_tokens)
        device, dtype = decoder.device, decoder.dtype
        adapter_dtype = resolve_adapter_dtype(config, dtype)
        arena = Arena(decoder, plan, adapter_dtype, cache_dtype(config, dtype, device))
        layers = [layer.tensors for layer in arena.cache.layers]
        host_tier = HostTier(layers, plan.num_host_blocks) if plan.num_host_blocks else None
        pages, token_rows = config.num_usable_bottleneck_pages, config.num_usable_token_rows
        slots = AdapterSlots(
            decoder.lora_layout,
            config.num_adapter_slots,
            plan.num_adapter_pages,
            adapter_dtype,
            device,
            VectorSlots(decoder.vector_layout, config.num_vector_rows, device) if config.num_vector_rows else None,
            BottleneckSlots(decoder.bottleneck_layout, pages, device) if pages else None,
            TokenPool(token_rows, decoder.config.hidden_size, decoder.config.vocab_size, dtype, device)
            if token_rows
            else None,
            arena.pools,
        )
        runner = cls(decoder, arena, slots, max_model_len, host_tier, invariant=config.batch_invariant)
        if device.type == "cuda" and not config.enforce_eager:
            runner.capture_graphs(
                config.max_rows,
                config.step_tokens(device.type),
                config.max_lora_rank if config.num_adapter_slots else 0,
            )
        return runner

    def capture_graphs(self, max_rows: int, max_tokens: int, max_rank: int) -> None:
        """Record small steps: of up to `max_rows` decode rows, of up to `max_tokens` with chunks of prompts among them.

        max_rank: of their adapters. On CUDA only. What other steps need is compiled as well.
        """
        graphs = StepGraphs(
            self.decoder,
            self.cache,
            self.slots,
            self.rotary,
            max_rows=max_rows,
            max_tokens=max_tokens,
            max_len=self.max_model_len,
            max_rank=max_rank,
            invariant=self.invariant,
        )
        with compiled_ahead(partial(self._rehearse, graphs, max_tokens, max_rank > 0)):
            graphs.capture()
        self._graphs = graphs

    @torch.inference_mode()
    def _rehearse(self, graphs: StepGraphs, max_tokens: int, has_adapters: bool) -> None:
        """Call the kernels of all small steps, of prompts that no graph takes, and of the host tier."""
        graphs.rehearse()
        if self.host_tier is not None:
            self.host_tier.rehearse()
        for size in sorted({2 * MAX_ROWS, max_tokens}):
            if MAX_ROWS < size <= max_tokens:
                self._rehearse_prompt(size, has_adapters)
        self._attention = None  # its plans were not made

    def _rehearse_prompt(self, size: int, has_adapters: bool) -> None:
        """Call the kernels of a step of so many tokens: of the bare base, of an adapter, and of many."""
        decoder, device = self.decoder.abridged(), self.decoder.device
        rows, lens, blocks = np.zeros(size, np.int64), np.array([size]), [0] * -(-size // self.cache.block_size)
        tokens = StepTokens(rows, rows, rows, np.full(size, -1, np.int32), lens, lens, 0, [blocks], lens - 1)
        base = self._batch(tokens, None, None)
        for num_adapters in (0, 1, most_fused_pages(size) + 1) if has_adapters else (0,):
            slots = np.arange(size, dtype=np.int32) % num_adapters if num_adapters else tokens.adapter_slots
            slot_pages = dict.fromkeys(range(num_adapters), AdapterPages(PAGE_RANK, (0,)))
            segments = LoRASegments.build(slots, slot_pages, device, self.invariant)
            logits = decoder(replace(base, segments=segments), self.cache.layers[: len(decoder.layers)])
        if decoder.num_logits:
            row_argmax(logits)

    def drop_graphs(self) -> None:
        """Run every step by its kernels from now on."""
        self._graphs = None

    def execute(self, output: SchedulerOutput, pending: PendingTokens | None) -> torch.Tensor:
        """Run the step. Returns the logits of `output.sampled` in the decoder's dtype: [num_sampled, vocab], on rank 0.

        pending: where the last tokens of `output.scheduled` are, unless the host knows them all.
        """
        if self.host_tier is not None and (output.saves or output.loads):
            self.host_tier.move(output.saves, output.loads)
        if output.copies:
            pairs = send(np.array(output.copies, np.int64), self.decoder.device)
            self.cache.copy_blocks(pairs[:, 0], pairs[:, 1])
        if output.prefixes:
            self._store_prefixes(output.prefixes)
        if self.slots.vectors is not None and self.slots.vectors.raw:
            self._resolve_vectors(output)
        if self.invariant and self.decoder.device.type == "cpu":
            return self._execute_by_token(output, pending)
        tokens = StepTokens.of(output, pending, self.cache.block_size)
        virtual = self._virtual_rows(output.chunks, tokens.ids)
        may_replay = virtual is None and not self._has_bottlenecks(tokens) and not self._token_holders(tokens)
        logits = self._graphs.run(tokens, pending) if self._graphs is not None and may_replay else None
        return self._forward(tokens, virtual, pending) if logits is None else logits

    def _store_prefixes(self, prefixes: Seq[Chunk]) -> None:
        """Write the keys and values that adapters hold themselves where a step would have written computed ones."""
        prefixes = sorted(prefixes, key=lambda chunk: chunk.num_tokens > 1)  # as StepTokens wants them
        tokens = StepTokens.of(SchedulerOutput(0, prefixes), None, self.cache.block_size)
        slots = send(tokens.cache_slots, self.decoder.device)
        # [num_tokens, 2 * num_layers, num_kv_heads, head_dim]
        rows = torch.cat([self._virtual_tokens(chunk) for chunk in prefixes]).to(self.decoder.dtype)
        rows = rows.view(*rows.shape[:2], *self.cache.layers[0].k.shape[2:])
        for index, layer in enumerate(self.cache.layers):
            layer.store(slots, rows[:, 2 * index], rows[:, 2 * index + 1])
        self._attention = None  # pages that the step before has gathered may have been of these blocks

    def _resolve_vectors(self, output: SchedulerOutput) -> None:
        """Before the first step of an adapter that came in: all ranks run the same steps, and must do this alike."""
        assert self.raw_vectors is not None
        assert self.slots.vectors is not None
        used = {*output.rows.slots.tolist(), *(chunk.sequence.slot for chunk in output.chunks)}
        for slot in sorted(used & self.slots.vectors.raw.keys()):
            self.raw_vectors.resolve(slot)

    def _execute_by_token(self, output: SchedulerOutput, pending: PendingTokens | None) -> torch.Tensor:
        """`execute`, each token by itself: the order of PyTorch's sums on a CPU depends on the number of rows."""
        logits = [torch.empty((0, self.decoder.config.vocab_size), dtype=self.decoder.dtype)]
        sampled = set(output.sampled)
        for row, (sequence, start, num_tokens) in enumerate(output.scheduled):
            own = None if pending is None else PendingTokens(pending.token_ids, pending.sources[row : row + 1])
            for position in range(start, start + num_tokens):
                step = SchedulerOutput(output.number, [Chunk(sequence, position, 1)])
                if sequence in sampled and position == start + num_tokens - 1:
                    step.sampled.append(sequence)
                tokens = StepTokens.of(step, own, self.cache.block_size)
                logits.append(self._forward(tokens, self._virtual_rows(step.chunks, tokens.ids), own))
        return torch.cat(logits)

    def _forward(self, tokens: StepTokens, virtual: VirtualRows | None, pending: PendingTokens | None) -> torch.Tensor:
        return self.decoder(self._batch(tokens, virtual, pending), self.cache.layers)

    def _batch(self, tokens: StepTokens, virtual: VirtualRows | None, pending: PendingTokens | None) -> ForwardBatch:
        device = self.decoder.device
        parts = tokens.ids, tokens.positions, tokens.cache_slots, tokens.last_rows
        ids, positions, slot_mapping, last_rows = send(np.concatenate(parts), device).split_with_sizes(
            [len(part) for part in parts]
        )
        cos, sin = self.rotary.at(positions)
        self._attention = AttentionMetadata.build(
            tokens.query_lens.tolist(),
            tokens.context_lens.tolist(),
            tokens.block_tables,
            self.cache.block_size,
            device,
            previous=self._attention,
        )
        vector_rows = self.slots.vector_rows(tokens.adapter_slots)
        segments = None
        if (tokens.adapter_slots >= 0).any():
            segments = LoRASegments.build(tokens.adapter_slots, self.slots.slot_pages, device, self.invariant)
        bottlenecks = tuple(self._bottleneck_rows(tokens.adapter_slots)) if self._has_bottlenecks(tokens) else ()
        return ForwardBatch(
            input_ids=ids if pending is None else resolve(ids, pending.token_ids),
            slot_mapping=slot_mapping,
            attention=self._attention,
            cos=cos,
            sin=sin,
            last_rows=last_rows,
            adapters=self.slots,
            segments=segments,
            invariant=self.invariant,
            virtual=virtual,
            vector_rows=send(vector_rows, device) if vector_rows is not None else None,
            bottlenecks=bottlenecks,
            split_rows=self._split_rows(bottlenecks),
            own_tokens=self._own_tokens(tokens),
        )

    def _token_holders(self, tokens: StepTokens) -> list[int]:
        return self.slots.tokens.holders(tokens.adapter_slots) if self.slots.tokens is not None else []

    def _own_tokens(self, tokens: StepTokens) -> OwnTokens | None:
        holders, pool, device = self._token_holders(tokens), self.slots.tokens, self.decoder.device
        if pool is None or not holders:
            return None
        sampled = tokens.adapter_slots[tokens.last_rows]
        with_head = (slot for slot in holders if pool.head(slot) is not None)
        heads = ((slot, np.flatnonzero(sampled == slot)) for slot in with_head)
        return OwnTokens(
            send(tokens.adapter_slots.astype(np.int64), device),
            tuple((slot, send(rows, device)) for slot, rows in heads if len(rows)),
        )

    def _has_bottlenecks(self, tokens: StepTokens) -> bool:
        return self.slots.bottlenecks is not None and self.slots.bottlenecks.has_any(tokens.adapter_slots)

    def _bottleneck_rows(self, token_slots: npt.NDArray[np.int32]) -> Iterator[BottleneckRows]:
        """The rows of bottleneck adapters, those that are computed alike together."""
        assert self.slots.bottlenecks is not None
        device = self.decoder.device
        for site, reads, activation, slot_pages in self.slots.bottlenecks.groups(token_slots):
            is_own = np.isin(token_slots, list(slot_pages))
            own = np.where(is_own, token_slots, np.int32(-1))
            segments = LoRASegments.build(own, slot_pages, device, self.invariant)
            assert segments is not None
            tokens = np.flatnonzero(is_own)
            first_page = np.zeros(self.slots.num_slots, np.int64)
            first_page[list(slot_pages)] = [pages.ids[0] for pages in slot_pages.values()]
            first_pages = first_page[token_slots[tokens]]
            yield BottleneckRows(
                site, reads, activation, segments, tokens=send(tokens, device), first_pages=send(first_pages, device)
            )

    def _split_rows(self, bottlenecks: Iterable[BottleneckRows]) -> torch.Tensor | None:
        split = (rows.segments.segments for rows in bottlenecks if rows.site in ("gate", "up"))
        tokens = [segment.tokens for segment in chain.from_iterable(split)]
        return send(np.unique(np.concatenate(tokens)), self.decoder.device) if tokens else None

    def _virtual_rows(self, chunks: Seq[Chunk], ids: np.ndarray) -> VirtualRows | None:
        """The virtual tokens among the ids [num_tokens], which become any token's: their embeddings are their own."""
        rows = np.flatnonzero(ids >= self.decoder.config.vocab_size)
        if not len(rows):
            return None
        ids[rows] = 0
        embeddings = [self._virtual_tokens(chunk) for chunk in chunks if chunk.start < self._num_virtual(chunk)]
        return VirtualRows(send(rows, self.decoder.device), torch.cat(embeddings).to(self.decoder.dtype))

    def _num_virtual(self, chunk: Chunk) -> int:
        virtual = self.slots.virtual_tokens(chunk.sequence.slot)
        return 0 if virtual is None else len(virtual)

    def _virtual_tokens(self, chunk: Chunk) -> torch.Tensor:
        """What the chunk has of its adapter's, on the device: [n, ...]. Comes from pinned memory; nothing waits."""
        virtual = self.slots.virtual_tokens(chunk.sequence.slot)
        assert virtual is not None
        return virtual[chunk.start : chunk.start + chunk.num_tokens].to(self.decoder.device, non_blocking=True)


def _max_model_len(config: EngineConfig, positions: int, cache_tokens: int) -> int:
    wanted = config.max_model_len or min(positions, cache_tokens)
    if wanted > positions:
        raise ConfigInvalid(
            f"engine.max_model_len {wanted} is more than the base's {positions} positions.",
            param="engine.max_model_len",
        )
    if wanted > cache_tokens:
        raise ConfigInvalid(
            f"engine.max_model_len {wanted} does not fit the KV cache of {cache_tokens} tokens; raise kv_cache_tokens "
            "or lower max_model_len.",
            param="engine.max_model_len",
        )
    return wanted
