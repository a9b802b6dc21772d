"""Random requests, random engines, and the adapters, good and bad, that the requests ask for.

A field that requests or engines get is a line in `SAMPLING`, `REQUEST` or `SETTINGS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from adapters_store.base_spec import BaseSpec
from adapters_store.blobs import BlobStore
from adapters_store.lora_layout import num_pages_for
from benchmarks.engine import write_adapter
from gateway.config import EngineConfig
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.models.config import DecoderConfig

RANKS = (4, 8, 16, 20, 33, 48, 80)  # of 1, 1, 1, 2, 3, 3 and 5 pages
VOCABULARY = range(3, 300)
TEXTS = ("the quick brown fox ", "jumps over ", "the lazy dog ", "\U0001f98a ", "a b c ")


@dataclass(frozen=True)
class World:
    """A base and adapters of it: sound ones, ones that never load, and one whose blob comes and goes."""

    base: Path
    blobs: BlobStore
    sound: tuple[AdapterRef, ...]
    broken: tuple[AdapterRef, ...]
    flaky: AdapterRef

    def blob(self, ref: AdapterRef) -> Path:
        """The file that holds an adapter's bytes."""
        return Path(self.blobs.url.removeprefix("file://")) / ref.digest[:2] / ref.digest

    def toggle(self) -> None:
        """Take the flaky adapter's blob away, or bring it back."""
        blob = self.blob(self.flaky)
        away = blob.with_suffix(".away")
        if blob.exists():
            blob.rename(away)
        else:
            away.rename(blob)

    @classmethod
    def make(cls, base: Path, folder: Path) -> World:
        """Write all adapters into a blob store in `folder`."""
        blobs = BlobStore(f"file://{folder / 'blobs'}")
        config = DecoderConfig.from_folder(base)
        spec = BaseSpec("any", config.num_layers, config.linears)
        wide = BaseSpec("any", config.num_layers, {name: (out, 2 * n) for name, (out, n) in config.linears.items()})

        def write(spec: BaseSpec, rank: int, seed: int) -> AdapterRef:
            return write_adapter(blobs, folder, spec, rank, seed, std=0.08)

        sound = tuple(write(spec, rank, seed) for seed, rank in enumerate(RANKS))
        foreign, damaged, flaky = write(wide, 8, 100), write(spec, 8, 101), write(spec, 8, 102)
        garbage = folder / "garbage"
        garbage.write_bytes(b"no safetensors")
        digest = hashlib.sha256(garbage.read_bytes()).hexdigest()
        blobs.put(digest, garbage)
        broken = (AdapterRef("t/missing:1", "0" * 64, 8), AdapterRef("t/garbage:1", digest, 8), foreign, damaged)
        world = cls(base, blobs, sound, broken, flaky)
        world.blob(damaged).write_bytes(world.blob(damaged).read_bytes()[:-1] + b"\0")
        return world


Draw = Callable[[Random], Any]

# How a value is drawn where a request gives one, which it does by chance (`_GIVEN`).
SAMPLING: dict[str, Draw] = {
    "temperature": lambda rng: rng.choice([0.0, 0.0, 0.7, 1.5]),
    "top_p": lambda rng: rng.uniform(0.1, 1.0),
    "top_k": lambda rng: rng.choice([-1, 1, 5, 50]),
    "min_p": lambda rng: rng.uniform(0.0, 0.2),
    "repetition_penalty": lambda rng: rng.uniform(0.5, 2.0),
    "presence_penalty": lambda rng: rng.uniform(-2.0, 2.0),
    "frequency_penalty": lambda rng: rng.uniform(-2.0, 2.0),
    "seed": lambda rng: rng.randrange(1 << 32),
    "n": lambda rng: rng.choice([2, 3, 5]),
    "max_tokens": lambda rng: rng.choice([1, 2, rng.randint(3, 16), rng.randint(16, 48)]),
    "min_tokens": lambda rng: rng.randint(0, 12),
    "stop": lambda rng: tuple(rng.sample(["e", "o", "th", "ox ", "zzz"], rng.randint(1, 3))),
    "stop_token_ids": lambda rng: tuple(rng.sample(VOCABULARY, rng.randint(1, 40))),
    "ignore_eos": lambda rng: True,
    "logprobs": lambda rng: rng.choice([0, 1, 5]),
    "logit_bias": lambda rng: {token: rng.uniform(-100, 100) for token in rng.sample(VOCABULARY, 3)},
    "skip_special_tokens": lambda rng: False,
    "num_speculative_tokens": lambda rng: rng.choice([1, 3, 8]),
}
_GIVEN = {"temperature": 1.0, "max_tokens": 0.9}
_SELDOM = 0.15

REQUEST: dict[str, Callable[[Random, World], Any]] = {
    "adapter": lambda rng, world: _adapter(rng, world),
    "tenant": lambda rng, world: rng.choice(["a", "b"]),
    "cache_salt": lambda rng, world: rng.choice(["a", "a", "b"]),
    "priority": lambda rng, world: rng.choice([-1, 0, 0, 0, 2]),
    "tenant_weight": lambda rng, world: rng.choice([0.5, 1.0, 1.0, 3.0]),
}
PROMPT_FIELDS = {"request_id", "sampling", "prompt", "messages"}  # made by `random_call` itself

