"""Every Prometheus metric of Patchbay, by name: vLLM's names where vLLM has one, `patchbay_*` for the rest.

Where each is measured. `vllm:*` and the engine's `patchbay_*`: in the replica, on the engine's clock, so a time to
first token counts from the request's arrival at the engine and adapter loads count as queueing. `http_*`, `grpc_*` and
the rest: in the front door. Each object fills the registry that it is given; there is no global one.

Label sets are bounded: adapters appear only in `vllm:lora_requests_info`, of which one label set lives at a time;
tenants beyond the first `MAX_TENANTS` seen by a replica are counted as "other".
"""

from __future__ import annotations

import collections
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from gateway.engine.stats import EngineStats, RequestTimings, StepOutput

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_TENANTS: Final = 100

_ENGINE_LABELS: Final = ("model_name", "engine")
# vLLM's buckets, so that its dashboards show ours. Seconds.
_TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_TIME_BUCKETS: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_TIME_BUCKETS: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_TOKEN_COUNT_BUCKETS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STEP_TOKEN_BUCKETS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_STEP_BUCKETS: Final = (0, 1, 2, 3, 4, 8, 16, 32, 64, 128)
_N_BUCKETS: Final = (1, 2, 5, 10, 20)
_HTTP_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_GAUGES: Final[Mapping[str, tuple[str, str]]] = {
    "num_running": ("vllm:num_requests_running", "Requests in the running batch."),
    "num_waiting": ("vllm:num_requests_waiting", "Requests that wait to be scheduled."),
    "kv_cache_usage": ("vllm:kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it."),
    "kv_host_usage": ("patchbay_kv_host_usage_perc", "Share of the KV cache's host tier in use; 1 is all of it."),
    "resident_adapters": ("patchbay_resident_adapters", "Adapters in the engine's slots."),
    "adapter_slots": ("patchbay_adapter_slots", "Slots for adapters."),
    "adapter_pages": ("patchbay_adapter_pages", "Pages of 16 ranks for adapters."),
    "lent_pages": ("patchbay_lent_adapter_pages", "Pages of 16 ranks that the KV cache uses until an adapter does."),
}
_COUNTERS: Final[Mapping[str, tuple[str, str]]] = {
    "prefix_queries": ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache."),
    "prefix_hits": ("vllm:prefix_cache_hits", "Tokens found in the prefix cache."),
    "kv_host_hits": ("patchbay_kv_host_hits", "Tokens found in the prefix cache and fetched from its host tier."),
    "kv_host_saved": ("patchbay_kv_host_saved_blocks", "Blocks of the KV cache copied to the host tier."),
    "kv_host_loaded": ("patchbay_kv_host_loaded_blocks", "Blocks of the KV cache fetched from the host tier."),
    "num_preemptions": ("vllm:num_preemptions", "Sequences pushed back for want of cache blocks."),
    "num_drafts": ("vllm:spec_decode_num_draft_tokens", "Tokens guessed ahead."),
    "num_accepted": ("vllm:spec_decode_num_accepted_tokens", "Tokens guessed ahead that came."),
    "prompt_tokens": ("vllm:prompt_tokens", "Prompt tokens processed."),
    "generation_tokens": ("vllm:generation_tokens", "Tokens generated."),
    "adapter_loads": ("patchbay_adapter_loads", "Adapters copied into a slot."),
    "adapter_evictions": (
        "patchbay_adapter_evictions",
        "Adapters that gave their slot up.",
    ),
    "adapter_load_seconds": ("patchbay_adapter_load_seconds", "Time spent loading adapters."),
}
_FINISHED_REASON: Final = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}


