"""Tiny bases and adapters, made once, and engines over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from adapters_store.blobs import BlobStore
from gateway.config import EngineConfig
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef
from tests.tiny import make_base, stored_adapter


@dataclass(frozen=True)
class TinyWorld:
    """A base, three adapters of different ranks on it, and the blob store that holds them."""

    base: Path
    adapters: dict[str, Path]
    refs: dict[str, AdapterRef]
    blobs: BlobStore


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    root = tmp_path_factory.mktemp("world")
    base = make_base(root / "base")
    blobs = BlobStore(f"file://{root / 'blobs'}")
    stored = {
        name: stored_adapter(base, root / name, blobs, f"t/{name}:1", **settings)
        for name, settings in {
            "a4": {"rank": 4, "seed": 1},
            "b20": {"rank": 20, "alpha": 15, "seed": 2},
            "c8": {"rank": 8, "seed": 3, "targets": ("q_proj", "down_proj"), "use_rslora": True},
        }.items()
    }
    return TinyWorld(base, {n: root / n for n in stored}, stored, blobs)


@pytest.fixture
def build_engine(world: TinyWorld) -> Iterator[Callable[..., LLMEngine]]:
    """Builds engines over the tiny base."""
    engines: list[LLMEngine] = []

    def make(**settings: object) -> LLMEngine:
        defaults: dict[str, object] = {
            "base": str(world.base),
            "quantization": "none",
            "device": "cpu",
            "block_size": 4,
            "kv_cache_tokens": 2048,
            "num_adapter_slots": 4,
            "lend_adapter_pages": False,
        }
        engine = LLMEngine(EngineConfig(**(defaults | settings)), world.blobs, lambda: None)  # type: ignore[arg-type]
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=[False, True], ids=["in_turn", "overlapping"])
def make_engine(build_engine: Callable[..., LLMEngine], request: pytest.FixtureRequest) -> Callable[..., LLMEngine]:
    """Builds engines whose steps run in turn, and in another run of the test ones whose steps overlap."""
    return partial(build_engine, overlap_steps=request.param)
