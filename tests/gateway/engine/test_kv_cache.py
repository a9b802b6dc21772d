"""Copies of blocks inside the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gateway.engine.kv_cache import KVCache
from gateway.models.config import DecoderConfig
from tests.gateway.engine.conftest import TinyWorld


def make_cache(base: Path, device: str) -> KVCache:
    cache = KVCache(DecoderConfig.from_folder(base), 8, 4, torch.device(device), torch.float32)
    for layer in cache.layers:
        for tensor in layer:
            tensor.normal_()
    return cache


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_blocks_are_copied_in_every_layer_and_no_other_changes(world: TinyWorld, device: str) -> None:
    cache = make_cache(world.base, device)
    before = [tensor.clone() for layer in cache.layers for tensor in layer]
    sources, targets = torch.tensor([1, 1, 5], device=device), torch.tensor([0, 5, 7], device=device)
    cache.copy_blocks(sources, targets)
    for tensor, old in zip((t for layer in cache.layers for t in layer), before, strict=True):
        # Block 5 is read before it is written.
        assert torch.equal(tensor, old[[1, 1, 2, 3, 4, 1, 6, 5, 8]])
