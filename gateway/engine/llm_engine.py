"""The engine: `step()` schedules, runs and updates; requests go in by `add`, tokens come out as deltas."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Final

import torch

from adapters_store.blobs import BlobStore
from adapters_store.host_cache import HostCache, read_adapter
from adapters_store.residency import AdapterResidency
from gateway.config import EngineConfig
from gateway.engine.block_manager import BlockManager, prefix_root
from gateway.engine.detokenizer import IncrementalDetokenizer, TokenTable
from gateway.engine.host_blocks import HostBlocks
from gateway.engine.in_flight import StepInFlight
from gateway.engine.lent_pages import LentPages
from gateway.engine.memory_plan import MemoryPlan
from gateway.engine.model_runner import ModelRunner
from gateway.engine.pending import PendingTokens
from gateway.engine.prompt import PromptEncoder
from gateway.engine.prompt_lookup import NgramIndex, PromptLookup
from gateway.engine.request import FinishReason, GenerateRequest, TokenDelta, TokenLogprob, Usage
from gateway.engine.sampler import RawLogprob, Sampler
from gateway.engine.sampling_row import SamplingRow
from gateway.engine.scheduler import Scheduler
from gateway.engine.scheduler_output import SchedulerOutput
from gateway.engine.sequence import RunningRequest, Sequence
from gateway.engine.stats import EngineStats, RequestTimings, StepOutput
from gateway.engine.step_graphs import MAX_ROWS
from gateway.engine.workers import Workers
from gateway.errors import AdapterNotFinite, GatewayError, InternalError, InvalidRequest
from gateway.models.loader import load_model

logger = logging.getLogger(__name__)

# Seconds after which a step that had nothing to run is tried again: loads wake the caller, copies of a ms do not.
_LOADING_POLL: Final = 0.005
_COPYING_POLL: Final = 0.0002


class LLMEngine:
    """One base on one device, or shared by several, many adapters, continuous batching. Used by one thread.

    Raises `BaseModelUnsupported` or `ConfigInvalid` when it cannot be built, `InternalError` when another rank fails.
    """

    def __init__(self, config: EngineConfig, blobs: BlobStore, on_adapter_ready: Callable[[], None]) -> None:
        self._workers: Workers | None = None
        if config.tensor_parallel_size != 1:
            self._workers = Workers(config, blobs)
            weakref.finalize(self, self._workers.close)  # where nobody calls `close`, as when what follows raises
        self.model = load_model(config, self._workers.ranks if self._workers is not None else None)
        decoder = self.model.decoder
        plan = MemoryPlan.measure(config, decoder)
        if self._workers is not None:
            plan = self._workers.agree(plan)
        logger.info("beside the base on %s: %s", decoder.device, plan)
        self.runner = ModelRunner.build(config, decoder, plan)
        self.max_model_len = self.runner.max_model_len
        slots = self.runner.slots
        read = self._workers.reader(self.model, slots.dtype) if self._workers is not None else read_adapter
        self.host_cache = HostCache(
            blobs,
            slots.layout,
            slots.dtype,
            config.host_cache_bytes // config.tensor_parallel_size,
            pinned=decoder.device.type == "cuda",
            read=read,
            vectors=slots.vectors.layout if slots.vectors is not None else None,
            bottlenecks=slots.bottlenecks.layout if slots.bottlenecks is not None else None,
            token_dtype=slots.tokens.rows.dtype if slots.tokens is not None else None,
        )
        self.residency = AdapterResidency(slots, self.host_cache, on_adapter_ready, share=config.tenant_adapter_share)
        arena = self.runner.arena
        self.blocks = BlockManager(
            arena.own_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            host=HostBlocks(plan.num_host_blocks, plan.least_fetch),
        )
        if config.lend_adapter_pages:
            under = [arena.blocks_under(page) for page in range(slots.num_pages)]
            LentPages(under, self.blocks, slots.pages, self.residency)
        self.scheduler = Scheduler(
            self.blocks,
            self.residency,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.step_tokens(decoder.device.type),
            max_rows=min(config.max_rows, MAX_ROWS),
            max_adapter_pages=config.max_adapter_pages_per_step,
        )
        self.prompts = PromptEncoder(
            self.model.tokenizer, decoder.config.vocab_size, self.max_model_len, config.default_max_tokens
        )
        self.sampler = Sampler(decoder.config.eos_token_ids, invariant=config.batch_invariant)
        self._table = TokenTable(self.model.tokenizer.backend_tokenizer)
        self._slots = slots
        self._config = config
        self._overlap = config.overlap_steps if config.overlap_steps is not None else decoder.device.type == "cuda"
        self._in_flight: StepInFlight | None = None
        self._unfinished: StepOutput | None = None  # what a step hands out, while it runs or has failed
        self._requests: dict[str, RunningRequest] = {}
        self._prompt_tokens = 0
        self._generation_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or any step in flight."""
        return self.scheduler.has_work

    @property
    def healthy(self) -> bool:
        """Whether every other rank is there."""
        return self._workers is None or self._workers.failure is None

    @property
    def num_unfinished(self) -> int:
        """Accepted requests that have not ended."""
        return len(self._requests)

    @property
    def poll_interval(self) -> float:
        """Seconds to wait, unless `on_adapter_ready` is called, after a step that ran nothing while there is work."""
        return _COPYING_POLL if self.residency.is_copying else _LOADING_POLL

    def encode(self, request: GenerateRequest) -> list[int]:
        """The prompt's token ids, checked; may be called from any thread. Raises `GatewayError` subclasses."""
        guessed, most = request.sampling.num_speculative_tokens, self._config.max_speculative_tokens
        if guessed > most:
            raise InvalidRequest(
                f"num_speculative_tokens may be at most {most} here, not {guessed}", param="num_speculative_tokens"
            )
        prompt = self.prompts.encode(request)
        self.prompts.max_tokens(request, len(prompt))
        return prompt

    def add(self, request: GenerateRequest, prompt: list[int]) -> None:
        """Queue a request whose prompt `encode` has made."""
        running = RunningRequest(request, len(prompt), self.prompts.max_tokens(request, len(prompt)))
        adapter = request.adapter
        shared = self._config.share_base_prefixes and adapter is None
        root = prefix_root(
            self.model.spec.fingerprint,
            adapter.digest if adapter is not None else None,
            "" if shared else request.cache_salt,
        )
        end_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            end_ids |= frozenset(self.model.decoder.config.eos_token_ids)
        # Each is in no prompt and only once in a sequence, so that no guess finds one.
        vocab_size = self.model.decoder.config.vocab_size
        virtual = range(vocab_size, vocab_size + request.num_virtual_tokens)
        given, guessed = [*virtual, *prompt], request.sampling.num_speculative_tokens
        ngrams = NgramIndex(given)
        for index in range(request.sampling.n):
            token_ids = given.copy()
            running.sequences.append(
                Sequence(
                    request=running,
                    index=index,
                    token_ids=token_ids,
                    prefix_root=root,
                    sampling=SamplingRow(request.sampling, token_ids, len(token_ids), index, len(virtual)),
                    detokenizer=IncrementalDetokenizer(self._table, prompt, request.sampling),
                    end_ids=end_ids,
                    lookup=PromptLookup(token_ids, guessed, ngrams) if guessed else None,
                )
            )
        self._requests[request.request_id] = running
        first = running.sequences[0]
        first.followers = running.sequences[1:]
        self.scheduler.add(first)

    def cancel(self, request_id: str, output: StepOutput) -> None:
        """End a request as cancelled, its last deltas into `output`; nothing when it has ended already."""
        running = self._requests.get(request_id)
        if running is not None:
            self._end(running, "cancelled", None, output)

    def abort_all(self, reason: FinishReason, error: BaseException | None) -> StepOutput:
        """End every request, also when the device has failed: a step in flight is dropped, not waited for.

        Begins with what a step that raised had to hand out.
        """
        output, self._unfinished = self._unfinished or StepOutput(), None
        for running in list(self._requests.values()):
            self._end(running, reason, error, output)
        self._in_flight = None
        self.scheduler.abandon()
        return output

    @torch.inference_mode()
    def step(self) -> StepOutput:
        """Run one batch. Comes back without tokens while adapters load.

        With overlapping steps the batch is only launched, and the tokens are those of the one before. After an
        exception the engine can only `abort_all`.
        """
        if self._workers is None:
            return self._step()
        with self._workers.explained():
            return self._step()

    def _step(self) -> StepOutput:
        output = self._unfinished = StepOutput()
        scheduled = self._schedule(output)
        if not scheduled.num_tokens and self._in_flight is not None:
            # What is to run next may depend on the tokens, or wait for the blocks, of the step in flight.
            self._land(output)
            scheduled = self._schedule(output)
        if scheduled.num_tokens:
            launched = self._launch(scheduled)
            self._land(output)
            self._in_flight = launched
            if not self._overlap:
                self._land(output)
        self._unfinished = None
        return output

    def stats(self) -> EngineStats:
        """A snapshot for metrics."""
        residency, host = self.residency.stats, self.blocks.host
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_cache_usage=self.blocks.usage,
            prefix_queries=self.blocks.prefix_queries,
            prefix_hits=self.blocks.prefix_hits,
            kv_host_usage=host.usage,
            kv_host_hits=host.num_loaded * self.blocks.block_size,
            kv_host_saved=host.num_saved,
            kv_host_loaded=host.num_loaded,
            num_preemptions=self.scheduler.num_preemptions,
            num_drafts=self.scheduler.speculation.num_drafts,
            num_accepted=self.scheduler.speculation.num_accepted,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            running_adapters=_adapter_names(self.scheduler.running),
            waiting_adapters=_adapter_names(self.scheduler.waiting),
            resident_adapters=len(residency.resident),
            adapter_slots=self._slots.num_slots,
            adapter_pages=self._slots.num_pages,
            lent_pages=self._slots.pages.num_lent,
            adapter_loads=residency.loads,
            adapter_evictions=residency.evictions,
            adapter_load_seconds=residency.load_seconds,
        )

    def check_integrity(self) -> None:
        """Assert that an idle engine holds no block and no pin."""
        self.scheduler.check_integrity()
        self.residency.check_integrity()
        assert self.residency.num_held == 0
        assert not self._requests

    def close(self) -> None:
        """Stop the other ranks, the copies of adapters to the device, and the loader threads."""
        try:
            if self._workers is not None:
                # First: what waits for them on the device is given up, and copies may wait behind it.
                self.runner.drop_graphs()
                self._workers.close()
            self._slots.close()
        finally:
            self.host_cache.close()

    def _schedule(self, output: StepOutput) -> SchedulerOutput:
        scheduled = self.scheduler.schedule()
        for sequence, error in scheduled.failed:
            self._end(sequence.request, "error", error, output)
        rows, chunks = scheduled.rows, scheduled.chunks
        output.num_tokens = scheduled.num_tokens
        output.num_sequences = len(rows) + len(chunks) - len(scheduled.drafted)
        output.num_adapters = len({*rows.slots.tolist(), *(chunk.sequence.slot for chunk in chunks)} - {-1})
        now = time.monotonic()
        for sequence, start, _ in chunks:  # nobody begins as a row
            running = sequence.request
            if running.scheduled_at is None:
                running.scheduled_at = now
                running.num_cached = max(0, start - running.request.num_virtual_tokens)
                self._prompt_tokens += running.num_prompt
        return scheduled

    def _launch(self, scheduled: SchedulerOutput) -> StepInFlight:
        """Start a step on the device, behind the one in flight."""
        rows, sampled = scheduled.rows, scheduled.sampled
        pending = self._pending([*rows.sequences, *(chunk.sequence for chunk in scheduled.chunks)])
        if self._workers is not None:
            self._workers.announce(scheduled, pending, self._slots)
        logits = self.runner.execute(scheduled, pending)
        samplings = [*rows.samplings, *(sequence.sampling for sequence in sampled[len(rows) :])]
        for row, number in scheduled.drafted.items():
            samplings[row] = samplings[row].ahead(number)
        return StepInFlight(scheduled, self.sampler(logits, samplings, self._pending(sampled)))

    def _pending(self, sequences: list[Sequence]) -> PendingTokens | None:
        return self._in_flight.pending(sequences) if self._in_flight is not None else None

    def _land(self, output: StepOutput) -> None:
        """Wait for the step in flight, if there is one, and hand out its tokens."""
        if self._in_flight is None:
            return
        scheduled, result = self._in_flight.scheduled, self._in_flight.sampled.result()
        self._in_flight = None
        if self._workers is not None:
            self._workers.land()
        self.scheduler.update(scheduled)
        bad = set(result.bad_rows)
        now = time.monotonic()
        for row, (sequence, token, logprob) in enumerate(
            zip(scheduled.sampled, result.token_ids, result.logprobs, strict=True)
        ):
            if sequence.finished:
                continue  # cancelled, or ended on an earlier row or by the step before
            is_draft = row in scheduled.drafted
            if is_draft and not self.scheduler.accept(sequence):
                continue
            if row in bad:
                self.blocks.retract(sequence)  # where it is the device's fault the next try is to compute all anew
                self._end(sequence.request, "error", _not_finite(sequence, scheduled, len(bad)), output)
            else:
                self._append(sequence, token, logprob, is_draft, now, output)

    def _append(
        self,
        sequence: Sequence,
        token: int,
        logprob: RawLogprob | None,
        is_draft: bool,
        now: float,
        output: StepOutput,
    ) -> None:
        """Add a token to a sequence and to a delta: of a draft the last of `output`, which is the sequence's."""
        sequence.token_ids.append(token)
        self._generation_tokens += 1
        running, detokenizer = sequence.request, sequence.detokenizer
        before = running.last_token_at
        if before is None:
            running.first_token_at = now
            output.first_tokens.append(now - running.arrived_at)
        elif now > before:
            output.inter_tokens.append(now - before)
        running.last_token_at = now
        is_end = token in sequence.end_ids
        text = "" if is_end else detokenizer.push(token)
        if is_draft:
            delta = output.deltas[-1]
            delta.token_ids.append(token)
            delta.text += text
        else:
            delta = TokenDelta(running.request.request_id, sequence.index, text, [token])
            output.deltas.append(delta)
        if logprob is not None:
            delta.logprobs.append(self._logprob(logprob))
        if is_end or detokenizer.stop_string is not None:
            delta.finish_reason = "stop"
        elif len(sequence.token_ids) >= sequence.max_tokens:
            delta.finish_reason = "length"
        if delta.finish_reason is not None:
            delta.text += detokenizer.flush()
            self.scheduler.finish(sequence)
            if running.finished:
                self._close(running, delta, output)

    def _logprob(self, raw: RawLogprob) -> TokenLogprob:
        text = self._table.text
        top = tuple(
            (token_id, text(token_id), logprob) for token_id, logprob in zip(raw.top_ids, raw.top_logprobs, strict=True)
        )
        return TokenLogprob(raw.token_id, text(raw.token_id), raw.logprob, top)

    def _end(
        self, running: RunningRequest, reason: FinishReason, error: BaseException | None, output: StepOutput
    ) -> None:
        """End all of a request's unfinished sequences, the last of its deltas with its usage."""
        delta: TokenDelta | None = None
        for sequence in running.sequences:
            if not sequence.finished:
                self.scheduler.finish(sequence)
                delta = TokenDelta(running.request.request_id, sequence.index, "", [])
                delta.finish_reason, delta.error = reason, error
                output.deltas.append(delta)
        if delta is not None:
            self._close(running, delta, output)

    def _close(self, running: RunningRequest, last: TokenDelta, output: StepOutput) -> None:
        del self._requests[running.request.request_id]
        last.usage = Usage(
            running.num_prompt,
            running.num_output,
            running.num_cached,
            running.num_accepted,
            running.num_drafts - running.num_accepted,
        )
        assert last.finish_reason is not None
        output.finished.append(_timings(running, last.finish_reason))


