import pytest
import torch

from lora_kernels.blocks import BlockTensors, gather_blocks_ref, scatter_blocks_ref

NUM_BLOCKS = 9
SHAPES = {
    "keys and values": [((16, 2, 64), torch.float16)] * 2,
    "with scales": [((16, 2, 68), torch.uint8), ((16, 2), torch.float16)],
    "odd": [((1, 3), torch.uint8), ((2000,), torch.int16)],
}


def cache(shapes: list[tuple[tuple[int, ...], torch.dtype]], device: str = "cpu") -> BlockTensors:
    made = [torch.randint(0, 100, (NUM_BLOCKS, *shape)).to(dtype) for shape, dtype in shapes]
    return BlockTensors([tensor.to(device) for tensor in made])


@pytest.mark.parametrize("kind", SHAPES)
def test_kernel_moves_the_bytes_of_the_plain_path(kind: str, device: str) -> None:
    from lora_kernels.triton_blocks import move_blocks_triton

    tensors = cache(SHAPES[kind], device)
    ids = torch.tensor([7, 0, 3], device=device)
    packed, wanted = (torch.zeros(3, tensors.block_words, dtype=tensors.word, device=device) for _ in range(2))
    move_blocks_triton(tensors, ids, packed, gather=True)
    gather_blocks_ref(tensors, ids, wanted)
    assert torch.equal(packed, wanted)
    assert packed.any()
    there, plain = cache(SHAPES[kind], device), cache(SHAPES[kind], device)
    for part, other in zip(there.parts, plain.parts, strict=True):
        part.copy_(other)
    move_blocks_triton(there, ids, packed, gather=False)
    scatter_blocks_ref(plain, ids, packed)
    for part, other in zip(there.parts, plain.parts, strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_gathered_comes_back_to_other_blocks(kind: str) -> None:
    tensors = cache(SHAPES[kind])
    before = [part.clone() for part in tensors.parts]
    packed = torch.zeros(2, tensors.block_words, dtype=tensors.word)
    gather_blocks_ref(tensors, torch.tensor([4, 2]), packed)
    scatter_blocks_ref(tensors, torch.tensor([8, 4]), packed)
    for part, old in zip(tensors.parts, before, strict=True):
        assert torch.equal(part[[8, 4]], old[[4, 2]])
        untouched = [0, 1, 2, 3, 5, 6, 7]
        assert torch.equal(part[untouched], old[untouched])


def test_words_are_as_wide_as_every_part_allows() -> None:
    assert {kind: cache(shapes).word for kind, shapes in SHAPES.items()} == {
        "keys and values": torch.int64,
        "with scales": torch.int64,
        "odd": torch.uint8,
    }
