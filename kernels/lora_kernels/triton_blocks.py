"""Triton kernel behind `lora_kernels.blocks`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.blocks import BlockTensors
from lora_kernels.launch import launch

_BLOCK = 1024


@triton.jit
def _move_kernel(table_ptr, block_ids_ptr, packed_ptr, block_words, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    """packed[i, first + w] = part[block_ids[i], w], or the other way; one program a (block, part)."""
    i = tl.program_id(0).to(tl.int64)
    entry = table_ptr + tl.program_id(1) * 3
    words = tl.load(entry + 2)
    part = tl.load(entry).to(packed_ptr.dtype) + tl.load(block_ids_ptr + i) * words
    packed = packed_ptr + i * block_words + tl.load(entry + 1)
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        ok = word < words
        if GATHER:
            tl.store(packed + word, tl.load(part + word, mask=ok), mask=ok)
        else:
            tl.store(part + word, tl.load(packed + word, mask=ok), mask=ok)


def move_blocks_triton(tensors: BlockTensors, block_ids: Tensor, packed: Tensor, *, gather: bool) -> None:
    """`lora_kernels.blocks.gather_blocks`, or `scatter_blocks`."""
    grid = (len(block_ids), len(tensors.parts))
    launch(
        _move_kernel,
        grid,
        tensors.table,
        block_ids,
        packed,
        tensors.block_words,
        GATHER=gather,
        BLOCK=_BLOCK,
        num_warps=4,
    )
