"""Adapters with rows of embed_tokens and lm_head: tied bases, turns in too small a pool, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, TrainableTokensConfig

from gateway.engine.llm_engine import LLMEngine

from .test_kinds import TASK, World, add, batches_of, make_engine, outcomes, prompts_of, tokens_of

MakeEngine = Callable[..., LLMEngine]
VOCAB = 320
__all__ = ["make_engine"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj"], **options, **TASK)


TIED: dict[str, PeftConfig] = {
    "a list": lora(trainable_token_indices=[42, 40, 45]),
    "unlike": lora(trainable_token_indices={"embed_tokens": [43, 42], "lm_head": [42, 7]}),
    "the head": lora(trainable_token_indices={"lm_head": [5, 44]}),
    "one whole": lora(modules_to_save=["embed_tokens"]),
    "both whole": lora(modules_to_save=["lm_head"], ensure_weight_tying=True),
    "tokens alone": TrainableTokensConfig(token_indices=[45, 47], **TASK),
    "lora": lora(),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("tied"), "llama", TIED, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def wanted(world: World) -> dict[str, list[int]]:
    return world.greedy(6)


@pytest.mark.parametrize(
    ("settings", "evictions"),
    [
        ({}, 0),
        ({"num_token_rows": 2 * VOCAB}, 3),
        ({"batch_invariant": True}, 0),
        ({"dtype": "float32", "overlap_steps": True}, 0),
        ({"tensor_parallel_size": 2}, 0),
    ],
    ids=["together", "taking turns", "batch invariant", "overlapping", "two ranks"],
)
def test_rows_of_tied_embeddings_generate_what_peft_does(
    world: World, make_engine: MakeEngine, wanted: dict[str, list[int]], settings: dict[str, Any], evictions: int
) -> None:
    engine = make_engine(**settings)
    for _ in range(2):
        assert tokens_of(engine, world, [None, *world.refs], max_tokens=6) == wanted
    assert engine.stats().adapter_evictions >= evictions
    engine.runner.slots.check_integrity()


def test_rows_fit_the_dtype_of_the_base(world: World, make_engine: MakeEngine) -> None:
    engine = make_engine(dtype="bfloat16")
    tokens = tokens_of(engine, world, [None, *world.refs], max_tokens=2)
    assert len(tokens) == len(TIED) + 1
    assert engine.runner.slots.tokens is not None
    assert engine.runner.slots.tokens.rows.dtype == torch.bfloat16


@pytest.mark.parametrize(("num_rows", "served"), [(0, {"lora"}), (10, {"lora", "a list"})])
def test_without_room_for_rows_their_adapters_are_refused_and_others_served(
    world: World, make_engine: MakeEngine, num_rows: int, served: set[str]
) -> None:
    engine = make_engine(num_token_rows=num_rows)
    for name in ("a list", "lora", "both whole"):
        add(engine, world, name, name, prompts_of(world)[name])
    done, errors = outcomes(engine)
    assert done == served
    assert all("num_token_rows" in error for error in errors.values())
    engine.check_integrity()


def test_a_batch_without_rows_runs_as_if_there_were_none(
    world: World, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    tokens_of(engine, world, ["a list", "lora"])
    seen = batches_of(engine, monkeypatch)
    tokens_of(engine, world, [None, "lora"])
    assert seen
    assert all(batch.own_tokens is None for batch in seen)
    tokens_of(engine, world, ["a list"])
    assert seen[-1].own_tokens is not None
