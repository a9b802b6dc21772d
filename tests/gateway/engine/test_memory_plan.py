from dataclasses import replace
from typing import Any

import pytest
import torch

from gateway.config import EngineConfig
from gateway.engine.memory_plan import MemoryPlan
from gateway.errors import ConfigInvalid
from gateway.models.decoder import Decoder
from gateway.models.loader import load_model
from tests.tiny import make_base

GIB = 1 << 30
PAGE, BLOCK = 84 << 20, 2 << 20  # Llama-3.1-8B in bf16: 16 ranks, 16 tokens


def plan(free: int | None, **settings: Any) -> MemoryPlan:
    return MemoryPlan.of(EngineConfig(**settings), PAGE, BLOCK, free)


def test_adapters_take_what_all_slots_may_need_and_the_cache_the_rest() -> None:
    made = plan(100 * GIB, num_adapter_slots=64, max_lora_rank=16)
    assert made.num_adapter_pages == 64
    assert made.num_blocks == (100 * GIB - 64 * PAGE) // BLOCK
    assert 0 <= 100 * GIB - made.adapter_bytes - made.cache_bytes < BLOCK


def test_adapters_take_half_at_most_unless_a_number_is_asked_for() -> None:
    made = plan(12 * GIB, num_adapter_slots=64, max_lora_rank=64)
    assert made.num_adapter_pages == 6 * GIB // PAGE
    assert made.cache_bytes > 5.9 * GIB
    assert plan(12 * GIB, num_adapter_pages=100).num_adapter_pages == 100


def test_one_adapter_of_the_highest_rank_always_fits() -> None:
    assert plan(2 * GIB, max_lora_rank=256).num_adapter_pages == 16


def test_a_cache_of_a_configured_size_is_made_as_it_is() -> None:
    assert plan(100 * GIB, kv_cache_tokens=4096).num_blocks == 256
    assert plan(None, kv_cache_tokens=4096).num_blocks == 256


def test_without_a_measure_of_memory_there_are_defaults() -> None:
    made = plan(None, num_adapter_slots=4, max_lora_rank=20)
    assert (made.num_adapter_pages, made.num_blocks) == (8, 4096)


@pytest.mark.parametrize(
    ("free", "settings"),
    [
        (10 * GIB, {"kv_cache_tokens": 100_000}),
        (10 * GIB, {"num_adapter_pages": 200}),
        (GIB, {"max_lora_rank": 256}),
        (-GIB, {}),
    ],
    ids=["cache", "pages", "one adapter", "nothing left"],
)
def test_what_does_not_fit_is_refused_with_what_to_lower(free: int, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigInvalid, match=r"GiB left beside the base; .* need more. Lower num_adapter_pages"):
        plan(free, **settings)


def test_the_plan_of_all_ranks_fits_on_each() -> None:
    roomy, tight = plan(100 * GIB, num_adapter_pages=10), plan(50 * GIB, num_adapter_pages=30)
    smallest = MemoryPlan.smallest([roomy, tight])
    assert (smallest.num_adapter_pages, smallest.num_blocks) == (10, tight.num_blocks)


def test_a_plan_says_in_a_line_what_it_is() -> None:
    assert str(plan(None, num_adapter_pages=3, kv_cache_tokens=1600)) == (
        "3 adapter pages of 16 ranks (0.25 GiB) and a KV cache of 1,600 tokens (0.20 GiB)"
    )


def measured(decoder: Decoder, **settings: Any) -> MemoryPlan:
    """On the CPU in fp32."""
    return MemoryPlan.measure(EngineConfig(**settings), decoder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    base = make_base(tmp_path_factory.mktemp("base"))
    return load_model(EngineConfig(base=str(base), device="cpu")).decoder


@pytest.mark.parametrize(("chosen", "dtype"), [("auto", torch.float32), ("int8", torch.int8)])
def test_pages_are_planned_in_the_adapters_dtype(decoder: Decoder, chosen: str, dtype: torch.dtype) -> None:
    assert measured(decoder, adapter_dtype=chosen).page_bytes == decoder.lora_layout.page_bytes(dtype)


def test_the_second_tier_takes_whole_blocks_of_what_it_is_given(decoder: Decoder) -> None:
    made = measured(decoder, kv_host_bytes=100_000, block_size=16)
    assert (made.block_bytes, made.num_host_blocks) == (8192, 12)
    assert str(made).endswith(", with 192 more in host memory (0.00 GiB)")


def test_each_rank_takes_its_part_of_the_second_tier(decoder: Decoder) -> None:
    made = measured(decoder, kv_host_bytes=100_000, tensor_parallel_size=3)
    assert (made.block_bytes, made.num_host_blocks) == (8192, 4)


@pytest.mark.parametrize("off", [{}, {"kv_host_bytes": 0}, {"kv_host_bytes": GIB, "enable_prefix_caching": False}])
def test_there_is_no_second_tier_where_none_is_wanted_or_nothing_would_be_found(
    decoder: Decoder, off: dict[str, Any]
) -> None:
    made = measured(decoder, **off)
    assert made.num_host_blocks == 0
    assert "host" not in str(made)


def test_there_is_no_second_tier_where_computing_is_always_cheaper(decoder: Decoder) -> None:
    # So narrow a base with so many heads computes a token sooner than the link carries its keys and values.
    narrow = replace(decoder.config, hidden_size=16, num_kv_heads=4096)
    assert measured(replace(decoder, config=narrow), kv_host_bytes=GIB).num_host_blocks == 0
