"""Bases and adapters of several of these modules."""

from __future__ import annotations

import pytest
import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import write_adapter, write_base
from gateway.config import EngineConfig
from gateway.models.loader import load_model
from tests.gateway.engine.gpu.serving import NUM_ADAPTERS, Adapted
from tests.gateway.engine.test_kinds import World


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return str(write_base(tmp_path_factory.mktemp("base"), layers=4))


@pytest.fixture(scope="session")
def adapted(four_layers: str, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """A base of four layers of Llama-3.1-8B's shape, and adapters of it."""
    folder = tmp_path_factory.mktemp("adapted")
    blobs = BlobStore(f"file://{folder / 'blobs'}")
    spec = load_model(EngineConfig(base=four_layers, device="cuda")).spec
    return four_layers, blobs, [write_adapter(blobs, folder, spec, 16, i) for i in range(NUM_ADAPTERS)]


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An adapter of every kind, on a base whose q, k and v have biases."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return World(tmp_path_factory.mktemp("kinds"), "qwen2", **shape)
