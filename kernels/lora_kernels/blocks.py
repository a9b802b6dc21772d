"""Blocks of the paged cache, gathered from all tensors of all layers into one buffer, and scattered back."""

from collections.abc import Sequence

import torch
from torch import Tensor

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class BlockTensors:
    """Tensors [num_blocks, ...] of any dtypes, contiguous, on one device; block b is what all of them hold at b.

    word: the widest integer that each tensor's part of a block is made of; block_words: of a whole block. parts: the
    tensors seen as words, [num_blocks, words] each; widths: their words. table: int64 [num_tensors, 3] on the device:
    a part's address, its first word within a block, its words.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        sizes = [tensor[0].nbytes for tensor in tensors]
        self.word = next(word for word in _WORDS if all(size % word.itemsize == 0 for size in sizes))
        self.parts = tuple(tensor.view(len(tensor), -1).view(self.word) for tensor in tensors)
        self.widths = [part.shape[1] for part in self.parts]
        self.block_words = sum(self.widths)
        rows = [(part.data_ptr(), sum(self.widths[:i]), part.shape[1]) for i, part in enumerate(self.parts)]
        self.table = torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)


def gather_blocks_ref(tensors: BlockTensors, block_ids: Tensor, packed: Tensor) -> None:
    """`gather_blocks` in plain PyTorch."""
    for part, columns in zip(tensors.parts, torch.split(packed, tensors.widths, dim=1), strict=True):
        columns.copy_(part[block_ids])


def scatter_blocks_ref(tensors: BlockTensors, block_ids: Tensor, packed: Tensor) -> None:
    """`scatter_blocks` in plain PyTorch."""
    for part, columns in zip(tensors.parts, torch.split(packed, tensors.widths, dim=1), strict=True):
        part.index_copy_(0, block_ids, columns)


def gather_blocks(tensors: BlockTensors, block_ids: Tensor, packed: Tensor) -> None:
    """Writes block block_ids[i] to packed[i].

    block_ids: int64 [n]. packed: [n, tensors.block_words] of `tensors.word`, contiguous. One launch for all tensors:
    Triton on a GPU, `gather_blocks_ref` elsewhere.
    """
    if packed.is_cuda:
        from lora_kernels.triton_blocks import move_blocks_triton

        return move_blocks_triton(tensors, block_ids, packed, gather=True)
    return gather_blocks_ref(tensors, block_ids, packed)


def scatter_blocks(tensors: BlockTensors, block_ids: Tensor, packed: Tensor) -> None:
    """Writes packed[i] to block block_ids[i]: `gather_blocks` the other way. The ids must differ."""
    if packed.is_cuda:
        from lora_kernels.triton_blocks import move_blocks_triton

        return move_blocks_triton(tensors, block_ids, packed, gather=False)
    return scatter_blocks_ref(tensors, block_ids, packed)
