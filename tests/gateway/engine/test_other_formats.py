"""Adapters that other packages than `peft` saved, each row of one mixed batch beside what its own package answers.

The packages want another transformers: `expected/` holds their files and answers, and the scripts that made these.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file

from adapters_store.blobs import BlobStore
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.scheduler_output import SchedulerOutput
from tests.tiny import load_oracle, make_tokenizer, store_adapter

from .expected.base import PROMPT, generate, write_base
from .test_kinds import batches_of, outcomes, save_random

MakeEngine = Callable[..., LLMEngine]
EXPECTED = Path(__file__).parent / "expected"
OTHERS = {
    "llama": (
        "loretta_rep", "loretta_adp", "loretta_adp_of_all", "loretta_adp_of_some", "bottleneck_seq",
        "bottleneck_double", "bottleneck_parallel", "bottleneck_around",
    ),
    "mistral": ("bottleneck_mistral",),
}  # fmt: skip
PEFT = {
    "lora": LoraConfig(
        r=20, lora_alpha=8, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "ia3": IA3Config(
        target_modules=["k_proj", "up_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}


class World:
    """The base, adapters of other packages and of peft, their blobs, and what the packages answer."""

    def __init__(self, root: Path, family: str) -> None:
        self.base = write_base(root / "base", family)
        make_tokenizer(self.base)
        self.blobs = BlobStore(f"file://{root / 'blobs'}")
        self.refs: dict[str, AdapterRef] = {}
        self.wanted = {"base": generate(load_oracle(self.base))}
        for name in OTHERS[family]:
            folder = Path(shutil.copytree(EXPECTED / name, root / name))
            self.refs[name] = store_adapter(self.base, folder, self.blobs, f"t/{name}:1")
            self.wanted[name] = load_file(folder / "expected.safetensors")
        for seed, (name, config) in enumerate(PEFT.items()):
            folder = save_random(self.base, root / name, config, seed)
            self.refs[name] = store_adapter(self.base, folder, self.blobs, f"t/{name}:1")
            self.wanted[name] = generate(load_oracle(self.base, folder))


@pytest.fixture(scope="module", params=list(OTHERS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def make_engine(build_engine: MakeEngine) -> MakeEngine:
    return partial(build_engine, num_adapter_slots=16, max_lora_rank=64)


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


@pytest.mark.parametrize("family", OTHERS)
def test_the_answers_are_far_from_the_bases(family: str, tmp_path: Path) -> None:
    base = generate(load_oracle(write_base(tmp_path, family)))["logits"][0]
    for name in OTHERS[family]:
        assert (load_file(EXPECTED / name / "expected.safetensors")["logits"][0] - base).abs().max() > 0.1


@pytest.mark.parametrize("world", ["llama"], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [
        {"overlap_steps": True},
        # The largest takes six.
        {"num_bottleneck_pages": 6, "num_adapter_slots": 4},
        {"num_bottleneck_pages": 8, "host_cache_bytes": 0},
        {"max_num_batched_tokens": 16},
        {"batch_invariant": True},
    ],
    ids=["overlapping", "taking turns", "without a host cache", "in chunks", "batch invariant"],
)  # fmt: skip
def test_other_formats_together_generate_what_their_packages_do(
    world: World, make_engine: MakeEngine, settings: dict[str, Any]
) -> None:
    engine = make_engine(**settings)
    names = [name for name in world.wanted if name not in PEFT]
    wanted = {name: world.wanted[name]["token_ids"].tolist() for name in names}
    assert tokens_of(engine, world, names) == wanted
    assert tokens_of(engine, world, names[::-1]) == wanted
    if settings.get("num_bottleneck_pages") == 6:
        assert engine.stats().adapter_evictions > 0


@pytest.mark.parametrize("world", ["llama"], indirect=True)
def test_bottlenecks_are_exact_beside_matrices_in_8_bits(world: World, make_engine: MakeEngine) -> None:
    engine = make_engine(adapter_dtype="int8")
    names = [name for name in world.refs if name.startswith(("bottleneck", "loretta_adp"))]
    tokens = {name: world.wanted[name]["token_ids"].tolist() for name in names}
    assert tokens_of(engine, world, names) == tokens


@pytest.mark.parametrize("world", ["llama"], indirect=True)
@pytest.mark.parametrize("num_pages", [0, 1])
def test_without_room_for_bottlenecks_their_adapters_are_refused_and_others_served(
    world: World, make_engine: MakeEngine, num_pages: int
) -> None:
    engine = make_engine(num_bottleneck_pages=num_pages)
    for name in ("bottleneck_double", "lora"):
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        request = GenerateRequest(name, sampling, prompt=list(PROMPT), adapter=world.refs[name])
        engine.add(request, engine.encode(request))
    done, errors = outcomes(engine)
    assert done == {"lora"}
    assert "engine.num_bottleneck_pages" in errors["bottleneck_double"]


@pytest.mark.parametrize("world", ["llama"], indirect=True)
def test_a_batch_without_bottlenecks_runs_as_if_there_were_none(
    world: World, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    batches = batches_of(engine, monkeypatch)
    tokens_of(engine, world, ["bottleneck_double", "base"])
    assert [rows.site for batch in batches[-2:] for rows in batch.bottlenecks] == ["attention", "output"] * 2
    assert all(batch.segments is None for batch in batches)
    assert all(batch.split_rows is None for batch in batches)
    tokens_of(engine, world, ["loretta_adp_of_some", "base"])
    split = batches[-1].split_rows
    assert split is not None
    assert split.tolist() == [0]  # once, though one layer's gate and the other's up are changed
    batches.clear()
    tokens_of(engine, world, ["base", "lora", "ia3"])
    assert batches
    assert all(batch.bottlenecks == () for batch in batches)


@pytest.mark.parametrize("world", ["llama"], indirect=True)
def test_who_waits_for_room_for_a_bottleneck_holds_back_no_adapter_that_has_none(
    world: World, make_engine: MakeEngine
) -> None:
    engine = make_engine(num_bottleneck_pages=6)
    sizes = {name: engine.host_cache.get(ref.digest).result().num_bottleneck_pages for name, ref in world.refs.items()}
    largest = max(sizes, key=sizes.__getitem__)
    assert sizes[largest] == 6

    def add(key: str, adapter: str, max_tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = GenerateRequest(key, sampling, prompt=list(PROMPT), adapter=world.refs[adapter])
        engine.add(request, engine.encode(request))

    def running() -> set[str]:
        return {s.request.request.request_id for s in engine.scheduler.running}

    add("has all", largest, 30)
    add("done soonest", "lora", 12)
    while running() != {"has all", "done soonest"}:
        engine.step()
    add("waits", next(name for name, size in sizes.items() if size and name != largest), 2)
    engine.step()
    add("again", "lora", 2)
    engine.step()
    assert running() == {"has all", "done soonest", "again"}
    assert outcomes(engine)[0] == {"has all", "done soonest", "waits", "again"}
