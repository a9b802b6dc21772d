"""What the KV cache's host tier saves: a prompt's first token, computed, fetched from the host and found on the device.

    python -m benchmarks.kv_host [--layers 32] [--tokens 2000]

One engine at Llama-3.1-8B's shape whose device cache holds two prompts. Each prompt comes three times: new, again at
once, and after three others, by when only the host has it. A block's time is what its prompt takes beyond the one on
the device, shared out among its blocks; `gateway.engine.host_blocks` states both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import drain, write_base
from benchmarks.record import record
from gateway.config import EngineConfig
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams

ROUNDS = 5


def main() -> None:
    """Build the base, time the prompts, record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = EngineConfig(
            base=str(write_base(folder / "base", args.layers)),
            kv_cache_tokens=2 * args.tokens + 256,
            max_num_batched_tokens=8192,
            max_lora_rank=16,
            kv_host_bytes=4 << 30,
            lend_adapter_pages=False,
        )
        engine = LLMEngine(config, BlobStore(f"file://{folder / 'blobs'}"), lambda: None)
        measure(engine, args.tokens, f"{args.tokens} tokens, {args.layers} layers")
        engine.close()


def measure(engine: LLMEngine, num_tokens: int, case: str) -> None:
    """Time prompts of `num_tokens` tokens by where their blocks are."""
    new_prompt(engine, num_tokens)  # compiles kernels
    times: dict[str, list[float]] = {"computed": [], "fetched": [], "on the device": []}
    num_blocks = (num_tokens - 1) // engine.blocks.block_size
    for _ in range(ROUNDS):
        prompt, seconds = new_prompt(engine, num_tokens)
        times["computed"].append(seconds)
        times["on the device"].append(first_token(engine, prompt))
        for _ in range(3):
            new_prompt(engine, num_tokens)
        loaded = engine.stats().kv_host_loaded
        times["fetched"].append(first_token(engine, prompt))
        assert engine.stats().kv_host_loaded - loaded == num_blocks
    note = f"median of {ROUNDS}"
    for kind, seconds in times.items():
        record("kv_host", f"{case}, {kind}", "first_token_ms", median(seconds) * 1e3, "ms", note=note)
    least = median(times["on the device"])
    for kind in ("computed", "fetched"):
        value = (median(times[kind]) - least) / num_blocks * 1e6
        record("kv_host", f"{case}, {kind}", "block_us", value, "us", note=note)


def new_prompt(engine: LLMEngine, num_tokens: int) -> tuple[list[int], float]:
    """A prompt that no one has seen, and its seconds to the first token."""
    prompt = torch.randint(10, engine.model.decoder.config.vocab_size, (num_tokens,)).tolist()
    return prompt, first_token(engine, prompt)


def first_token(engine: LLMEngine, prompt: list[int]) -> float:
    """Serve the prompt alone, for one token. Returns seconds."""
    start = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.add(GenerateRequest(str(start), params, prompt=prompt), prompt)
    drain(engine)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
