"""The names, labels and bounds of the metrics, as a scrape sees them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.engine.stats import EngineStats, RequestTimings, StepOutput
from gateway.metrics import MAX_TENANTS, EngineMetrics, FrontDoorMetrics, merge_texts, new_registry, render

TIMINGS = RequestTimings("acme", "stop", 10, 5, 16, 1, e2e=1.0, queued=0.1, prefill=0.2, decode=0.4)


class Engine:
    """An `EngineMetrics` with the snapshot that it reads."""

    def __init__(self, name: str = "r1") -> None:
        self.stats = EngineStats()
        self.registry = new_registry()
        self.metrics = EngineMetrics(self.registry, "tiny", name, lambda: self.stats)

    def text(self) -> bytes:
        return render(self.registry)

    def sample(self, name: str, **labels: str) -> float | None:
        """The value of the one sample with this name and (at least) these labels."""
        return sample(self.text(), name, **labels)


def samples(text: bytes, name: str) -> list[tuple[dict[str, str], float]]:
    families = text_string_to_metric_families(text.decode())
    return [(s.labels, s.value) for family in families for s in family.samples if s.name == name]


def sample(text: bytes, name: str, **labels: str) -> float | None:
    found = [value for have, value in samples(text, name) if labels.items() <= have.items()]
    assert len(found) <= 1, f"{name} is ambiguous"
    return found[0] if found else None


VLLM_NAMES = """
num_requests_running num_requests_waiting kv_cache_usage_perc lora_requests_info prefix_cache_queries_total
prefix_cache_hits_total num_preemptions_total prompt_tokens_total generation_tokens_total request_success_total
time_to_first_token_seconds_count inter_token_latency_seconds_count request_time_per_output_token_seconds_count
e2e_request_latency_seconds_count request_queue_time_seconds_count request_inference_time_seconds_count
request_prefill_time_seconds_count request_decode_time_seconds_count request_prompt_tokens_count
request_generation_tokens_count iteration_tokens_total_count request_params_n_count
request_params_max_tokens_count spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
"""


@pytest.mark.parametrize("name", VLLM_NAMES.split())
def test_vllms_names_are_there_with_its_labels(name: str) -> None:
    found = samples(Engine().text(), f"vllm:{name}")
    assert found
    for labels, _ in found:
        assert labels["model_name"] == "tiny"
        assert labels["engine"] == "r1"


def test_a_scrape_reads_the_engines_snapshot() -> None:
    engine = Engine()
    engine.stats = EngineStats(num_running=3, kv_cache_usage=0.25, generation_tokens=77, resident_adapters=2)
    assert engine.sample("vllm:num_requests_running") == 3
    assert engine.sample("vllm:kv_cache_usage_perc") == 0.25
    assert engine.sample("vllm:generation_tokens_total") == 77
    assert engine.sample("patchbay_resident_adapters") == 2


def test_the_second_tier_of_the_cache_is_told_apart() -> None:
    engine = Engine()
    engine.stats = EngineStats(kv_host_usage=0.5, kv_host_hits=96, kv_host_saved=9, kv_host_loaded=6)
    assert engine.sample("patchbay_kv_host_usage_perc") == 0.5
    assert engine.sample("patchbay_kv_host_hits_total") == 96
    assert engine.sample("patchbay_kv_host_saved_blocks_total") == 9
    assert engine.sample("patchbay_kv_host_loaded_blocks_total") == 6


def test_the_pages_of_adapters_and_those_that_are_lent_are_told() -> None:
    engine = Engine()
    engine.stats = EngineStats(adapter_pages=64, lent_pages=24)
    assert engine.sample("patchbay_adapter_pages") == 64
    assert engine.sample("patchbay_lent_adapter_pages") == 24


def test_lora_requests_info_keeps_one_label_set() -> None:
    engine = Engine()
    for adapters in (("a/x:1",), ("a/x:1", "b/y:2"), ()):
        engine.stats = replace(engine.stats, running_adapters=adapters, waiting_adapters=("c/z:3",), adapter_slots=8)
        ((labels, value),) = samples(engine.text(), "vllm:lora_requests_info")
        assert labels["running_lora_adapters"] == ",".join(adapters)
        assert labels["waiting_lora_adapters"] == "c/z:3"
        assert labels["max_lora"] == "8"
        assert value > 1.6e9


def test_a_step_is_counted_once_by_what_shared_it() -> None:
    engine = Engine()
    engine.metrics.observe_step(
        StepOutput(num_tokens=40, num_sequences=9, num_adapters=3, first_tokens=[0.03], inter_tokens=[0.02] * 8)
    )
    assert engine.sample("patchbay_step_adapters_bucket", le="3.0") == 1
    assert engine.sample("patchbay_step_adapters_bucket", le="2.0") == 0
    assert engine.sample("patchbay_step_sequences_sum") == 9
    assert engine.sample("vllm:iteration_tokens_total_sum") == 40
    assert engine.sample("vllm:time_to_first_token_seconds_bucket", le="0.04") == 1
    assert engine.sample("vllm:time_to_first_token_seconds_bucket", le="0.02") == 0
    assert engine.sample("vllm:inter_token_latency_seconds_count") == 8


def test_times_between_tokens_are_a_histogram_as_any_other() -> None:
    engine = Engine()
    engine.metrics.observe_step(StepOutput(num_tokens=4, inter_tokens=[0.01, 0.01, 0.02, 200.0]))
    engine.metrics.observe_step(StepOutput(num_tokens=1, inter_tokens=[0.02]))
    name = "vllm:inter_token_latency_seconds"
    buckets = {labels["le"]: value for labels, value in samples(engine.text(), f"{name}_bucket")}
    assert (buckets["0.01"], buckets["0.025"], buckets["80.0"], buckets["+Inf"]) == (2, 4, 4, 5)
    assert list(buckets) == [
        labels["le"] for labels, _ in samples(engine.text(), "vllm:request_time_per_output_token_seconds_bucket")
    ]
    assert engine.sample(f"{name}_count") == 5
    assert engine.sample(f"{name}_sum") == pytest.approx(200.06)


def test_a_turn_without_a_forward_pass_is_no_step() -> None:
    engine = Engine()
    engine.metrics.observe_step(StepOutput(finished=[TIMINGS]))
    assert engine.sample("patchbay_step_sequences_count") == 0
    assert engine.sample("vllm:request_success_total", finished_reason="stop") == 1


def test_an_ended_request_is_counted_by_its_stages() -> None:
    engine = Engine()
    engine.metrics.observe_step(StepOutput(finished=[TIMINGS]))
    assert engine.sample("vllm:e2e_request_latency_seconds_sum") == 1.0
    assert engine.sample("vllm:request_queue_time_seconds_sum") == 0.1
    assert engine.sample("vllm:request_inference_time_seconds_sum") == pytest.approx(0.6)
    assert engine.sample("vllm:request_time_per_output_token_seconds_sum") == pytest.approx(0.1)  # 0.4 s, 4 gaps
    assert engine.sample("vllm:request_params_max_tokens_sum") == 16


def test_a_request_that_never_ran_counts_no_stage() -> None:
    engine = Engine()
    ended = replace(TIMINGS, finish_reason="cancelled", completion_tokens=0, queued=None, prefill=None, decode=None)
    engine.metrics.observe_step(StepOutput(finished=[ended]))
    assert engine.sample("vllm:request_success_total", finished_reason="abort") == 1
    assert engine.sample("vllm:request_queue_time_seconds_count") == 0
    assert engine.sample("vllm:request_decode_time_seconds_count") == 0


def test_tenants_are_bounded_and_none_of_their_tokens_is_lost() -> None:
    engine = Engine()
    for number in range(MAX_TENANTS + 20):
        engine.metrics.observe_step(StepOutput(finished=[replace(TIMINGS, tenant=f"t{number}")]))
    engine.metrics.observe_step(StepOutput(finished=[replace(TIMINGS, tenant="t0")]))
    found = samples(engine.text(), "patchbay_tenant_tokens_total")
    assert len({labels["tenant"] for labels, _ in found}) == MAX_TENANTS + 1
    assert sum(value for _, value in found) == (MAX_TENANTS + 21) * 15
    assert engine.sample("patchbay_tenant_tokens_total", tenant="other", kind="prompt") == 200
    assert engine.sample("patchbay_tenant_tokens_total", tenant="t0", kind="generation") == 10


def test_a_front_door_counts_calls_by_route_and_code() -> None:
    registry = new_registry()
    metrics = FrontDoorMetrics(registry, "d1")
    metrics.http_request("POST", "/v1/completions", 200, 0.2)
    metrics.http_request("POST", "/v1/completions", 429, 0.01)
    metrics.grpc_request("patchbay.v1.Inference", "Generate", "OK", 0.2)
    text = render(registry)
    assert sample(text, "http_requests_total", handler="/v1/completions", status="429") == 1
    assert sample(text, "http_request_duration_seconds_count", handler="/v1/completions") == 2
    assert sample(text, "grpc_server_handled_total", grpc_method="Generate", grpc_code="OK") == 1


def test_a_job_status_that_is_empty_again_disappears() -> None:
    registry = new_registry()
    metrics = FrontDoorMetrics(registry, "d1")
    metrics.set_jobs({"running": 2, "queued": 1})
    metrics.set_jobs({"succeeded": 3})
    assert samples(render(registry), "patchbay_fine_tuning_jobs") == [({"status": "succeeded"}, 3.0)]


def test_merged_texts_name_each_family_once_and_keep_every_sample() -> None:
    first, second = Engine("r1"), Engine("r2")
    second.stats = EngineStats(num_running=5)
    door = new_registry()
    FrontDoorMetrics(door, "d1").http_request("GET", "/readyz", 200, 0.001)
    parts = [render(door), first.text(), second.text()]
    merged = merge_texts(parts)
    lines = merged.decode().splitlines()
    types = [line for line in lines if line.startswith("# TYPE ")]
    assert len(types) == len(set(types))
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(
        line for part in parts for line in part.decode().splitlines() if not line.startswith("#")
    )
    assert sample(merged, "vllm:num_requests_running", engine="r1") == 0
    assert sample(merged, "vllm:num_requests_running", engine="r2") == 5
    assert sample(merged, "http_requests_total", handler="/readyz") == 1


def test_no_created_series_are_written() -> None:
    assert b"_created" not in Engine().text()