class EngineMetrics:
    """What one replica's engine did. Observed on one thread; read by scrapes on any.

    engine: the replica's name in this deployment. stats: takes the engine's last snapshot, at each scrape.
    """

    def __init__(
        self, registry: CollectorRegistry, model_name: str, engine: str, stats: Callable[[], EngineStats]
    ) -> None:
        labels = {"model_name": model_name, "engine": engine}
        registry.register(_StatsCollector(labels, stats))
        self._tenants = _TenantTokens(labels)
        registry.register(self._tenants)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            family = Histogram(name, text, _ENGINE_LABELS, buckets=tuple(buckets), registry=registry)
            return family.labels(**labels)

        def latency(name: str, text: str) -> Histogram:
            return histogram(name, text, _REQUEST_TIME_BUCKETS)

        self._ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS)
        self._inter_token = _InterTokenTimes(labels)
        registry.register(self._inter_token)
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "A request's mean time a token.", _TOKEN_TIME_BUCKETS
        )
        self._e2e = latency("vllm:e2e_request_latency_seconds", "Arrival to end.")
        self._queue = latency("vllm:request_queue_time_seconds", "Arrival to first scheduled step.")
        self._prefill = latency("vllm:request_prefill_time_seconds", "First scheduled step to first token.")
        self._decode = latency("vllm:request_decode_time_seconds", "First to last token.")
        self._inference = latency("vllm:request_inference_time_seconds", "First scheduled step to last token.")
        self._prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_COUNT_BUCKETS)
        self._generated = histogram(
            "vllm:request_generation_tokens", "Tokens generated for a request.", _TOKEN_COUNT_BUCKETS
        )
        self._max_tokens = histogram(
            "vllm:request_params_max_tokens", "The max_tokens of a request.", _TOKEN_COUNT_BUCKETS
        )
        self._n = histogram("vllm:request_params_n", "The n of a request.", _N_BUCKETS)
        self._step_tokens = histogram("vllm:iteration_tokens_total", "Tokens of one engine step.", _STEP_TOKEN_BUCKETS)
        self._step_sequences = histogram(
            "patchbay_step_sequences", "Sequences that shared one engine step.", _STEP_BUCKETS
        )
        self._step_adapters = histogram(
            "patchbay_step_adapters", "Distinct adapters that shared one engine step.", _STEP_BUCKETS
        )
        success = Counter(
            "vllm:request_success", "Ended requests.", (*_ENGINE_LABELS, "finished_reason"), registry=registry
        )
        self._success = {
            reason: success.labels(**labels, finished_reason=name) for reason, name in _FINISHED_REASON.items()
        }

    def observe_step(self, step: StepOutput) -> None:
        """Count one engine step."""
        if step.num_tokens:
            self._step_tokens.observe(step.num_tokens)
            self._step_sequences.observe(step.num_sequences)
            self._step_adapters.observe(step.num_adapters)
        for seconds in step.first_tokens:
            self._ttft.observe(seconds)
        self._inter_token.add(step.inter_tokens)
        for request in step.finished:
            self._observe_request(request)

    def _observe_request(self, request: RequestTimings) -> None:
        self._success[request.finish_reason].inc()
        self._tenants.add(request.tenant, request.prompt_tokens, request.completion_tokens)
        self._e2e.observe(request.e2e)
        self._prompt.observe(request.prompt_tokens)
        self._generated.observe(request.completion_tokens)
        self._max_tokens.observe(request.max_tokens)
        self._n.observe(request.num_sequences)
        if request.queued is not None:
            self._queue.observe(request.queued)
        if request.prefill is not None:
            self._prefill.observe(request.prefill)
        if request.decode is not None:
            self._decode.observe(request.decode)
            self._inference.observe(request.decode + (request.prefill or 0.0))
            tokens = request.completion_tokens / request.num_sequences
            if tokens > 1:
                self._per_token.observe(request.decode / (tokens - 1))


class FrontDoorMetrics:
    """What one front door did. front_door: its name in this deployment."""

    def __init__(self, registry: CollectorRegistry, front_door: str) -> None:
        self._door = {"front_door": front_door}
        self._http_requests = Counter(
            "http_requests",
            "HTTP requests by route, method and status.",
            ("front_door", "method", "handler", "status"),
            registry=registry,
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "HTTP requests from their head to the last byte sent.",
            ("front_door", "method", "handler"),
            buckets=_HTTP_BUCKETS,
            registry=registry,
        )
        self._grpc_handled = Counter(
            "grpc_server_handled",
            "gRPC calls by service, method and status code.",
            ("front_door", "grpc_service", "grpc_method", "grpc_code"),
            registry=registry,
        )
        self._grpc_seconds = Histogram(
            "grpc_server_handling_seconds",
            "gRPC calls from their start to their status.",
            ("front_door", "grpc_service", "grpc_method"),
            buckets=_HTTP_BUCKETS,
            registry=registry,
        )
        self._state = {
            name: Gauge(f"patchbay_{name}", text, ("front_door",), registry=registry).labels(**self._door)
            for name, text in (
                ("running_requests", "Requests of this front door that run in a replica."),
                ("connected_replicas", "Replicas connected to this front door."),
                ("ready", "1 while this front door takes requests."),
            )
        }
        self._published = Counter(
            "patchbay_adapters_published", "Versions published by uploads.", ("front_door",), registry=registry
        ).labels(**self._door)
        self._quarantined = Counter(
            "patchbay_adapters_quarantined",
            "Versions quarantined, by their self-test or while they served.",
            ("front_door",),
            registry=registry,
        ).labels(**self._door)
        self._self_tests = Counter(
            "patchbay_self_tests", "Self-tests of versions by result.", ("front_door", "result"), registry=registry
        )
        self._self_test_seconds = Histogram(
            "patchbay_self_test_seconds",
            "Self-tests of versions, waiting for a replica included.",
            ("front_door",),
            buckets=_HTTP_BUCKETS,
            registry=registry,
        ).labels(**self._door)
        self._jobs = Gauge("patchbay_fine_tuning_jobs", "Fine-tune jobs by status.", ("status",), registry=registry)

    def http_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one HTTP request. route: the route's template ("/v1/models/{model}"), never the path itself."""
        self._http_requests.labels(**self._door, method=method, handler=route, status=str(status)).inc()
        self._http_seconds.labels(**self._door, method=method, handler=route).observe(seconds)

    def grpc_request(self, service: str, method: str, code: str, seconds: float) -> None:
        """Count one gRPC call. code: the name of its `grpc.StatusCode`."""
        labels = {**self._door, "grpc_service": service, "grpc_method": method}
        self._grpc_handled.labels(**labels, grpc_code=code).inc()
        self._grpc_seconds.labels(**labels).observe(seconds)

    def published(self) -> None:
        """Count a version that an upload published."""
        self._published.inc()

    def quarantined(self) -> None:
        """Count a version that was taken out of service."""
        self._quarantined.inc()

    def self_test(self, result: str, seconds: float) -> None:
        """Count a self-test. result: "passed", "failed" or "unavailable"."""
        self._self_tests.labels(**self._door, result=result).inc()
        self._self_test_seconds.observe(seconds)

    def set_state(self, *, running_requests: int, connected_replicas: int, ready: bool) -> None:
        """Say how the front door is, before a scrape."""
        self._state["running_requests"].set(running_requests)
        self._state["connected_replicas"].set(connected_replicas)
        self._state["ready"].set(ready)

    def set_jobs(self, by_status: Mapping[str, int]) -> None:
        """Say how many fine-tune jobs there are, before a scrape. A status that is left out has none."""
        self._jobs.clear()
        for status, number in by_status.items():
            self._jobs.labels(status=status).set(number)


