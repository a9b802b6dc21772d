"""Adapters that other packages than `peft` saved, each row of one mixed batch beside what its own package answers.

The packages want another transformers: `expected/` holds their files and answers, and the scripts that made these.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file

from adapters_store.blobs import BlobStore
from gateway.config import EngineConfig
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.scheduler import SchedulerOutput
from tests.tiny import load_oracle, make_tokenizer, store_adapter

from .expected.base import PROMPT, generate, write_base
from .test_kinds import save_random

MakeEngine = Callable[..., LLMEngine]
EXPECTED = Path(__file__).parent / "expected"
OTHERS = ("loretta_rep",)
PEFT = {
    "lora": LoraConfig(r=20, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}


class World:
    """The base, adapters of other packages and of peft, their blobs, and what the packages answer."""

    def __init__(self, root: Path) -> None:
        self.base = write_base(root / "base")
        make_tokenizer(self.base)
        self.blobs = BlobStore(f"file://{root / 'blobs'}")
        self.refs: dict[str, AdapterRef] = {}
        self.wanted = {"base": generate(load_oracle(self.base))}
        for name in OTHERS:
            self.refs[name] = store_adapter(self.base, EXPECTED / name, self.blobs, f"t/{name}:1")
            self.wanted[name] = load_file(EXPECTED / name / "expected.safetensors")
        for seed, (name, config) in enumerate(PEFT.items()):
            folder = save_random(self.base, root / name, config, seed)
            self.refs[name] = store_adapter(self.base, folder, self.blobs, f"t/{name}:1")
            self.wanted[name] = generate(load_oracle(self.base, folder))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("others"))


@pytest.fixture
def make_engine(world: World) -> Any:
    engines: list[LLMEngine] = []

    def make(**settings: Any) -> LLMEngine:
        defaults = {"base": str(world.base), "quantization": "none", "device": "cpu", "kv_cache_tokens": 2048,
                    "block_size": 4, "num_adapter_slots": 16, "max_lora_rank": 64}  # fmt: skip
        engines.append(LLMEngine(EngineConfig(**(defaults | settings)), world.blobs, lambda: None))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def tokens_of(engine: LLMEngine, world: World, names: list[str]) -> dict[str, list[int]]:
    """Greedy tokens of these kinds, served together, behind the prompt."""
    for name in names:
        num_tokens = len(world.wanted[name]["token_ids"]) - len(PROMPT)
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        request = GenerateRequest(name, sampling, prompt=list(PROMPT), adapter=world.refs.get(name))
        engine.add(request, engine.encode(request))
    tokens: dict[str, list[int]] = {name: list(PROMPT) for name in names}
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None, delta.error
            tokens[delta.request_id].extend(delta.token_ids)
    engine.check_integrity()
    return tokens


def test_each_row_of_one_batch_is_its_own_model(
    world: World, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    execute, errors, batches = engine.runner.execute, dict.fromkeys(world.wanted, -1.0), set()

    def checked(output: SchedulerOutput, *rest: Any) -> torch.Tensor:
        logits = execute(output, *rest)
        for row, sequence in zip(logits, output.sampled, strict=True):
            name = sequence.request.request.request_id
            wanted = world.wanted[name]["logits"][len(sequence.token_ids) - len(PROMPT)]
            errors[name] = max(errors[name], float((row - wanted).abs().max()))
        batches.add(len(output.sampled))
        return logits

    monkeypatch.setattr(engine.runner, "execute", checked)
    for ref in world.refs.values():
        engine.host_cache.get(ref.digest).result()
    tokens = tokens_of(engine, world, list(world.wanted))
    assert tokens == {name: wanted["token_ids"].tolist() for name, wanted in world.wanted.items()}
    assert max(batches) == len(world.wanted)
    assert {name: error for name, error in errors.items() if not 0 <= error <= 1e-5} == {}


@pytest.mark.parametrize("name", OTHERS)
def test_an_expected_answer_is_not_the_bases(world: World, name: str) -> None:
    assert (world.wanted[name]["logits"][0] - world.wanted["base"]["logits"][0]).abs().max() > 0.1