def _not_finite(sequence: Sequence, scheduled: SchedulerOutput, num_bad: int) -> GatewayError:
    """The adapter's fault, unless every row is bad though not all have one adapter: then the base or the device is."""
    is_everyone = num_bad == len(scheduled.sampled) and len({row.adapter for row in scheduled.sampled}) > 1
    if sequence.adapter is None or is_everyone:
        return InternalError("The model produced logits that are not finite; the request was ended. Retry it.")
    return AdapterNotFinite(
        f"The adapter {sequence.adapter.name} produced logits that are not finite (NaN or infinite): its weights "
        "overflow on this request. Roll back to an earlier version, or train it again with a lower learning rate.",
        param="model",
    )


def _timings(running: RunningRequest, reason: FinishReason) -> RequestTimings:
    now = time.monotonic()
    scheduled, first = running.scheduled_at, running.first_token_at
    return RequestTimings(
        tenant=running.request.tenant,
        finish_reason=reason,
        prompt_tokens=running.num_prompt,
        completion_tokens=running.num_output,
        max_tokens=running.max_tokens,
        num_sequences=len(running.sequences),
        e2e=now - running.arrived_at,
        queued=scheduled - running.arrived_at if scheduled is not None else None,
        prefill=first - scheduled if first is not None and scheduled is not None else None,
        decode=now - first if first is not None else None,
    )


def _adapter_names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    names = {s.adapter.name for s in sequences if s.adapter is not None}
    return tuple(sorted(names))