# In a cache of so few tokens there is always something to preempt, and with so few slots always something to evict.
SETTINGS: dict[str, Draw] = {
    "kv_cache_tokens": lambda rng: rng.choice([96, 96, 160, 320]),
    "kv_host_bytes": lambda rng: rng.choice([0, 32 << 10, 128 << 10, 1 << 20]),
    "max_num_seqs": lambda rng: rng.choice([3, 8, 32]),
    "max_num_batched_tokens": lambda rng: rng.choice([8, 24, 256]),
    "max_waiting": lambda rng: rng.choice([8, 4096]),
    "num_adapter_slots": lambda rng: rng.choice([1, 2, 4]),
    "lend_adapter_pages": lambda rng: rng.random() < 0.5,
    "num_adapter_pages": lambda rng: rng.choice([None, 4, 7]),
    "max_adapter_pages_per_step": lambda rng: rng.choice([None, None, 2, 6]),
    "adapter_dtype": lambda rng: rng.choice(["auto", "auto", "int8"]),
    "host_cache_bytes": lambda rng: rng.choice([0, 384 << 10, 1 << 20, 64 << 20]),
    "enable_prefix_caching": lambda rng: rng.random() < 0.8,
    "share_base_prefixes": lambda rng: rng.random() < 0.5,
    "overlap_steps": lambda rng: rng.random() < 0.7,
}


@dataclass(frozen=True)
class Call:
    """A request, and after how many turns its caller goes away, if at all."""

    request: GenerateRequest
    goes: int | None


def random_config(rng: Random, world: World, device: str) -> EngineConfig:
    """An engine of the world's base."""
    drawn = {name: draw(rng) for name, draw in SETTINGS.items()}
    return quiet_config(world, device, **drawn)


def quiet_config(world: World, device: str, **settings: Any) -> EngineConfig:
    """An engine that has room for everything, shares nothing and takes one step after the other, but for `settings`."""
    fixed: dict[str, Any] = {
        "base": str(world.base),
        "quantization": "none",
        "dtype": "float32",
        "device": device,
        "block_size": 4,
        "kv_cache_tokens": 4096,
        "max_model_len": 96,
        "default_max_tokens": 24,
        "max_num_seqs": 8,
        "max_lora_rank": 80,
        "host_cache_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "overlap_steps": False,
        "num_adapter_slots": 2,
    }
    return EngineConfig(**(fixed | settings))


def random_calls(rng: Random, world: World, count: int, tag: str) -> list[Call]:
    """Calls whose prompts begin alike by chance, named after the tag."""
    documents = [[rng.choice(VOCABULARY) for _ in range(64)] for _ in range(3)]
    return [_random_call(rng, world, f"{tag}.{i}", documents) for i in range(count)]


def _random_call(rng: Random, world: World, name: str, documents: list[list[int]]) -> Call:
    fields = {field: draw(rng, world) for field, draw in REQUEST.items()}
    request = GenerateRequest(name, random_sampling(rng), **_prompt(rng, documents), **fields)
    return Call(request, rng.randint(0, 40) if rng.random() < 0.3 else None)


def random_sampling(rng: Random) -> SamplingParams:
    """Parameters of which most are left out."""
    given = {name: draw(rng) for name, draw in SAMPLING.items() if rng.random() < _GIVEN.get(name, _SELDOM)}
    if "max_tokens" in given:
        given["min_tokens"] = min(given.get("min_tokens", 0), given["max_tokens"])
    return SamplingParams(**given)


def _prompt(rng: Random, documents: list[list[int]]) -> dict[str, Any]:
    kind = rng.random()
    text = "".join(rng.choices(TEXTS, k=rng.randint(1, 6)))
    if kind < 0.1:
        return {"prompt": text}
    if kind < 0.2:
        return {"messages": [{"role": "user", "content": text}]}
    shared = rng.choice(documents)[: rng.randint(0, 48)]
    return {"prompt": [*shared, *(rng.choice(VOCABULARY) for _ in range(rng.randint(1, 12)))]}


def _adapter(rng: Random, world: World) -> AdapterRef | None:
    kind = rng.random()
    if kind < 0.3:
        return None
    if kind < 0.9:
        return rng.choice(world.sound)
    return rng.choice((*world.broken, world.flaky))


def may_fail(world: World, config: EngineConfig, request: GenerateRequest) -> bool:
    """Whether the request's adapter cannot be had, or not always."""
    ref = request.adapter
    if ref is None:
        return False
    num_pages = config.num_adapter_pages or config.num_adapter_slots * num_pages_for(config.max_lora_rank)
    return ref in (*world.broken, world.flaky) or num_pages_for(ref.rank) > num_pages


def again(call: Call, tag: str) -> Call:
    """The call under a new name."""
    return Call(replace(call.request, request_id=f"{call.request.request_id}{tag}"), call.goes)
