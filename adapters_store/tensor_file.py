"""A stored safetensors file's tensors, read whole into memory that its thread may use again for the next file.

The `safetensors` package maps a file. Giving a mapping back holds Python's lock, for which steps of the engine would
wait; reading lets other threads run.
"""

from __future__ import annotations

import threading
from collections.abc import KeysView, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from adapters_store.safetensors_header import read_header

_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MOST_KEPT: Final = 512 << 20


class ReadMemory(threading.local):
    """Each thread's own memory for the file at hand; what is larger than half a GiB has memory of its own."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> Tensor:
        """uint8 [size], for as long as this thread asks for no other."""
        if size > _MOST_KEPT:
            return torch.empty(size, dtype=torch.uint8)
        if size > len(self._memory):
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size]


class TensorFile:
    """The tensors of a file, as views of memory: the thread's of `memory`, or their own.

    Raises `AdapterInvalid` for a file that is not safetensors, OSError where it cannot be read.
    """

    def __init__(self, path: Path, memory: ReadMemory | None = None) -> None:
        header = read_header(path)
        self._tensors, self._metadata = header.tensors, header.metadata
        self._begin = min((info.start for info in self._tensors.values()), default=0)
        size = max((info.end for info in self._tensors.values()), default=0) - self._begin
        self._bytes = (memory or ReadMemory()).of(size)
        rest = self._bytes.numpy().data
        with path.open("rb", buffering=0) as file:
            file.seek(self._begin)
            while rest:
                if not (count := file.readinto(rest)):
                    raise OSError("it ends early")
                rest = rest[count:]

    def metadata(self) -> Mapping[str, str]:
        """The free text that the writer added."""
        return self._metadata

    def keys(self) -> KeysView[str]:
        """The tensors' names."""
        return self._tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        """A tensor by its name. Raises KeyError."""
        info, dtype = self._tensors[name], _DTYPES[self._tensors[name].dtype]
        start = info.start - self._begin
        raw = self._bytes[start : info.end - self._begin]
        return (raw if start % dtype.itemsize == 0 else raw.clone()).view(dtype).view(info.shape)