def new_registry() -> CollectorRegistry:
    """An empty registry; its process writes no `_created` series, which double every family and which nobody reads."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    return CollectorRegistry()


def render(registry: CollectorRegistry) -> bytes:
    """The registry in Prometheus' text format 0.0.4."""
    return generate_latest(registry)


def merge_texts(texts: Iterable[bytes]) -> bytes:
    """One text from several processes' texts: each family's HELP and TYPE once, its samples together.

    The samples' label sets must differ between the processes, as `engine` and `front_door` make them.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}
    for text in texts:
        for block in text.decode().split("# HELP ")[1:]:
            lines = block.splitlines()
            header, samples = families.setdefault(lines[0].split(" ", 1)[0], ([], []))
            if not header:
                header += [f"# HELP {lines[0]}", lines[1]]
            samples += lines[2:]
    return "".join(f"{line}\n" for family in families.values() for part in family for line in part).encode()


class _StatsCollector(Collector):
    """The engine's snapshot as gauges and counters, read at each scrape."""

    def __init__(self, labels: Mapping[str, str], stats: Callable[[], EngineStats]) -> None:
        self._labels = labels
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        values = list(self._labels.values())
        for field, (name, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=list(self._labels))
            gauge.add_metric(values, getattr(stats, field))
            yield gauge
        for field, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=list(self._labels))
            counter.add_metric(values, getattr(stats, field))
            yield counter
        yield self._lora_info(stats)

    def _lora_info(self, stats: EngineStats) -> Metric:
        names = ("max_lora", "waiting_lora_adapters", "running_lora_adapters", *self._labels)
        info = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters of running and waiting requests; the value is unix time.", labels=names
        )
        waiting, running = ",".join(stats.waiting_adapters), ",".join(stats.running_adapters)
        info.add_metric([str(stats.adapter_slots), waiting, running, *self._labels.values()], time.time())
        return info


class _InterTokenTimes(Collector):
    """A histogram that takes a step's rows together: nearly all of them have waited as long for their tokens."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._counts = [0] * (len(_TOKEN_TIME_BUCKETS) + 1)
        self._sum = 0.0

    def add(self, seconds: Iterable[float]) -> None:
        """Count the times between two tokens that a step has brought."""
        for time_between, number in collections.Counter(seconds).items():
            self._counts[bisect_left(_TOKEN_TIME_BUCKETS, time_between)] += number
            self._sum += time_between * number

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Time between two tokens of a request.", labels=list(self._labels)
        )
        bounds = [*map(floatToGoString, _TOKEN_TIME_BUCKETS), "+Inf"]
        up_to = accumulate(self._counts.copy())
        family.add_metric(list(self._labels.values()), list(zip(bounds, up_to, strict=True)), self._sum)
        yield family


class _TenantTokens(Collector):
    """Tokens of ended requests by tenant: the first `MAX_TENANTS` tenants by name, all others as "other".

    The first and not the largest, since a counter that moved between its own series and "other" would seem to restart.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._tokens: dict[str, list[int]] = {}

    def add(self, tenant: str, prompt: int, generated: int) -> None:
        """Count one ended request."""
        if tenant not in self._tokens and len(self._tokens) >= MAX_TENANTS:
            tenant = "other"
        tokens = self._tokens.setdefault(tenant, [0, 0])
        tokens[0] += prompt
        tokens[1] += generated

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "patchbay_tenant_tokens",
            "Tokens of ended requests by tenant and kind.",
            labels=[*self._labels, "tenant", "kind"],
        )
        for tenant, tokens in list(self._tokens.items()):
            for kind, number in zip(("prompt", "generation"), tokens, strict=True):
                family.add_metric([*self._labels.values(), tenant, kind], number)
        yield family
