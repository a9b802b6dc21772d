"""The engine against its oracle: `peft` on transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import GenerateRequest, TokenDelta
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.scheduler_output import SchedulerOutput
from gateway.engine.stats import StepOutput
from tests.gateway.engine.conftest import TinyWorld
from tests.tiny import load_oracle

MakeEngine = Callable[..., LLMEngine]
PROMPT = list(range(40, 71))


def request(
    world: TinyWorld, name: str, prompt: Sequence[int] = PROMPT, adapter: str | None = None, **params: Any
) -> GenerateRequest:
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params
    ref = world.refs[adapter] if adapter is not None else None
    return GenerateRequest(name, SamplingParams(**settings), prompt=list(prompt), adapter=ref, cache_salt="t")


def run(engine: LLMEngine, *requests: GenerateRequest) -> dict[str, list[TokenDelta]]:
    """Serve the requests together to their ends; deltas by request id."""
    for one in requests:
        engine.add(one, engine.encode(one))
    return drain(engine)


def drain(engine: LLMEngine, into: dict[str, list[TokenDelta]] | None = None) -> dict[str, list[TokenDelta]]:
    deltas: dict[str, list[TokenDelta]] = {} if into is None else into
    while engine.has_work:
        for delta in engine.step().deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
    engine.check_integrity()
    return deltas


def tokens(deltas: list[TokenDelta], index: int = 0) -> list[int]:
    return [t for delta in deltas if delta.index == index for t in delta.token_ids]


def oracle_tokens(model: torch.nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def oracles(world: TinyWorld) -> dict[str | None, torch.nn.Module]:
    made: dict[str | None, torch.nn.Module] = {n: load_oracle(world.base, p) for n, p in world.adapters.items()}
    return made | {None: load_oracle(world.base)}


@pytest.mark.parametrize("adapter", [None, "a4", "b20", "c8"])
def test_logits_equal_peft_within_fp32_rounding(
    world: TinyWorld, make_engine: MakeEngine, oracles: dict[str | None, torch.nn.Module], adapter: str | None
) -> None:
    engine = make_engine()
    done = run(engine, request(world, "r", adapter=adapter, max_tokens=4, logprobs=20))["r"]
    ids = PROMPT + tokens(done)
    with torch.no_grad():
        expected = oracles[adapter](torch.tensor([ids])).logits[0].log_softmax(-1)
    for step, delta in enumerate(done):
        at = expected[len(PROMPT) - 1 + step]
        for token_id, _, logprob in delta.logprobs[0].top:
            assert logprob == pytest.approx(float(at[token_id]), abs=2e-4)
        assert [t for t, _, _ in delta.logprobs[0].top] == at.topk(20).indices.tolist()


def test_greedy_tokens_are_the_same_alone_and_in_a_mixed_batch(
    world: TinyWorld, make_engine: MakeEngine, oracles: dict[str | None, torch.nn.Module]
) -> None:
    """Invariant 4."""
    names: list[str | None] = [None, "a4", "b20", "c8", None, "b20"]
    prompts = [PROMPT[i : i + 9 + 3 * i] for i in range(len(names))]
    wanted = [oracle_tokens(oracles[n], p, 12) for n, p in zip(names, prompts, strict=True)]
    alone = make_engine()
    mixed = make_engine(max_num_batched_tokens=16)
    requests = [request(world, str(i), p, n) for i, (n, p) in enumerate(zip(names, prompts, strict=True))]
    together = run(mixed, *requests)
    for i, one in enumerate(requests):
        assert tokens(run(alone, one)[str(i)]) == wanted[i]
        assert tokens(together[str(i)]) == wanted[i]


def _rounded_to_int8(adapter: Path, folder: Path) -> Path:
    """A copy of a peft adapter whose matrices are multiples of one step a rank: 1/127 of the largest entry."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        steps = tensor.abs().amax(1 if "lora_A" in name else 0, keepdim=True) / 127  # A [r, in], B [out, r]
        tensors[name] = (tensor / steps).round() * steps
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("adapter", ["a4", "b20", "c8"])
def test_adapters_in_8_bits_are_peft_s_with_weights_rounded_alike(
    world: TinyWorld, make_engine: MakeEngine, tmp_path: Path, adapter: str
) -> None:
    engine = make_engine(adapter_dtype="int8")
    done = run(engine, request(world, "r", adapter=adapter, max_tokens=4, logprobs=20))["r"]
    ids = PROMPT + tokens(done)
    oracle = load_oracle(world.base, _rounded_to_int8(world.adapters[adapter], tmp_path / "rounded"))
    assert tokens(done) == oracle_tokens(oracle, PROMPT, 4)
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
        unrounded = load_oracle(world.base, world.adapters[adapter])(torch.tensor([ids])).logits[0].log_softmax(-1)
    for step, delta in enumerate(done):
        at = len(PROMPT) - 1 + step
        top = {token_id: logprob for token_id, _, logprob in delta.logprobs[0].top}
        assert top == pytest.approx({token_id: float(expected[at, token_id]) for token_id in top}, abs=2e-4)
        # What rounding itself changes is told apart.
        assert max(abs(top[token_id] - float(unrounded[at, token_id])) for token_id in top) > 1e-3


