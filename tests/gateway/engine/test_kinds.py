"""Every kind of adapter beside its oracle: `peft`'s own model of it, each row of one mixed batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    DeloraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters_store.blobs import BlobStore
from gateway.config import EngineConfig
from gateway.embedded.quantization import quantize_base
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.scheduler_output import SchedulerOutput
from gateway.engine.step_inputs import StepInputs
from gateway.engine.step_tokens import StepTokens
from gateway.layers.forward_batch import ForwardBatch
from tests.tiny import ALL_LINEARS, load_oracle, make_base, store_adapter

MakeEngine = Callable[..., LLMEngine]
TASK = {"task_type": "CAUSAL_LM"}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
LINEARS = list(ALL_LINEARS)
KINDS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, **TASK),
    "lora of many scales": LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora=True, layers_to_transform=[1],
        rank_pattern={"down_proj": 20}, alpha_pattern={"q_proj": 3}, **TASK,
    ),
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=LINEARS, **TASK),
    "dora of a rank above a page": LoraConfig(r=20, lora_alpha=8, use_dora=True, target_modules=["q_proj"], **TASK),
    "lora_bias": LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["q_proj", "o_proj", "up_proj"], **TASK),
    "lora and all biases": LoraConfig(r=4, lora_alpha=8, bias="all", target_modules=["q_proj", "o_proj"], **TASK),
    "dora and own biases": LoraConfig(
        r=4, lora_alpha=8, bias="lora_only", use_dora=True, target_modules=["q_proj", "o_proj"], **TASK
    ),
    "lora and norms": LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"], modules_to_save=["norm"], **TASK),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "ia3 of all outputs": IA3Config(target_modules=r".*_proj", feedforward_modules=[], **TASK),
    "beft": BeftConfig(target_modules=LINEARS, **TASK),
    "ln_tuning": LNTuningConfig(target_modules=NORMS, **TASK),
    "adalora": AdaLoraConfig(
        init_r=6, lora_alpha=40, total_step=10, bias="all", target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
        rank_pattern={
            "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True, False, True],
            "model.layers.1.self_attn.v_proj.lora_E": [False] * 6,
        }, **TASK,
    ),
    "loha": LoHaConfig(r=5, alpha=7, target_modules=["q_proj", "v_proj", "down_proj"], **TASK),
    "lokr": LoKrConfig(r=3, alpha=7, target_modules=["q_proj", "v_proj", "down_proj"], **TASK),
    "lokr of whole factors": LoKrConfig(
        r=32, alpha=16, decompose_factor=4, target_modules=["k_proj", "o_proj", "gate_proj"], **TASK
    ),
    "lokr of two products": LoKrConfig(r=2, alpha=3, decompose_both=True, target_modules=["o_proj", "up_proj"], **TASK),
    "delora": DeloraConfig(
        r=6, target_modules=LINEARS, bias="delora_only", rank_pattern={"o_proj": 3}, lambda_pattern={"up_proj": 2},
        **TASK,
    ),
    "miss": MissConfig(r=8, target_modules=LINEARS, **TASK),
    "miss of ranks that do not divide": MissConfig(r=21, bias="MiSS_only", target_modules=["q_proj", "o_proj"], **TASK),
    "vera": VeraConfig(r=24, target_modules=["q_proj", "v_proj", "down_proj"], **TASK),
    "vera of a seed": VeraConfig(
        r=256, target_modules=LINEARS, save_projection=False, projection_prng_key=7, bias="all", **TASK
    ),
    "lora and trained tokens": LoraConfig(
        r=4, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [70, 45], "lm_head": [9, 3]}, **TASK
    ),
    "lora and whole embeddings": LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], **TASK
    ),
    "dora, norms and lm_head": LoraConfig(
        r=4, use_dora=True, target_modules=["o_proj"], modules_to_save=["norm", "lm_head"], **TASK
    ),
    "trainable_tokens": TrainableTokensConfig(token_indices=[60, 58, 61], **TASK),
    "miss mini of few outputs": MissConfig(r=21, init_weights="mini", mini_r=4, target_modules=LINEARS, **TASK),
    "miss mini of few inputs": MissConfig(
        r=4, init_weights="mini", mini_r=16, bias="MiSS_only", target_modules=["q_proj", "down_proj"], **TASK
    ),
}  # fmt: skip


def save_random(base: Path, folder: Path, config: PeftConfig, seed: int) -> Path:
    """A peft adapter whose trained numbers are off from where peft starts them, so that each changes something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            std = 0.02 if "lora_A" in name or "lora_B" in name else 0.2
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def _shrink_logits(base: Path) -> None:
    """To less than 1 or so, where fp32 itself is off by 1e-6 and not 1e-5."""
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] *= 0.1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


