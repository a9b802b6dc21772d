"""The tensors of the KV cache's second tier, in host memory, and the copies between the tiers."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from gateway.engine.host_blocks import BlockCopy
from gateway.engine.transfers import send
from lora_kernels.blocks import BlockTensors, gather_blocks, scatter_blocks

# On the device, for each way: 64 blocks of 16 tokens of Llama-3.1-8B. Where a step moves more, its parts take turns.
STAGING_BYTES: Final = 128 << 20
# PyTorch rounds a piece of pinned memory up to a power of two: of pieces just below one little is wasted.
_PIECE_BYTES: Final = 256 << 20


class HostTier:
    """Blocks in host memory, each one row of bytes: its part of every tensor of every layer of the cache.

    layers: the cache's tensors, each [num_blocks, ...], contiguous, of any dtype.

    On the device a step gathers the blocks that leave into one buffer, from which a side stream takes them to pinned
    memory; another side stream brings what is fetched into a second buffer, beside the step before, and the step
    scatters it. So a step waits for what it fetches, and not for what it saves. On the CPU, whose streams do nothing,
    each copy is done when it is called.
    """

    def __init__(self, layers: Seq[Seq[Tensor]], num_blocks: int, staging_bytes: int = STAGING_BYTES) -> None:
        self._tensors = BlockTensors([tensor for layer in layers for tensor in layer])
        self._device = layers[0][0].device
        words, word = self._tensors.block_words, self._tensors.word
        self.blocks = _host_blocks(num_blocks, words, word, pinned=self._device.type == "cuda")
        size = min(max(1, staging_bytes // (words * word.itemsize)), num_blocks)
        self._leaving, self._coming = (torch.empty((size, words), dtype=word, device=self._device) for _ in range(2))
        self._streams: Any = torch.get_device_module(self._device)
        self._out, self._in = self._streams.Stream(), self._streams.Stream()
        self._scattered = self._streams.Event()

    def move(self, saves: Seq[BlockCopy], loads: Seq[BlockCopy]) -> None:
        """Make a step's copies, in stream order before its forward pass; the host waits for none.

        The device blocks of `saves` may be those of `loads`. No load reads what the same step saves.
        """
        # What earlier steps saved is there before it is read, and what they read before it is overwritten.
        self._in.wait_stream(self._out)
        self._out.wait_stream(self._in)
        for part in self._parts(saves):
            self._save(part)
        for part in self._parts(loads):
            self._load(part)

    def rehearse(self) -> None:
        """Call the kernels of both ways: to have them compiled."""
        block_ids = send(np.zeros(1, np.int64), self._device)
        gather_blocks(self._tensors, block_ids, self._leaving[:1])
        scatter_blocks(self._tensors, block_ids, self._coming[:1])

    def _save(self, saves: Seq[BlockCopy]) -> None:
        packed, step = self._leaving[: len(saves)], self._streams.current_stream()
        step.wait_stream(self._out)  # until the buffer's last content has left it
        gather_blocks(self._tensors, self._block_ids(saves), packed)
        self._out.wait_stream(step)
        with self._streams.stream(self._out):
            for row, save in zip(packed.unbind(), saves, strict=True):
                self.blocks[save.host_block].copy_(row, non_blocking=True)

    def _load(self, loads: Seq[BlockCopy]) -> None:
        packed, step = self._coming[: len(loads)], self._streams.current_stream()
        self._in.wait_event(self._scattered)  # until the buffer's last content is where it belongs
        with self._streams.stream(self._in):
            for row, load in zip(packed.unbind(), loads, strict=True):
                row.copy_(self.blocks[load.host_block], non_blocking=True)
        step.wait_stream(self._in)
        scatter_blocks(self._tensors, self._block_ids(loads), packed)
        self._scattered.record(step)

    def _parts(self, copies: Seq[BlockCopy]) -> Iterator[Seq[BlockCopy]]:
        """The copies in parts that the staging buffers hold."""
        size = len(self._leaving)
        return (copies[start : start + size] for start in range(0, len(copies), size))

    def _block_ids(self, copies: Seq[BlockCopy]) -> Tensor:
        return send(np.array([copy.block for copy in copies], np.int64), self._device)


def _host_blocks(num_blocks: int, words: int, word: torch.dtype, *, pinned: bool) -> list[Tensor]:
    """`num_blocks` tensors [words], many in one piece of memory."""
    most = max(1, _PIECE_BYTES // (words * word.itemsize))
    sizes = [min(most, num_blocks - start) for start in range(0, num_blocks, most)]
    pieces = [torch.empty((size, words), dtype=word, pin_memory=pinned) for size in sizes]
    return [block for piece in pieces for block in piece.unbind()]