def test_pages_in_8_bits_are_planned_with_their_own_size(make_engine: MakeEngine) -> None:
    engine = make_engine(adapter_dtype="int8", num_vector_slots=0)
    assert engine._slots.pools(0, "qkv").a.dtype == torch.int8
    layout = engine._slots.layout
    assert layout.page_bytes(torch.int8) < layout.page_bytes(torch.float32) / 3
    assert engine.host_cache.num_pages == (4 << 30) // layout.page_bytes(torch.int8)


def test_a_prefix_is_reused_and_changes_nothing(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    first = run(engine, request(world, "1", adapter="a4"))["1"]
    again = run(engine, request(world, "2", adapter="a4"))["2"]
    assert tokens(first) == tokens(again)
    assert first[-1].usage is not None
    assert again[-1].usage is not None
    assert (first[-1].usage.cached_tokens, again[-1].usage.cached_tokens) == (0, 28)
    other = run(engine, request(world, "3", adapter="b20"))["3"]
    assert other[-1].usage is not None
    assert other[-1].usage.cached_tokens == 0


def test_preemption_changes_no_token(world: TinyWorld, make_engine: MakeEngine) -> None:
    names = [None, "a4", "b20", "c8"]
    requests = [request(world, str(i), PROMPT[i:], n, max_tokens=40) for i, n in enumerate(names)]
    roomy, tight = make_engine(), make_engine(kv_cache_tokens=140, enable_prefix_caching=False)
    wanted, got = run(roomy, *requests), run(tight, *requests)
    assert tight.stats().num_preemptions > 0
    assert {r: tokens(d) for r, d in got.items()} == {r: tokens(d) for r, d in wanted.items()}


def test_requests_join_and_leave_at_every_step(world: TinyWorld, make_engine: MakeEngine) -> None:
    names = [None, "a4", "b20", "c8", "a4", None]
    requests = [request(world, str(i), PROMPT[i:], n, max_tokens=3 + 2 * i) for i, n in enumerate(names)]
    engine, alone = make_engine(), make_engine()
    deltas: dict[str, list[TokenDelta]] = {}
    for one in requests:
        engine.add(one, engine.encode(one))
        for delta in engine.step().deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
    drain(engine, deltas)
    for one in requests:
        assert tokens(deltas[one.request_id]) == tokens(run(alone, one)[one.request_id])


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancelling_at_any_stage_frees_everything(world: TinyWorld, make_engine: MakeEngine, steps: int) -> None:
    """Invariants 5 and 6."""
    engine = make_engine(max_num_batched_tokens=16)
    for name, adapter in (("x", "a4"), ("y", None)):
        one = request(world, name, adapter=adapter, n=2)
        engine.add(one, engine.encode(one))
    ends: list[TokenDelta] = []
    for _ in range(steps):
        ends += [d for d in engine.step().deltas if d.finish_reason]
    output = StepOutput()
    engine.cancel("x", output)
    engine.cancel("x", output)
    ends += output.deltas
    rest = drain(engine)
    ends += [d for deltas in rest.values() for d in deltas if d.finish_reason]
    assert sorted((d.request_id, d.index) for d in ends) == [("x", 0), ("x", 1), ("y", 0), ("y", 1)]
    assert {d.finish_reason for d in ends if d.request_id == "x"} == {"cancelled"}


def test_an_idle_engine_with_a_pin_is_not_whole(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    run(engine, request(world, "r", adapter="a4"))
    engine.residency.acquire(world.refs["a4"])
    with pytest.raises(AssertionError):
        engine.check_integrity()


def test_n_sequences_share_the_prompt_and_each_ends_once(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    done = run(engine, request(world, "r", n=3, temperature=1.0, seed=7))["r"]
    assert sorted(d.index for d in done if d.finish_reason) == [0, 1, 2]
    assert [d.usage for d in done if d.usage] == [done[-1].usage]
    assert done[-1].usage is not None
    assert done[-1].usage.completion_tokens == 36
    assert len({tuple(tokens(done, i)) for i in range(3)}) == 3
    assert engine.blocks.prefix_hits >= 2 * 28


def test_a_seed_gives_the_same_tokens_whoever_else_runs(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = request(world, "1", temperature=1.0, seed=11)
    alone = tokens(run(engine, one)["1"])
    crowd = [request(world, f"c{i}", PROMPT[i:], temperature=1.0) for i in range(1, 4)]
    assert tokens(run(engine, *crowd, one)["1"]) == alone


def test_end_token_stop_ids_and_length_end_a_sequence(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    free = tokens(run(engine, request(world, "f"))["f"])
    stopped = run(engine, request(world, "s", stop_token_ids=(free[4],)))["s"]
    assert tokens(stopped) == free[: free.index(free[4]) + 1]
    assert stopped[-1].finish_reason == "stop"
    assert run(engine, request(world, "l", max_tokens=2))["l"][-1].finish_reason == "length"


def test_a_stop_string_cuts_the_text(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    whole = "".join(d.text for d in run(engine, request(world, "w"))["w"])
    stop = whole[3:5]
    cut = run(engine, request(world, "c", stop=(stop,)))["c"]
    assert "".join(d.text for d in cut) == whole[: whole.index(stop)]
    assert cut[-1].finish_reason == "stop"


def test_rows_of_one_adapter_lie_together(
    world: TinyWorld, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    execute, steps = engine.runner.execute, []

    def watched(output: SchedulerOutput, *rest: Any) -> torch.Tensor:
        if len(output.scheduled) == output.num_tokens:
            steps.append([chunk.sequence.slot for chunk in output.scheduled])
        return execute(output, *rest)

    monkeypatch.setattr(engine.runner, "execute", watched)
    names = [None, "a4", "c8", "a4", None, "c8", "a4"]
    run(engine, *(request(world, str(i), adapter=name) for i, name in enumerate(names)))
    whole = [slots for slots in steps if len(slots) == len(names)]
    assert whole
    assert all(slots == sorted(slots) and len(set(slots)) == 3 for slots in whole)


def test_a_missing_adapter_ends_only_its_own_request(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    missing = request(world, "bad")
    lost = type(world.refs["a4"])("t/lost:1", "0" * 64, 4)
    missing = GenerateRequest("bad", missing.sampling, prompt=PROMPT, adapter=lost)
    done = run(engine, missing, request(world, "good", adapter="a4"))
    assert done["bad"][-1].finish_reason == "error"
    assert done["bad"][-1].error is not None
    assert len(tokens(done["good"])) == 12


def test_more_adapters_than_slots_take_turns(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(num_adapter_slots=1)
    done = run(engine, *(request(world, n, adapter=n) for n in world.refs), request(world, "base"))
    assert all(len(tokens(deltas)) == 12 for deltas in done.values())
    assert engine.stats().adapter_evictions == 2
    alone = make_engine()
    for name in world.refs:
        assert tokens(done[name]) == tokens(run(alone, request(world, name, adapter=name))[name])
