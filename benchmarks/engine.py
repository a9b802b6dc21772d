"""The engine at Llama-3.1-8B's shape on one GPU: random weights, NF4 base, rank-16 adapters on all seven linears.

    python -m benchmarks.engine [--layers 32] [--cases 64x0,64x64] [--tensor-parallel-size 2 | --batch-invariant]
                                [--peer-results FILE]

A case RxK is R greedy requests of 128 prompt tokens, 256 generated each, end-of-sequence ignored, all at once, over K
distinct adapters. tokens/s is R x 256 over the wall time of the whole call, prefill included, best of 2; the decode
step is (T(256) - T(16)) / 240. The base is written to disk as bf16 safetensors and loaded as any other folder. A file
of a peer's results, JSON lines as ours, is printed beside: for each case the peer's best, whatever its base is kept in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig

from adapters_store.base_spec import LINEARS, BaseSpec, lora_tensor_name, module_path
from adapters_store.blobs import BlobStore
from adapters_store.manifest import ADAPTER_METADATA_KEY, AdapterSpec, LoRADelta
from benchmarks.record import record, recorded
from gateway.config import EngineConfig
from gateway.embedded import embedded_path
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams

PROMPT, OUTPUT, SHORT = 128, 256, 16
# Decode step floors in ms on one H200 at 4.3 TB/s: packed base, lm_head, KV of 256 tokens and adapters read once.
FLOORS = {"64x0": 1.6, "64x64": 2.8}


def write_base(folder: Path, layers: int) -> Path:
    """A Llama-3.1-8B-shaped checkpoint with random bf16 weights, one safetensors file a layer."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        eos_token_id=2,
    )
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_path() / file, folder / file)
    weight_map: dict[str, str] = {}
    for i in range(layers):
        _write_shard(folder, f"layer{i}.safetensors", _layer_shapes(config, i), weight_map)
    outer = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "lm_head.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    _write_shard(folder, "outer.safetensors", outer, weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _layer_shapes(config: LlamaConfig, i: int) -> dict[str, tuple[int, ...]]:
    h, kv, inner = config.hidden_size, config.num_key_value_heads * 128, config.intermediate_size
    outs = dict(zip(LINEARS, ((h, h), (kv, h), (kv, h), (h, h), (inner, h), (inner, h), (h, inner)), strict=True))
    shapes: dict[str, tuple[int, ...]] = {f"{module_path(i, name)}.weight": shape for name, shape in outs.items()}
    norms = {f"model.layers.{i}.{name}.weight": (h,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes | norms


def _write_shard(folder: Path, file: str, shapes: dict[str, tuple[int, ...]], weight_map: dict[str, str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {
        name: (torch.randn(shape, device=device) * 0.02 if len(shape) > 1 else torch.ones(shape, device=device))
        .to(torch.bfloat16)
        .cpu()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / file)
    weight_map.update(dict.fromkeys(tensors, file))


def write_adapter(blobs: BlobStore, folder: Path, spec: BaseSpec, rank: int, seed: int) -> AdapterRef:
    """A random bf16 adapter on all seven linears, put into the blob store."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for layer in range(spec.num_layers):
        for linear, (out, inner) in spec.linears.items():
            for side, shape in (("A", (rank, inner)), ("B", (out, rank))):
                values = torch.randn(shape, device=device, generator=generator) * 0.02
                tensors[lora_tensor_name(layer, linear, side)] = values.to(torch.bfloat16).cpu()
    layers = tuple(range(spec.num_layers))
    deltas = tuple(LoRADelta(linear=name, rank=rank, scale=1.0, layers=layers) for name in spec.linears)
    adapter = AdapterSpec(base_fingerprint=spec.fingerprint, deltas=deltas)
    path = folder / f"adapter{seed}.safetensors"
    save_file(tensors, path, metadata={ADAPTER_METADATA_KEY: adapter.canonical_json()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    blobs.put(digest, path)
    path.unlink()
    return AdapterRef(f"bench/adapter{seed}:1", digest, rank)


def bench_config(base: Path, **settings: Any) -> EngineConfig:
    """The engine of every case."""
    return EngineConfig(
        base=str(base), kv_cache_tokens=131_072, max_num_batched_tokens=8192, enable_prefix_caching=False,
        num_adapter_slots=64, max_lora_rank=16, host_cache_bytes=16 << 30, **settings,
    )  # fmt: skip


def make_requests(
    refs: list[AdapterRef | None], num_requests: int, output: int, num_speculative_tokens: int = 0
) -> list[tuple[GenerateRequest, list[int]]]:
    """The requests of one case, and their prompts."""
    params = SamplingParams(
        temperature=0, max_tokens=output, ignore_eos=True, num_speculative_tokens=num_speculative_tokens
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 100_000, (PROMPT,), generator=generator).tolist() for _ in range(num_requests)]
    run_id = time.monotonic()
    return [
        (GenerateRequest(f"{run_id}-{i}", params, prompt=prompt, adapter=refs[i % len(refs)]), prompt)
        for i, prompt in enumerate(prompts)
    ]


def run(engine: LLMEngine, refs: list[AdapterRef | None], num_requests: int, output: int) -> float:
    """Serve one case to its end. Returns seconds."""
    requests = make_requests(refs, num_requests, output)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for request, prompt in requests:
        engine.add(request, prompt)
    while engine.has_work:
        engine.step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Build the base and the adapters, run the cases, record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--cases", default="64x0,64x1,64x64,128x64,256x0,256x64,1x1")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="above 1 it is in the cases' names")
    parser.add_argument("--batch-invariant", action="store_true", help="a mode of its own in the cases' names")
    parser.add_argument("--peer-results", type=Path, help="JSON lines of another system's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_base(folder / "base", args.layers)
        blobs = BlobStore(f"file://{folder / 'blobs'}")
        start = time.perf_counter()
        settings = {"tensor_parallel_size": args.tensor_parallel_size, "batch_invariant": args.batch_invariant}
        engine = LLMEngine(bench_config(base, **settings), blobs, lambda: None)
        mode = f" tp{args.tensor_parallel_size}" if args.tensor_parallel_size > 1 else ""
        record("engine", f"{args.layers} layers{mode}", "load_seconds", time.perf_counter() - start, "s")
        mode += " batch-invariant" if args.batch_invariant else ""
        cases = [tuple(map(int, case.split("x"))) for case in args.cases.split(",")]
        refs = [write_adapter(blobs, folder, engine.model.spec, 16, i) for i in range(max(k for _, k in cases))]
        for num_requests, num_adapters in cases:
            measure(engine, list(refs[:num_adapters]) or [None], num_requests, num_adapters, mode)
        engine.close()
    if args.peer_results:
        peers = [json.loads(line) for line in args.peer_results.read_text().splitlines()]
        Console(width=100).print(side_by_side(recorded(), peers))


def side_by_side(ours: list[dict[str, Any]], peers: list[dict[str, Any]]) -> Table:
    """tokens/s of every case of ours beside the best of the peers' for as many requests and adapters."""
    table = Table("requests x adapters", "tokens/s", "peer", "its tokens/s", "times")
    for line in (line for line in ours if line["metric"] == "tokens_per_s"):
        load = line["case"].split()[0]
        same = [peer for peer in peers if peer["metric"] == "tokens_per_s" and peer["case"].split()[0] == load]
        best = max(same, key=lambda peer: float(peer["value"]), default=None)
        theirs = ("", "", "")
        if best is not None:
            name = f"{best['system']}, {best['case'].split()[1]}"
            theirs = (name, f"{best['value']:,.0f}", f"{line['value'] / best['value']:.2f}")
        table.add_row(load, f"{line['value']:,.0f}", *theirs)
    return table


def measure(
    engine: LLMEngine, refs: list[AdapterRef | None], num_requests: int, num_adapters: int, mode: str = ""
) -> None:
    """One case, with the mode in its name."""
    case = f"{num_requests}x{num_adapters} nf4{mode}"
    run(engine, refs, num_requests, SHORT)
    short = min(run(engine, refs, num_requests, SHORT) for _ in range(2))
    long = min(run(engine, refs, num_requests, OUTPUT) for _ in range(2))
    note = "128 in, 256 out, rank 16, best of 2"
    record("engine", case, "tokens_per_s", num_requests * OUTPUT / long, "1/s", note=note)
    step = (long - short) / (OUTPUT - SHORT) * 1e3
    floor = FLOORS.get(f"{num_requests}x{num_adapters}") if " tp" not in mode else None  # they are one GPU's
    record("engine", case, "decode_step_ms", step, "ms", floor=floor, note=note)


if __name__ == "__main__":
    main()
