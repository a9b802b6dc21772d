"""What the engine tells about itself: a snapshot of its state, and what one step did."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.engine.request import FinishReason, TokenDelta


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Counters count from the engine's start; adapters are named "tenant/name:3"."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    kv_host_usage: float = 0.0
    kv_host_hits: int = 0
    kv_host_saved: int = 0
    kv_host_loaded: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    resident_adapters: int = 0
    adapter_slots: int = 0
    adapter_pages: int = 0
    lent_pages: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    adapter_load_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """One finished request's clock, in seconds; a stage that it never reached is None."""

    tenant: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    max_tokens: int
    num_sequences: int
    e2e: float
    queued: float | None
    prefill: float | None
    decode: float | None


@dataclass(slots=True)
class StepOutput:
    """What one engine step did.

    deltas: new tokens and ends, to be handed out. num_tokens: rows of the forward pass; num_sequences, num_adapters:
    how many sequences and distinct adapters shared it. first_tokens and inter_tokens: seconds since the arrival of
    each request that got its first token in this step, and since the previous token of each other one.
    """

    deltas: list[TokenDelta] = field(default_factory=list)
    num_tokens: int = 0
    num_sequences: int = 0
    num_adapters: int = 0
    first_tokens: list[float] = field(default_factory=list)
    inter_tokens: list[float] = field(default_factory=list)
    finished: list[RequestTimings] = field(default_factory=list)
