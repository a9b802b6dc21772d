"""The engine at Llama-3.1-8B's shape on one GPU: random weights, rank-16 adapters on all seven linears.

    python -m benchmarks.engine [--cases "64x0 nf4,64x64 nf4 adapters8"] [--peer-results FILE] [--scratch DIR]
                                [--tensor-parallel-size 2 | --batch-invariant]
    python -m benchmarks.engine --shape tiny --layers 2 --cases "4x2 nf4"     # to see that it works, on a CPU

A case `RxK BASE` is R greedy requests of 128 prompt tokens, 256 generated each, end-of-sequence ignored, all at once,
over K distinct adapters on a base in nf4 or bf16; `adapters8` keeps adapters in 8 bits. tokens/s is R x 256 over the
wall time of the whole call, prefill included, best of 2; the decode step is (T(256) - T(16)) / 240. Its floor is what
one H200 takes to read its bytes once: base, lm_head, adapters, and the cache at the average context. The base is
written to disk as bf16 safetensors and loaded as any other folder, once for each kind of engine; the adapters of an
engine are written before its cases and removed after them: 84 MB each on disk, as much in host memory, and again on
the device. A file of a peer's results, JSON lines as ours, is printed beside: for each case the peer's best, whatever
its base is kept in.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig

from adapters_store.base_spec import LINEARS, BaseSpec, lora_tensor_name, module_path, tensor_name
from adapters_store.blobs import BlobStore
from adapters_store.lora_layout import LoRALayout, num_pages_for
from adapters_store.manifest import ADAPTER_METADATA_KEY, AdapterSpec, LoRADelta, VectorSite
from benchmarks.record import record, recorded
from gateway.config import EngineConfig
from gateway.embedded import embedded_path
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.models.config import DecoderConfig

PROMPT, OUTPUT, SHORT, RANK = 128, 256, 16, 16
BANDWIDTH = 4.25e12  # bytes a second: a device copy on one H200, read and written
NF4_BITS = 4.5  # of a weight as a GPU keeps it: 4, and an fp32 absmax for 64 of them
START_TARGET = 60.0  # seconds
TARGETS: Final = {
    "64x0 nf4": 13_000.0,
    "64x1 nf4": 12_000.0,
    "64x64 nf4": 10_000.0,
    "64x64 nf4 adapters8": 11_500.0,
    "64x64 bf16": 7_500.0,
    "256x0 nf4": 20_000.0,
    "256x64 nf4": 15_000.0,
    "256x256 nf4": 9_000.0,
    "1x1 nf4": 400.0,
}
"""The cases, and the tokens/s that are asked of one H200."""
# The tiny one keeps the vocabulary, and so the prompts.
SHAPES: Final[dict[str, dict[str, int]]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
}


@dataclass(frozen=True)
class Case:
    """One line of the table: how many requests over how many adapters, and what kind of engine serves them."""

    num_requests: int
    num_adapters: int
    base: str = "nf4"
    adapters8: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `64x64 nf4 adapters8`; the base may be left out. Raises ValueError for what is no case."""
        load, *words = text.split()
        num_requests, num_adapters = map(int, load.split("x"))
        case = cls(num_requests, num_adapters, "bf16" if "bf16" in words else "nf4", "adapters8" in words)
        if set(words) - {"nf4", "bf16", "adapters8"}:
            raise ValueError(f"{text} is no case")
        return case

    def __str__(self) -> str:
        """The name under which it is recorded."""
        return f"{self.num_requests}x{self.num_adapters} {self.kind}"

    @property
    def kind(self) -> str:
        """Of its engine."""
        return f"{self.base} adapters8" if self.adapters8 else self.base

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its engine."""
        return {
            "quantization": "nf4" if self.base == "nf4" else "none",
            "adapter_dtype": "int8" if self.adapters8 else "auto",
        }


# An engine for cases of a kind; and what is done with each, whose requests take the adapters, or the base, in turn.
Build = Callable[[EngineConfig, BlobStore, str], LLMEngine]
Measure = Callable[[LLMEngine, Sequence[AdapterRef | None], Case], None]


def write_base(folder: Path, layers: int, shape: str = "8b") -> Path:
    """A checkpoint of one of `SHAPES` with random bf16 weights, one safetensors file a layer."""
    config = LlamaConfig(
        vocab_size=128_256,
        num_hidden_layers=layers,
        **SHAPES[shape],
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
    h, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * h // config.num_attention_heads
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


def write_adapter(
    blobs: BlobStore, folder: Path, spec: BaseSpec, rank: int, seed: int, std: float = 0.02, use_dora: bool = False
) -> AdapterRef:
    """A random bf16 adapter on all seven linears, put into the blob store."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for layer in range(spec.num_layers):
        for linear, (out, inner) in spec.linears.items():
            for side, shape in (("A", (rank, inner)), ("B", (out, rank))):
                values = torch.randn(shape, device=device, generator=generator) * std
                tensors[lora_tensor_name(layer, linear, side)] = values.to(torch.bfloat16).cpu()
            if use_dora:
                tensors[tensor_name(layer, linear, "lora_magnitude_vector")] = torch.ones(out)
    path = folder / f"adapter{seed}.safetensors"
    adapter = adapter_spec(spec, rank, use_dora)
    save_file(tensors, path, metadata={ADAPTER_METADATA_KEY: adapter.canonical_json()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    blobs.put(digest, path)
    path.unlink()
    return AdapterRef(f"bench/adapter{seed}:1", digest, rank)


def adapter_spec(spec: BaseSpec, rank: int, use_dora: bool = False) -> AdapterSpec:
    """What `write_adapter` says of its adapters."""
    layers = tuple(range(spec.num_layers))
    deltas = tuple(LoRADelta(linear=name, rank=rank, scale=1.0, layers=layers) for name in spec.linears)
    sites = [
        VectorSite(module=name, role="magnitude", tensor="lora_magnitude_vector", layers=layers)
        for name in (spec.linears if use_dora else ())
    ]
    return AdapterSpec(base_fingerprint=spec.fingerprint, deltas=deltas, vectors=tuple(sites))


def write_adapters(blobs: BlobStore, folder: Path, spec: BaseSpec, ranks: Sequence[int]) -> list[AdapterRef]:
    """An adapter for each rank, several at a time."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda i: write_adapter(blobs, folder, spec, ranks[i], i), range(len(ranks))))


def bench_config(base: Path) -> EngineConfig:
    """The engine of every case, with room for 64 adapters."""
    return EngineConfig(
        base=str(base), kv_cache_tokens=131_072, max_num_batched_tokens=16_384, enable_prefix_caching=False,
        num_adapter_slots=64, max_lora_rank=RANK, host_cache_bytes=16 << 30,
    )  # fmt: skip


def build_engine(config: EngineConfig, blobs: BlobStore, case: str, target: float | None = None) -> LLMEngine:
    """An engine, and a record of how long it took from safetensors to ready."""
    start = time.perf_counter()
    engine = LLMEngine(config, blobs, lambda: None)
    record("engine", case, "load_seconds", time.perf_counter() - start, "s", target=target)
    return engine


def free_device() -> None:
    """Give back what closed engines held, after the last reference to them is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def page_bytes(base: Path) -> int:
    """Bytes of a page of 16 ranks in bf16."""
    config = DecoderConfig.from_folder(base)
    return LoRALayout.from_linears(config.linears, config.num_layers).page_bytes(torch.bfloat16)


def make_requests(
    refs: Sequence[AdapterRef | None],
    num_requests: int,
    output: int,
    prompt_tokens: int = PROMPT,
    num_speculative_tokens: int = 0,
) -> list[tuple[GenerateRequest, list[int]]]:
    """The requests of one case, and their prompts."""
    params = SamplingParams(
        temperature=0, max_tokens=output, ignore_eos=True, num_speculative_tokens=num_speculative_tokens
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 100_000, (prompt_tokens,), generator=generator).tolist() for _ in range(num_requests)]
    run_id = time.monotonic()
    return [
        (GenerateRequest(f"{run_id}-{i}", params, prompt=prompt, adapter=refs[i % len(refs)]), prompt)
        for i, prompt in enumerate(prompts)
    ]


def run(
    engine: LLMEngine, refs: Sequence[AdapterRef | None], num_requests: int, output: int, prompt_tokens: int = PROMPT
) -> float:
    """Serve one case to its end. Returns seconds."""
    requests = make_requests(refs, num_requests, output, prompt_tokens)
    synchronize()
    start = time.perf_counter()
    for request, prompt in requests:
        engine.add(request, prompt)
    drain(engine)
    synchronize()
    return time.perf_counter() - start


def drain(engine: LLMEngine) -> None:
    """Step until nothing is left to do; sleep where nothing can be done, as threads that load need Python's lock."""
    while engine.has_work:
        if engine.step().num_tokens == 0 and engine.has_work:
            time.sleep(engine.poll_interval)


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Build the base, then an engine and its adapters for the cases that it serves; record them."""
    parser = make_parser(__doc__, ",".join(TARGETS))
    parser.add_argument("--peer-results", type=Path, help="JSON lines of another system's")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="above 1 it is in the cases' names")
    parser.add_argument("--batch-invariant", action="store_true", help="a mode of its own in the cases' names")
    args = parser.parse_args()
    mode = {"tensor_parallel_size": args.tensor_parallel_size, "batch_invariant": args.batch_invariant}
    suffix = f" tp{args.tensor_parallel_size}" if args.tensor_parallel_size > 1 else ""
    suffix += (" batch-invariant" if args.batch_invariant else "") + label(args)
    target = None if suffix else START_TARGET
    serve_all(
        args,
        mode,
        build=lambda config, blobs, kind: build_engine(config, blobs, f"start {kind}{suffix}", target),
        measure=lambda engine, refs, case: measure(engine, refs, case, suffix),
    )
    if args.peer_results:
        peers = [json.loads(line) for line in args.peer_results.read_text().splitlines()]
        Console(width=100).print(side_by_side(recorded(), peers))


def make_parser(doc: str | None, cases: str) -> argparse.ArgumentParser:
    """The options of the engine's benchmarks."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--cases", default=cases)
    parser.add_argument(
        "--scratch", type=Path, help="where base and adapters are written, for so long as they are used"
    )
    return parser


def label(args: argparse.Namespace) -> str:
    """What a case is called after its name, when it is not of the whole 8B shape, for which the targets are."""
    return "" if (args.layers, args.shape) == (32, "8b") else f" {args.shape} {args.layers} layers"


def unique(settings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of them once, in their order."""
    seen: list[dict[str, Any]] = []
    for one in settings:
        if one not in seen:
            seen.append(one)
    return seen


def serve_all(args: argparse.Namespace, mode: dict[str, Any], build: Build, measure: Measure) -> None:
    """Write the base, and measure the cases that are asked for with an engine for each kind of them; mode: of all."""
    cases = [Case.parse(text) for text in args.cases.split(",")]
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        base = write_base(Path(name) / "base", args.layers, args.shape)
        for settings in unique(case.settings for case in cases):
            same = [case for case in cases if case.settings == settings]
            _serve_cases(base, same, settings | mode, args.scratch, build, measure)
            free_device()


def _serve_cases(
    base: Path, cases: Sequence[Case], settings: dict[str, Any], scratch: Path | None, build: Build, measure: Measure
) -> None:
    """Measure cases of one engine, which has room for the most adapters of any of them."""
    most = max(case.num_adapters for case in cases)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        blobs = BlobStore(f"file://{folder / 'blobs'}")
        host_bytes = most * num_pages_for(RANK) * page_bytes(base)
        room: dict[str, Any] = {"num_adapter_slots": max(most, 1), "host_cache_bytes": host_bytes}
        engine = build(replace(bench_config(base), **room, **settings), blobs, cases[0].kind)
        refs = write_adapters(blobs, folder, engine.model.spec, [RANK] * most)
        for case in cases:
            measure(engine, refs[: case.num_adapters] or [None], case)
        engine.close()


def side_by_side(ours: list[dict[str, Any]], peers: list[dict[str, Any]]) -> Table:
    """tokens/s of every case of ours beside the best of the peers' for as many requests and adapters."""
    table = Table("case", "tokens/s", "peer", "its tokens/s", "times")
    for line in (line for line in ours if line["metric"] == "tokens_per_s"):
        load = line["case"].split()[0]
        same = [peer for peer in peers if peer["metric"] == "tokens_per_s" and peer["case"].split()[0] == load]
        best = max(same, key=lambda peer: float(peer["value"]), default=None)
        theirs = ("", "", "")
        if best is not None:
            name = f"{best['system']}, {best['case'].split()[1]}"
            theirs = (name, f"{best['value']:,.0f}", f"{line['value'] / best['value']:.2f}")
        table.add_row(line["case"], f"{line['value']:,.0f}", *theirs)
    return table


def measure(engine: LLMEngine, refs: Sequence[AdapterRef | None], case: Case, suffix: str) -> None:
    """One case."""
    name, rows = f"{case}{suffix}", case.num_requests
    run(engine, refs, rows, SHORT)
    short = min(run(engine, refs, rows, SHORT) for _ in range(2))
    long = min(run(engine, refs, rows, OUTPUT) for _ in range(2))
    note = f"{PROMPT} in, {OUTPUT} out, rank {RANK}, best of 2"
    target = TARGETS.get(name)
    record("engine", name, "tokens_per_s", rows * OUTPUT / long, "1/s", target=target, note=note)
    num_bytes = sum(step_bytes(engine, case).values())
    step, floor = (long - short) / (OUTPUT - SHORT) * 1e3, num_bytes / BANDWIDTH * 1e3
    record("engine", name, "decode_step_ms", step, "ms", floor=round(floor, 4), note=note)
    by_bytes = f"{num_bytes / 1e9:.2f} GB at a stated {BANDWIDTH / 1e12:.2f} TB/s, over the step"
    record("engine", name, "share_of_floor", floor / step, "x", note=by_bytes)


def step_bytes(engine: LLMEngine, case: Case) -> dict[str, float]:
    """What a decode step in the middle of the output must read: base, adapters, keys and values, lm_head."""
    decoder, slots = engine.model.decoder, engine.runner.slots
    num_weights = decoder.config.num_layers * sum(out * inner for out, inner in decoder.config.linears.values())
    base = num_weights * (NF4_BITS if case.base == "nf4" else 8 * decoder.dtype.itemsize) / 8
    adapter_dtype = torch.int8 if case.adapters8 else decoder.dtype
    adapters = case.num_adapters * num_pages_for(RANK) * slots.layout.page_bytes(adapter_dtype)
    block = sum(tensor[0].nbytes for layer in engine.runner.cache.layers for tensor in layer.tensors)
    context = case.num_requests * (PROMPT + OUTPUT / 2) * block / engine.blocks.block_size
    lm_head = float(decoder.lm_head.weight.nbytes)
    return {"base": base, "adapters": adapters, "cache": context, "lm_head": lm_head}


if __name__ == "__main__":
    main()
