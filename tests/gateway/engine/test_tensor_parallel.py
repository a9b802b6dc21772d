"""An engine whose base is shared by two processes gives what one process gives, and ends with either."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.blobs import BlobStore
from adapters_store.shard import Shard
from adapters_store.weights import AdapterWeights, load_weights
from gateway.config import EngineConfig
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest, TokenDelta
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import ConfigInvalid, InternalError
from gateway.layers.tensor_parallel import TensorParallel
from gateway.models.loader import load_model
from tests.gateway.engine.conftest import TinyWorld
from tests.tiny import make_base, store_adapter, stored_adapter

MakeEngine = Callable[..., LLMEngine]
PROMPT = list(range(40, 71))


def request(name: str, prompt: list[int], ref: AdapterRef | None, max_tokens: int = 16) -> GenerateRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=5)
    return GenerateRequest(name, params, prompt=prompt, adapter=ref, cache_salt="t")


def serve(
    engine: LLMEngine, *requests: GenerateRequest, watch: Callable[[], object] = lambda: None
) -> dict[str, list[TokenDelta]]:
    """The requests together, to their ends, with a look at the engine behind each step."""
    for one in requests:
        engine.add(one, engine.encode(one))
    deltas = drain(engine, watch)
    engine.check_integrity()
    return deltas


def drain(engine: LLMEngine, watch: Callable[[], object] = lambda: None) -> dict[str, list[TokenDelta]]:
    deltas: dict[str, list[TokenDelta]] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
        watch()
    return deltas


def assert_same(got: dict[str, list[TokenDelta]], wanted: dict[str, list[TokenDelta]]) -> None:
    """The same tokens, and log-probabilities within what another order of addition does to fp32."""
    assert got.keys() == wanted.keys()
    for name, deltas in got.items():
        assert [d.token_ids for d in deltas] == [d.token_ids for d in wanted[name]], name
        for mine, theirs in zip(deltas, wanted[name], strict=True):
            assert [p for _, _, p in mine.logprobs[0].top] == pytest.approx(
                [p for _, _, p in theirs.logprobs[0].top], abs=1e-4
            )


@pytest.mark.parametrize(
    ("overlap_steps", "lends"), [(False, False), (True, True)], ids=["in turn", "overlapping and lending"]
)
def test_two_ranks_give_one_rank_s_tokens(
    world: TinyWorld, build_engine: MakeEngine, tmp_path: Path, overlap_steps: bool, lends: bool
) -> None:
    """Adapters take turns in slots, prompts come in chunks, blocks run out and go to the host, prefixes are reused."""
    settings = {
        "overlap_steps": overlap_steps,
        "max_num_batched_tokens": 24,
        "kv_cache_tokens": 80,
        "kv_host_bytes": 1 << 20,
        "num_adapter_slots": 2,
        "num_adapter_pages": 2,
        "lend_adapter_pages": lends,
    }
    one, two = (build_engine(tensor_parallel_size=size, **settings) for size in (1, 2))
    refs = dict(world.refs)
    for name in ("bottleneck_double", "loretta_adp_of_all"):
        folder = shutil.copytree(Path(__file__).parent / "expected" / name, tmp_path / name)
        refs[name] = store_adapter(world.base, folder, world.blobs, f"t/{name}:1")
    lent: list[int] = []
    names = [None, "a4", None, "b20", "c8", "bottleneck_double", "a4", "loretta_adp_of_all", None, "b20", "c8"]
    for turn in range(2):  # the second finds prefixes
        requests = [
            request(f"{turn}-{i}", PROMPT[i : i + 9 + 3 * (i % 4)], refs[name] if name else None)
            for i, name in enumerate(names)
        ]
        got = serve(two, *requests, watch=lambda: lent.append(two.stats().lent_pages))
        assert_same(got, serve(one, *requests))
    assert two.stats().num_preemptions > 0 or lends
    assert any(lent) == lends
    assert two.stats().prefix_hits > 0
    assert two.stats().kv_host_loaded > 0
    assert two.stats().adapter_evictions > 0


def test_two_ranks_verify_the_same_guesses(world: TinyWorld, build_engine: MakeEngine) -> None:
    """Three tokens take turns, so that many guesses come true and many do not; siblings share their prompt."""
    params = SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True, n=2, logit_bias={60: 90.0, 61: 90.0, 62: 90.0},
        frequency_penalty=2.0,
    )  # fmt: skip
    tokens = []
    for size, guessed in ((1, 0), (2, 4)):
        engine = build_engine(tensor_parallel_size=size)
        chosen = replace(params, num_speculative_tokens=guessed)
        deltas = serve(engine, GenerateRequest("r", chosen, prompt=PROMPT, adapter=world.refs["a4"], cache_salt="t"))
        tokens.append([[t for d in deltas["r"] if d.index == i for t in d.token_ids] for i in range(2)])
    assert tokens[1] == tokens[0]
    assert 0 < engine.stats().num_accepted < engine.stats().num_drafts


def test_two_ranks_keep_an_fp8_cache(world: TinyWorld, build_engine: MakeEngine) -> None:
    one, two = (build_engine(tensor_parallel_size=size, kv_cache_dtype="fp8") for size in (1, 2))
    (wanted,), (got,) = (serve(engine, request("r", PROMPT, None, max_tokens=1))["r"] for engine in (one, two))
    # Sums in another order turn some number of fp8 into its neighbour.
    assert top_logprobs(got) == pytest.approx(top_logprobs(wanted), abs=0.05)


def top_logprobs(delta: TokenDelta) -> dict[int, float]:
    return {token_id: logprob for token_id, _, logprob in delta.logprobs[0].top}


def rounded(adapter: Path, folder: Path) -> Path:
    """A copy of a peft adapter in steps of 1/127 of the largest entry of each rank's row in each of two shares."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        dim = 1 if "lora_A" in name else 0  # A [r, in], B [out, r]
        is_cut = (dim == 1) == ("o_proj" in name or "down_proj" in name)
        parts = tensor.chunk(2 if is_cut else 1, dim)
        steps = [part.abs().amax(dim, keepdim=True) / 127 for part in parts]
        tensors[name] = torch.cat([(part / step).round() * step for part, step in zip(parts, steps, strict=True)], dim)
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_each_rank_rounds_its_share_of_an_adapter_to_8_bits(
    world: TinyWorld, build_engine: MakeEngine, tmp_path: Path
) -> None:
    name = "b20"
    ref = store_adapter(world.base, rounded(world.adapters[name], tmp_path / name), world.blobs, "t/rounded:1")
    one = build_engine()
    two = build_engine(tensor_parallel_size=2, adapter_dtype="int8")
    assert_same(
        serve(two, request("r", PROMPT, world.refs[name])),
        serve(one, request("r", PROMPT, ref)),
    )


