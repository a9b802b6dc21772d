"""An adapter whose numbers overflow ends its own requests, each with one clean error, and touches nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.base_spec import BaseSpec
from adapters_store.blobs import BlobStore
from benchmarks.engine import write_adapter
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.pending import PendingTokens
from gateway.engine.request import AdapterRef, GenerateRequest, TokenDelta
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.scheduler_output import SchedulerOutput
from gateway.errors import AdapterNotFinite, InternalError
from gateway.models.config import DecoderConfig
from tests.gateway.engine.conftest import TinyWorld
from tests.gateway.engine.gpu.serving import small_config
from tests.tiny import edited_adapter, overflowing, store_adapter

MakeEngine = Callable[..., LLMEngine]


@pytest.fixture(scope="module")
def bad(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> AdapterRef:
    """An adapter that passed validation."""
    folder = edited_adapter(world.adapters["a4"], tmp_path_factory.mktemp("bad") / "bad", overflowing)
    return store_adapter(world.base, folder, world.blobs, "t/bad:1")


@pytest.fixture(scope="module")
def neighbours(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    config = DecoderConfig.from_folder(world.base)
    spec, folder = BaseSpec("any", config.num_layers, config.linears), tmp_path_factory.mktemp("many")
    return [write_adapter(world.blobs, folder, spec, (4, 8, 20)[i % 3], i, std=0.08) for i in range(63)]


def call(name: str, adapter: AdapterRef | None, length: int = 9, **params: object) -> GenerateRequest:
    settings = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True} | params
    prompt = [40 + (7 * len(name) + 3 * i) % 60 for i in range(length)]
    return GenerateRequest(name, SamplingParams(**settings), prompt=prompt, adapter=adapter)  # type: ignore[arg-type]


def run(engine: LLMEngine, *requests: GenerateRequest) -> dict[str, list[TokenDelta]]:
    for one in requests:
        engine.add(one, engine.encode(one))
    deltas: dict[str, list[TokenDelta]] = {one.request_id: [] for one in requests}
    while engine.has_work:
        for delta in engine.step().deltas:
            deltas[delta.request_id].append(delta)
    engine.check_integrity()  # no block and no pin is held
    return deltas


def tokens(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def ends(deltas: list[TokenDelta]) -> list[tuple[str, type | None]]:
    return [(d.finish_reason, type(d.error) if d.error else None) for d in deltas if d.finish_reason is not None]


@pytest.mark.parametrize("adapter_dtype", ["auto", "int8"])
def test_one_of_64_adapters_that_overflows_ends_alone(
    make_engine: MakeEngine, bad: AdapterRef, neighbours: list[AdapterRef], adapter_dtype: str
) -> None:
    settings = {"num_adapter_slots": 64, "kv_cache_tokens": 4096, "adapter_dtype": adapter_dtype}
    others = [call(f"r{i}", adapter, 5 + i % 7) for i, adapter in enumerate(neighbours)]
    wanted = run(make_engine(**settings), *others)
    done = run(make_engine(**settings), *others[:31], call("bad", bad), *others[31:])
    assert ends(done.pop("bad")) == [("error", AdapterNotFinite)]
    assert {name: tokens(deltas) for name, deltas in done.items()} == {
        name: tokens(deltas) for name, deltas in wanted.items()
    }
    assert all(ends(deltas) == [("length", None)] for deltas in done.values())


def test_blocks_that_it_leaves_behind_change_nothing_for_who_gets_them(
    make_engine: MakeEngine, bad: AdapterRef, world: TinyWorld
) -> None:
    tight = {"kv_cache_tokens": 64}
    requests = [call(name, world.refs.get(name), 20) for name in ("a4", "b20", "base")]
    wanted = {one.request_id: tokens(run(make_engine(**tight), one)[one.request_id]) for one in requests}
    engine = make_engine(**tight)
    for one in requests:
        assert ends(run(engine, call("bad", bad, 40))["bad"]) == [("error", AdapterNotFinite)]
        assert tokens(run(engine, one)[one.request_id]) == wanted[one.request_id]


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"n": 3}, {"logprobs": 2}, {"repetition_penalty": 1.3}])
def test_however_it_samples_its_request_ends_once(
    make_engine: MakeEngine, bad: AdapterRef, params: dict[str, object]
) -> None:
    done = run(make_engine(), call("bad", bad, **params), call("good", None))
    assert set(ends(done["bad"])) == {("error", AdapterNotFinite)}
    assert len({delta.index for delta in done["bad"]}) == len(ends(done["bad"])) == params.get("n", 1)
    assert tokens(done["bad"]) == []
    assert ends(done["good"]) == [("length", None)]


def test_the_error_names_the_version_and_what_to_do(make_engine: MakeEngine, bad: AdapterRef) -> None:
    error = run(make_engine(), call("bad", bad))["bad"][-1].error
    assert isinstance(error, AdapterNotFinite)
    assert "t/bad:1" in error.message
    assert "Roll back" in error.message


@pytest.mark.parametrize("names", [("a4", "b20"), ("a4", None), (None,)])
def test_no_adapter_is_blamed_where_every_row_is_bad(
    build_engine: MakeEngine, world: TinyWorld, monkeypatch: pytest.MonkeyPatch, names: tuple[str | None, ...]
) -> None:
    engine = build_engine()
    execute = engine.runner.execute

    def broken(scheduled: SchedulerOutput, pending: PendingTokens | None) -> torch.Tensor:
        logits = execute(scheduled, pending)
        return logits.fill_(torch.nan) if len(scheduled.sampled) == len(names) else logits

    monkeypatch.setattr(engine.runner, "execute", broken)
    done = run(engine, *(call(str(name), world.refs[name] if name else None, max_tokens=20) for name in names))
    assert [ends(deltas) for deltas in done.values()] == [[("error", InternalError)]] * len(names)


def test_a_retry_finds_nothing_of_what_a_faulty_device_computed(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"kv_cache_tokens": 64, "kv_host_bytes": 1 << 20}
    one, other = call("r", None, 40), call("other", None, 50)
    wanted = tokens(run(make_engine(**settings), one)["r"])
    engine = make_engine(**settings)
    execute = engine.runner.execute

    def faulty(scheduled: SchedulerOutput, pending: PendingTokens | None) -> torch.Tensor:
        logits = execute(scheduled, pending)
        for tensor in chain.from_iterable(layer.tensors for layer in engine.runner.cache.layers):
            tensor.fill_(torch.nan)
        return logits.fill_(torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "execute", faulty)
        assert ends(run(engine, one)["r"]) == [("error", InternalError)]
    run(engine, other)  # what it takes from the device goes to the host
    assert tokens(run(engine, one)["r"]) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize(("dtype", "overlap_steps"), [("float32", True), ("float32", False), ("bfloat16", False)])
def test_on_a_gpu_one_of_64_adapters_that_overflows_ends_alone(
    tmp_path: Path, enforce_eager: bool, dtype: Any, overlap_steps: bool
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    settings: dict[str, Any] = {"enforce_eager": enforce_eager, "overlap_steps": overlap_steps}
    # Adapters do not come in at the same steps twice, and in bf16 a row's rounding depends on how many others run.
    settings |= {"dtype": dtype, "batch_invariant": dtype == "bfloat16"}
    engine = LLMEngine(small_config(kv_cache_tokens=16_384, **settings), blobs, lambda: None)
    good = [write_adapter(blobs, tmp_path, engine.model.spec, 16, i) for i in range(64)]
    overflow = write_adapter(blobs, tmp_path, engine.model.spec, 16, 64, std=1e25)
    others = [call(f"r{i}", adapter, 9 + i, max_tokens=48) for i, adapter in enumerate(good[:63])]
    # In its place one that ends as early: the rows of each step are as many.
    wanted = run(engine, *others[:31], call("bad", good[63], max_tokens=1), *others[31:])
    done = run(engine, *others[:31], call("bad", overflow), *others[31:])
    engine.close()
    assert ends(done.pop("bad")) == [("error", AdapterNotFinite)]
    assert {name: tokens(done[name]) for name in done} == {name: tokens(wanted[name]) for name in done}