class World:
    """A base in fp32, an adapter of each kind, their blobs, and peft's models of them."""

    def __init__(self, root: Path, family: str, kinds: Mapping[str, PeftConfig] = KINDS, **config: Any) -> None:
        self.base = make_base(root / "base", family, **config)
        if not config.get("tie_word_embeddings"):
            _shrink_logits(self.base)
        self.blobs = BlobStore(f"file://{root / 'blobs'}")
        self.oracles: dict[str | None, torch.nn.Module] = {None: load_oracle(self.base)}
        self.refs: dict[str, AdapterRef] = {}
        for seed, (name, config) in enumerate(kinds.items()):
            folder = save_random(self.base, root / name.replace(" ", "-"), config, seed)
            self.refs[name] = store_adapter(self.base, folder, self.blobs, f"t/{name}:1")
            self.oracles[name] = load_oracle(self.base, folder)

    def greedy(self, num_tokens: int) -> dict[str, list[int]]:
        """What peft's models generate after `prompts_of`, greedily."""
        tokens = {}
        for name, prompt in prompts_of(self).items():
            ids = list(prompt)
            for _ in range(num_tokens):
                ids.append(int(self.logits(name, ids).argmax()))
            tokens[str(name)] = ids[len(prompt) :]
        return tokens

    def logits(self, name: str | None, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.oracles[name](torch.tensor([ids])).logits[0, -1]
        return logits


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Qwen2's q, k and v have biases of their own."""
    return World(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def make_engine(build_engine: MakeEngine) -> MakeEngine:
    return partial(build_engine, num_adapter_slots=32, max_lora_rank=256)


def add(engine: LLMEngine, world: World, key: str, adapter: str | None, prompt: list[int], max_tokens: int = 4) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    ref = world.refs[adapter] if adapter is not None else None
    request = GenerateRequest(key, sampling, prompt=prompt, adapter=ref)
    engine.add(request, engine.encode(request))


def prompts_of(world: World) -> dict[str | None, list[int]]:
    return {name: list(range(40 + i, 52 + 2 * i)) for i, name in enumerate([None, *world.refs])}


def test_each_row_of_one_batch_is_its_own_peft_model(
    world: World, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    execute, worst, largest_batch = engine.runner.execute, {}, set()

    def checked(output: SchedulerOutput, *rest: Any) -> torch.Tensor:
        logits = execute(output, *rest)
        for row, sequence in zip(logits, output.sampled, strict=True):
            name = sequence.request.request.request_id
            wanted = world.logits(None if name == "base" else name, sequence.token_ids)
            worst[name] = max(worst.get(name, 0.0), float((row - wanted).abs().max()))
        largest_batch.add(len(output.sampled))
        return logits

    monkeypatch.setattr(engine.runner, "execute", checked)
    for ref in world.refs.values():
        engine.host_cache.get(ref.digest).result()
    for name, prompt in prompts_of(world).items():
        add(engine, world, name or "base", name, prompt)
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    assert max(largest_batch) == len(KINDS) + 1
    assert {name: error for name, error in worst.items() if error > 1e-5} == {}


def tokens_of(engine: LLMEngine, world: World, names: list[str | None], **settings: Any) -> dict[str, list[int]]:
    """Greedy tokens of these kinds, served together."""
    prompts = prompts_of(world)
    for name in names:
        add(engine, world, str(name), name, prompts[name], **settings)
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None, delta.error
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    engine.check_integrity()
    return tokens


def outcomes(engine: LLMEngine) -> tuple[set[str], dict[str, str]]:
    """The requests that end as they should, and the errors of the others."""
    done: set[str] = set()
    errors: dict[str, str] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            errors |= {delta.request_id: str(delta.error)} if delta.error else {}
            done |= {delta.request_id} if delta.finish_reason == "length" else set()
    return done, errors


def batches_of(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[ForwardBatch]:
    """The batches of the steps from now on, as they come."""
    make_batch, batches = engine.runner._batch, []

    def kept(*args: Any) -> ForwardBatch:
        batches.append(make_batch(*args))
        return batches[-1]

    monkeypatch.setattr(engine.runner, "_batch", kept)
    return batches


@pytest.fixture(scope="module")
def wanted(world: World) -> dict[str, list[int]]:
    return world.greedy(8)


@pytest.mark.parametrize(
    "settings",
    [
        {"overlap_steps": True},
        {"num_vector_slots": 1, "num_adapter_slots": 3},
        {"kv_cache_tokens": 200, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 16},
        {"batch_invariant": True},
    ],
    ids=["overlapping", "taking turns", "preempted", "in chunks", "batch invariant"],
)
def test_kinds_together_generate_what_peft_does(
    world: World, make_engine: MakeEngine, wanted: dict[str, list[int]], settings: dict[str, Any]
) -> None:
    engine = make_engine(**settings)
    tokens_of(engine, world, [None, *world.refs], max_tokens=1)  # the adapters come in
    assert tokens_of(engine, world, [None, *world.refs], max_tokens=8) == wanted
    if settings.get("num_adapter_slots") == 3:
        assert engine.stats().adapter_evictions >= len(KINDS) - 3
    if "kv_cache_tokens" in settings:
        assert engine.stats().num_preemptions > 0


def test_two_ranks_serve_every_kind(world: World, make_engine: MakeEngine, wanted: dict[str, list[int]]) -> None:
    """Norms of rows that are split among ranks are added up; o has no bias of its own, nor has the second rank."""
    engine = make_engine(tensor_parallel_size=2, num_adapter_slots=6)
    assert tokens_of(engine, world, [None, *world.refs], max_tokens=8) == wanted


def test_a_magnitude_is_over_the_norms_of_the_base_in_nf4(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    folder = save_random(base, tmp_path / "dora", KINDS["dora"], 0)
    ref = store_adapter(base, folder, blobs, "t/dora:1")
    model = load_oracle(base)
    quantize_base(model)
    oracle = PeftModel.from_pretrained(model, folder).eval()
    engine = LLMEngine(EngineConfig(base=str(base), kv_cache_tokens=512, device="cpu"), blobs, lambda: None)
    prompt = list(range(40, 60))
    engine.add(
        GenerateRequest("r", SamplingParams(temperature=0, max_tokens=1, logprobs=5), prompt, adapter=ref), prompt
    )
    deltas = []
    while engine.has_work:
        deltas += engine.step().deltas
    engine.close()
    with torch.no_grad():
        logprobs = oracle(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    top = {token_id: logprob for token_id, _, logprob in deltas[0].logprobs[0].top}
    assert top == pytest.approx({token_id: float(logprobs[token_id]) for token_id in top}, abs=1e-4)


def test_magnitudes_beside_matrices_in_8_bits_are_over_the_norms_of_those(
    world: World, make_engine: MakeEngine
) -> None:
    exact, rounded = make_engine(), make_engine(adapter_dtype="int8")
    for engine in (exact, rounded):
        tokens_of(engine, world, ["dora"])
    scales = [engine.runner.slots.vectors.pools["gate_up.scale"][:, 0] for engine in (exact, rounded)]
    assert not torch.equal(*scales)
    torch.testing.assert_close(scales[1], scales[0], rtol=1e-3, atol=0)


def test_without_room_for_vectors_their_adapters_are_refused_and_others_served(
    world: World, make_engine: MakeEngine
) -> None:
    engine = make_engine(num_vector_slots=0)
    prompts = prompts_of(world)
    for name in ("ia3", "lora"):
        add(engine, world, name, name, prompts[name])
    done, errors = outcomes(engine)
    assert done == {"lora"}
    assert "num_vector_slots" in errors["ia3"]


def test_a_batch_without_vectors_runs_as_if_there_were_none(
    world: World, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    tokens_of(engine, world, ["ia3", "lora"])
    rows = batches_of(engine, monkeypatch)
    tokens_of(engine, world, [None, "lora"])
    assert rows
    assert all(batch.vector_rows is None for batch in rows)
    tokens_of(engine, world, ["ia3"])
    assert rows[-1].vector_rows is not None
    assert rows[-1].segments is None


def test_a_recorded_step_reads_the_rows_of_vectors_that_are_made_anew_for_each(
    world: World, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(num_vector_slots=2)
    runner, size, seen = engine.runner, 24, []
    inputs = StepInputs(
        runner.cache, runner.slots, runner.rotary, torch.device("cpu"),
        size=size, max_blocks=64, max_pages=16, max_pending=size,
    )  # fmt: skip
    make_batch = runner._batch

    def compared(tokens: StepTokens, *rest: Any) -> ForwardBatch:
        wanted = make_batch(tokens, *rest)
        if tokens.is_decode and (tokens.adapter_slots >= 0).any():
            assert inputs.route(tokens, size) == (wanted.segments.most_pages if wanted.segments else 0)
            has_vectors = inputs.send_vectors(tokens, size)
            rows = inputs.batch(size, 0, has_vectors=has_vectors).vector_rows
            seen.append((has_vectors, wanted.segments is not None))
            assert (rows is None) == (wanted.vector_rows is None)
            if rows is not None and wanted.vector_rows is not None:
                assert rows.tolist() == [*wanted.vector_rows.tolist(), *[-1] * (size - len(tokens))]
        return wanted

    monkeypatch.setattr(runner, "_batch", compared)
    for names in (["ia3", None, "lora", "dora", "ia3", "ln_tuning", "lora"], ["lora"], ["ia3", None]):
        for i, name in enumerate(names):
            add(engine, world, str(i), name, list(range(40, 46)), max_tokens=6 + 4 * i)
        while engine.has_work:
            engine.step()
    assert set(seen) == {(True, True), (True, False), (False, True)}
