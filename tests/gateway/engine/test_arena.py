"""The shared memory: what lies over what, in every layer, and how kernels find it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gateway.config import EngineConfig
from gateway.engine.arena import Arena
from gateway.engine.memory_plan import MemoryPlan
from gateway.models.decoder import Decoder
from gateway.models.loader import load_model
from lora_kernels.layer_cache import FP8
from tests.tiny import make_base

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, FP8), (torch.int8, torch.bfloat16)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    base: Path = make_base(tmp_path_factory.mktemp("base"))
    return load_model(EngineConfig(base=str(base), device="cpu", quantization="none")).decoder


def make_arena(
    decoder: Decoder,
    dtypes: tuple[torch.dtype, torch.dtype] = DTYPES[0],
    block_size: int = 4,
    num_pages: int = 5,
    num_blocks: int = 7,
) -> Arena:
    plan = MemoryPlan(num_pages, 0, num_blocks, 0, block_size)
    return Arena(decoder, plan, *dtypes)


def overwritten(arena: Arena) -> set[int]:
    """The blocks in which any byte of any layer is not zero, the same in every layer; then all are zero again."""
    found = []
    for layer in arena.cache.layers:
        halves = layer.k.view(torch.uint8).flatten(1)
        found.append({half // 2 * 2 for half in halves.any(1).nonzero().flatten().tolist()})
        halves.zero_()
    assert all(blocks == found[0] for blocks in found)
    return found[0]


@pytest.mark.parametrize("block_size", [1, 4, 32])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_page_lies_over_these_blocks_and_no_others(
    decoder: Decoder, dtypes: tuple[torch.dtype, torch.dtype], block_size: int
) -> None:
    arena = make_arena(decoder, dtypes, block_size)
    for page in range(5):
        for pools in arena.pools:
            for array in pools.arrays:
                array[:, page].view(torch.uint8).fill_(255)
        under = arena.blocks_under(page)
        assert overwritten(arena) == set(under)
        assert not set(under) & set(arena.own_blocks)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_no_two_pages_nor_blocks_share_a_byte(decoder: Decoder, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    arena = make_arena(decoder, dtypes)
    for page in range(5):
        for pools in arena.pools:
            for array in pools.arrays:
                array[:, page].view(torch.uint8).fill_(page + 1)
    for pools in arena.pools:
        for array in pools.arrays:
            parts = array.view(torch.uint8).transpose(0, 1).flatten(1)
            assert torch.equal(parts, torch.arange(1, 6, dtype=torch.uint8)[:, None].expand_as(parts))
    blocks = [*range(0, arena.own_blocks.stop, 2), arena.cache.scratch_slot // 4]
    for number, layer in enumerate(arena.cache.layers):
        for block in blocks:
            for half, tensor in enumerate(layer.tensors):
                tensor[block].view(torch.uint8).fill_((block + half + number) % 251)
    for number, layer in enumerate(arena.cache.layers):
        for block in blocks:
            for half, tensor in enumerate(layer.tensors):
                assert (tensor[block].view(torch.uint8) == (block + half + number) % 251).all()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_kernels_find_pages_and_blocks_in_one_piece(decoder: Decoder, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    arena = make_arena(decoder, dtypes)
    arrays = [array[layer] for pools in arena.pools for array in pools.arrays for layer in range(2)]
    tensors = [tensor for layer in arena.cache.layers for tensor in layer.tensors]
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in [*arrays, *tensors])


def test_at_8b_in_bf16_a_page_is_forty_blocks_and_no_block_is_under_two(decoder: Decoder) -> None:
    config = replace(
        decoder.config, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, head_dim=128
    )
    decoder = replace(decoder, config=config, embed_tokens=torch.empty(0, device="meta"))
    arena = make_arena(decoder, (torch.bfloat16, torch.bfloat16), block_size=16, num_pages=3)
    under = [arena.blocks_under(page) for page in range(3)]
    assert [len(blocks) for blocks in under] == [40, 40, 40]
    assert sorted(block for blocks in under for block in blocks) == list(range(0, 240, 2))
    assert list(arena.own_blocks) == list(range(240, 254, 2))


def test_without_pages_all_blocks_are_its_own(decoder: Decoder) -> None:
    arena = make_arena(decoder, num_pages=0)
    assert list(arena.own_blocks) == list(range(0, 14, 2))
    assert arena.cache.scratch_slot == 14 * 4
