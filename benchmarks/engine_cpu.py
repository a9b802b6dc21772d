"""The engine on two CPU cores beside transformers' `generate` and `peft`'s mixed batch, in one run.

    python -m benchmarks.engine_cpu [--repeats 7]

32 greedy requests of 64 prompt tokens, 128 generated each, end-of-sequence ignored, on the embedded base: without
adapters, and over 8 adapters of rank 16 on all linears; then with 1,000 registered adapters of which 8 are live.
Both sides run the same NF4 base (the peers on its dequantized fp32 weights), in turn; a ratio is the median over the
rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from adapters_store.accounts import Accounts
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.registry import AdapterRegistry
from adapters_store.upload import Staging
from benchmarks.engine import drain
from benchmarks.record import record
from gateway.config import EngineConfig
from gateway.embedded import embedded_path
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from lora_kernels.nf4 import dequantize_nf4, quantize_nf4

NUM_REQUESTS, PROMPT, OUTPUT, NUM_ADAPTERS = 32, 64, 128, 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def prompts() -> list[list[int]]:
    """Random prompts that share no prefix, so that prefix reuse plays no part."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, 1500, (PROMPT,), generator=generator).tolist() for _ in range(NUM_REQUESTS)]


def make_adapters(folder: Path, count: int) -> list[Path]:
    """Random rank-16 adapters of the embedded base, saved by peft."""
    paths = []
    for i in range(count):
        torch.manual_seed(i)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(embedded_path(), dtype=torch.float32),
            LoraConfig(r=16, lora_alpha=16, target_modules=list(LINEARS), task_type="CAUSAL_LM"),
        )
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        paths.append(folder / f"adapter{i}")
        model.save_pretrained(paths[-1])
    return paths


def peer_base() -> torch.nn.Module:
    """transformers' model with the NF4 base's dequantized weights."""
    model = AutoModelForCausalLM.from_pretrained(embedded_path(), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(dequantize_nf4(quantize_nf4(parameter.to(torch.bfloat16)), torch.float32))
    return model


def mixed_peer(base: torch.nn.Module, paths: list[Path]) -> torch.nn.Module:
    """peft's model over `base` with every adapter loaded, named a0, a1, ..."""
    mixed = PeftModel.from_pretrained(base, str(paths[0]), adapter_name="a0")
    for i, path in enumerate(paths[1:], start=1):
        mixed.load_adapter(str(path), adapter_name=f"a{i}")
    return mixed.eval()


def peer_run(model: torch.nn.Module, adapter_names: list[str] | None) -> None:
    """One static batch through `generate`."""
    extra = {"adapter_names": adapter_names} if adapter_names else {}
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(prompts()),
            attention_mask=torch.ones(NUM_REQUESTS, PROMPT, dtype=torch.long),
            max_new_tokens=OUTPUT,
            min_new_tokens=OUTPUT,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )


def engine_run(engine: LLMEngine, refs: list[AdapterRef | None]) -> None:
    """The same requests through the engine, to their ends."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    for i, prompt in enumerate(prompts()):
        request = GenerateRequest(f"{time.monotonic_ns()}-{i}", params, prompt=prompt, adapter=refs[i % len(refs)])
        engine.add(request, engine.encode(request))
    drain(engine)


def rates(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Tokens/s of each run, `repeats` times in turn after one warm-up: a machine that slows down slows all of them."""
    for run in runs.values():
        run()
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seen[name].append(NUM_REQUESTS * OUTPUT / (time.perf_counter() - start))
    return seen


def compare(case: str, ours: list[float], peer: list[float], metric: str, target: float, system: str) -> None:
    """Record both rates and the median of their ratios, round by round."""
    note = f"median of {len(ours)} rounds, both in turn; 64 in, 128 out, greedy"
    record("engine_cpu", case, "tokens_per_s", statistics.median(peer), "1/s", system=system, note=note)
    record("engine_cpu", case, "tokens_per_s", statistics.median(ours), "1/s", note=note)
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    spread = f"{note}; from {min(ratios):.2f} to {max(ratios):.2f}"
    record("engine_cpu", case, metric, statistics.median(ratios), "x", target=target, note=spread)


def publish(registry: AdapterRegistry, engine: LLMEngine, folder: Path, names: list[str], staging: Path) -> None:
    """Upload one adapter as a tenant would, under each of the names."""
    with Staging(staging) as staged:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            staged.add_file(file, [(folder / file).read_bytes()])
        adapter = staged.validate(engine.model.spec, max_rank=64)
        for name in names:
            registry.publish("t", name, adapter)


def resolve(registry: AdapterRegistry, count: int) -> list[AdapterRef | None]:
    """What the front door does for each request: the name's version, from the database."""
    versions = [registry.resolve("t", f"t/a{i % count}") for i in range(NUM_REQUESTS)]
    return [AdapterRef.of(version.ref, version.manifest) for version in versions]


def main() -> None:
    """Measure everything and append it to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--registered", type=int, default=1000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), args.repeats, args.registered)


def measure(folder: Path, repeats: int, registered: int) -> None:
    """All cases, peers beside us."""
    blobs = BlobStore(f"file://{folder / 'blobs'}")
    config = EngineConfig(device="cpu", enable_prefix_caching=False, num_adapter_slots=16)
    engine = LLMEngine(config, blobs, lambda: None)
    paths = make_adapters(folder, NUM_ADAPTERS)

    base = peer_base()
    seen = rates({"peer": lambda: peer_run(base, None), "ours": lambda: engine_run(engine, [None])}, repeats)
    compare("32x0", seen["ours"], seen["peer"], "speedup_vs_transformers", 1.2, "transformers generate")

    names = [f"a{i}" for i in range(NUM_ADAPTERS)]
    mixed = mixed_peer(base, paths)
    few, many = (open_registry(folder / name, blobs) for name in ("few", "many"))
    for i, path in enumerate(paths):
        publish(few, engine, path, [names[i]], folder / "staging")
        publish(many, engine, path, [f"a{n}" for n in range(i, registered, NUM_ADAPTERS)], folder / "staging")
    runs = {
        "peer": lambda: peer_run(mixed, [names[i % NUM_ADAPTERS] for i in range(NUM_REQUESTS)]),
        "few": lambda: engine_run(engine, resolve(few, NUM_ADAPTERS)),
        "many": lambda: engine_run(engine, resolve(many, NUM_ADAPTERS)),
    }
    seen = rates(runs, repeats)
    compare("32x8", seen["few"], seen["peer"], "speedup_vs_peft", 3.0, "peft adapter_names")
    compare(
        f"32x8 of {registered} registered", seen["many"], seen["few"], "share_of_8_registered", 0.95, "8 registered"
    )
    engine.close()


def open_registry(folder: Path, blobs: BlobStore) -> AdapterRegistry:
    """A registry of its own, with one tenant."""
    folder.mkdir()
    database = Database(f"sqlite:///{folder / 'registry.db'}")
    database.upgrade()
    Accounts(database).create_tenant("t")
    return AdapterRegistry(database, blobs)


if __name__ == "__main__":
    main()