def test_an_adapter_that_does_not_fit_ends_its_request_and_no_rank(
    world: TinyWorld, build_engine: MakeEngine, tmp_path: Path
) -> None:
    wider = make_base(tmp_path / "wider", intermediate_size=192)
    misfit = stored_adapter(wider, tmp_path / "misfit", world.blobs, "t/misfit:1")
    engine = build_engine(tensor_parallel_size=2)
    (end,) = serve(engine, request("r", PROMPT, misfit))["r"]
    assert end.finish_reason == "error"
    assert "gate_proj of layer 0" in str(end.error)
    assert len(serve(engine, request("s", PROMPT, world.refs["a4"]))["s"]) == 16
    assert engine.healthy


class SeenElsewhere(BlobStore):
    """A folder that the other ranks see at another path."""

    def __init__(self, url: str, elsewhere: str) -> None:
        super().__init__(url)
        self._elsewhere = elsewhere

    def __reduce__(self) -> tuple[type[BlobStore], tuple[str, None, int]]:
        return BlobStore, (self._elsewhere, None, 0)


def test_a_store_that_fails_one_rank_for_a_while_ends_no_request(
    world: TinyWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "blobs"
    elsewhere.symlink_to(elsewhere)  # too many levels of links
    blobs = SeenElsewhere(world.blobs.url, f"file://{elsewhere}")
    config = EngineConfig(
        base=str(world.base), quantization="none", device="cpu", kv_cache_tokens=512, tensor_parallel_size=2
    )
    engine = LLMEngine(config, blobs, lambda: None)
    with ThreadPoolExecutor(1) as thread:
        served = thread.submit(serve, engine, request("r", PROMPT, world.refs["a4"]))
        warnings = ""
        while not served.done() and "too many levels" not in warnings.lower():
            warnings += capfd.readouterr().err
            time.sleep(0.05)
        elsewhere.unlink()
        elsewhere.symlink_to(world.blobs.url.removeprefix("file://"))
        assert len(served.result()["r"]) == 16
    assert world.refs["a4"].digest[:12] in warnings
    engine.close()


@pytest.mark.parametrize(
    ("family", "quantization", "shape"),
    [
        ("llama", "nf4", {"head_dim": 32, "vocab_size": 321}),  # blocks of 64 on each rank, and an odd vocabulary
        ("qwen2", "none", {"tie_word_embeddings": True}),  # biases
        ("qwen3", "nf4", {"head_dim": 32}),  # norms of heads
    ],
)
def test_every_base_can_be_shared(tmp_path: Path, family: str, quantization: str, shape: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", family, **shape)
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    ref = stored_adapter(base, tmp_path / "a", blobs, "t/a:1", rank=20)
    done = []
    for size in (1, 2):
        config = EngineConfig(
            base=str(base), quantization=quantization, device="cpu", kv_cache_tokens=512, tensor_parallel_size=size
        )  # fmt: skip
        engine = LLMEngine(config, blobs, lambda: None)
        done.append(serve(engine, request("base", PROMPT, None), request("adapter", PROMPT, ref)))
        engine.close()
    assert_same(done[1], done[0])


def rank(shard: Shard) -> TensorParallel:
    """A rank that nobody joins: enough to load its share."""
    return TensorParallel(shard, torch.device("cpu"), None)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_shares_are_cut_from_one_base(tmp_path: Path, quantization: str) -> None:
    base = make_base(tmp_path / "base", head_dim=32, vocab_size=321)
    config = EngineConfig(base=str(base), quantization=quantization, device="cpu")
    whole, *shares = (load_model(config, r) for r in (None, rank(Shard(0, 2)), rank(Shard(1, 2))))
    assert {share.spec.fingerprint for share in shares} == {whole.spec.fingerprint}
    assert all(share.spec.linears == whole.spec.linears for share in shares)
    layer, parts = whole.decoder.layers[1], [share.decoder.layers[1] for share in shares]
    assert torch.equal(torch.cat([p.mlp.down.part.base.weight for p in parts], 1), layer.mlp.down.base.weight)
    for i, linear in enumerate(layer.attention.qkv.base.weight.split(layer.attention.qkv.widths)):
        cut = [p.attention.qkv.base.weight.split(p.attention.qkv.widths)[i] for p in parts]
        assert torch.equal(torch.cat(cut), linear)
    heads = torch.cat([share.decoder.lm_head.weight for share in shares])
    assert torch.equal(heads[:321], whole.decoder.lm_head.weight)
    assert not heads[321:].any()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_of_an_adapter_make_the_whole(world: TinyWorld, size: int) -> None:
    weights = load_weights(world.blobs.local_path(world.refs["b20"].digest))
    shares = [Shard(i, size).lora(weights) for i in range(size)]
    for (layer, linear), (a, b) in weights.tensors.items():
        x = torch.randn(3, a.shape[1])
        pairs = [share.tensors[layer, linear] for share in shares]
        if linear in ("o_proj", "down_proj"):
            y = sum(part @ a.T @ b.T for part, (a, b) in zip(x.chunk(size, 1), pairs, strict=True))
        else:
            y = torch.cat([x @ a.T @ b.T for a, b in pairs], 1)
        torch.testing.assert_close(y, x @ a.T @ b.T)
    assert all(isinstance(share, AdapterWeights) and share.rank == 20 for share in shares)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ({}, 2, r"o_proj would have 32 inputs on each rank"),
        ({}, 3, "does not divide the base's num_heads 4"),
        ({}, 4, "does not divide the base's num_kv_heads 2"),
        ({"intermediate_size": 192, "num_key_value_heads": 4, "head_dim": 64}, 4, "down_proj would have 48 inputs"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(tmp_path: Path, shape: dict[str, Any], size: int, message: str) -> None:
    base = make_base(tmp_path / "base", **shape)
    with pytest.raises(ConfigInvalid, match=message):
        load_model(EngineConfig(base=str(base), device="cpu"), rank(Shard(0, size)))


def test_batch_invariance_is_refused(build_engine: MakeEngine) -> None:
    with pytest.raises(ConfigInvalid, match="batch_invariant is of one GPU"):
        build_engine(tensor_parallel_size=2, batch_invariant=True)


def worker_pid(engine: LLMEngine) -> int:
    assert engine._workers is not None
    (process,) = engine._workers._processes
    assert process.pid is not None
    return process.pid


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_ends(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_is_killed_ends_the_engine_with_an_error(build_engine: MakeEngine) -> None:
    engine = build_engine(tensor_parallel_size=2, overlap_steps=True)
    one = request("r", PROMPT, None, max_tokens=200)
    engine.add(one, engine.encode(one))
    for _ in range(5):
        engine.step()
    assert engine.healthy
    os.kill(worker_pid(engine), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(InternalError, match="Rank 1 of the engine has ended; the engine must be started again"):
        drain(engine)
    assert time.monotonic() - started < 10
    assert not engine.healthy
    (end,) = engine.abort_all("error", None).deltas
    assert end.finish_reason == "error"
    engine.check_integrity()


@pytest.mark.parametrize("num_exchanges", [0, 2])
def test_a_step_that_is_broken_off_ends_the_engine(
    build_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, num_exchanges: int
) -> None:
    """As by ctrl-c: the other rank is in the step's next exchange, which no later step may take for its own."""
    engine = build_engine(tensor_parallel_size=2)
    one = request("r", PROMPT, None, max_tokens=200)
    engine.add(one, engine.encode(one))
    engine.step()
    left, exchange = iter(range(num_exchanges)), TensorParallel.all_reduce

    def break_off(ranks: TensorParallel, x: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return exchange(ranks, x)

    monkeypatch.setattr(TensorParallel, "all_reduce", break_off)
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    assert not engine.healthy
    engine.abort_all("error", None)
    engine.add(request("again", PROMPT, None), engine.encode(one))
    with pytest.raises(InternalError, match="broken off by KeyboardInterrupt; the engine must be"):
        drain(engine)


def test_a_worker_that_fails_says_why(build_engine: MakeEngine) -> None:
    engine = build_engine(tensor_parallel_size=2)
    assert engine._workers is not None
    engine._workers._send("nonsense")
    one = request("r", PROMPT, None)
    engine.add(one, engine.encode(one))
    with pytest.raises(InternalError, match="Rank 1 of the engine failed with AttributeError: 'str' object"):
        drain(engine)


def test_closing_leaves_no_process_and_no_file(build_engine: MakeEngine) -> None:
    engine = build_engine(tensor_parallel_size=2)
    pid = worker_pid(engine)
    assert engine._workers is not None
    folder = Path(engine._workers._folder.name)
    assert is_alive(pid)
    assert folder.exists()
    engine.close()
    assert not is_alive(pid)
    assert not folder.exists()


def test_an_engine_that_cannot_be_built_leaves_no_process(build_engine: MakeEngine) -> None:
    with pytest.raises(ConfigInvalid, match="o_proj would have 32 inputs on each rank"):
        build_engine(tensor_parallel_size=2, quantization="nf4")
    assert not multiprocessing.active_children()


RANK_0 = """
import sys
from adapters_store.blobs import BlobStore
from gateway.config import EngineConfig
from gateway.engine.llm_engine import LLMEngine

if __name__ == "__main__":
    config = EngineConfig(base=sys.argv[1], quantization="none", device="cpu", tensor_parallel_size=2)
    engine = LLMEngine(config, BlobStore(sys.argv[2]), lambda: None)
    print(engine._workers._processes[0].pid, engine._workers._folder.name, flush=True)
    sys.stdin.read()
"""


def test_a_worker_ends_with_rank_0_however_that_ends(world: TinyWorld, tmp_path: Path) -> None:
    script = tmp_path / "rank_0.py"
    script.write_text(RANK_0)
    command = [sys.executable, str(script), str(world.base), world.blobs.url]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as rank_0:
        assert rank_0.stdout is not None
        pid, folder = rank_0.stdout.readline().split()
        assert is_alive(int(pid))
        rank_0.kill()
    assert_ends(int(pid))
    assert not Path(folder).exists()
