"""A strict reading of a safetensors header, made before the `safetensors` library opens a tenant's file.

Of a file that is stored already, which the validator has written anew, `tensor_file.py` reads the tensors by it.
It accepts a subset of what the library accepts: a bounded header, no duplicate keys, only fp32, bf16 and fp16,
and tensors that fill the file exactly, without holes or overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adapters_store.errors import AdapterInvalid
from adapters_store.file_names import WEIGHTS_FILE
from adapters_store.strict_json import parse_object, shown

ITEM_SIZES: Final = {"F32": 4, "BF16": 2, "F16": 2}

_MAX_HEADER: Final = 16 << 20
_PICKLE_ADVICE: Final = "it is a pickle, which is never opened; save it again with safe_serialization=True"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file: `start` and `end` are byte offsets from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """Tensors by name, and the free text that the writer added."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a weights file. Raises `AdapterInvalid` naming the tensor at fault."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(9)
        if len(first) < 9:
            raise _refuse("the file is truncated: it is too short to be safetensors")
        length = int.from_bytes(first[:8], "little")
        if length > _MAX_HEADER or first[8:] != b"{":
            raise _refuse(_why_not_safetensors(first))
        if 8 + length > size:
            raise _refuse("the file is truncated: it ends inside its header")
        raw = first[8:] + file.read(length - 1)
    entries = parse_object(raw.rstrip(b" "), WEIGHTS_FILE)
    metadata = _metadata(entries.pop("__metadata__", {}))
    tensors = {name: _tensor(name, entry, 8 + length) for name, entry in entries.items()}
    _check_layout(tensors, 8 + length, size)
    return SafetensorsHeader(tensors, metadata)


def _why_not_safetensors(first: bytes) -> str:
    """A header of 640 bytes begins as a pickle does: only what is no header may be one."""
    if first.startswith(b"PK\x03\x04") or (first[:1] == b"\x80" and first[1:2] in b"\x02\x03\x04\x05"):
        return _PICKLE_ADVICE
    if first[8:] != b"{":
        return "the file is not safetensors: its header is not JSON"
    return f"the file is not safetensors, or its header is larger than {_MAX_HEADER:,} bytes"


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _refuse("the header's __metadata__ must map texts to texts")
    return value


def _tensor(name: str, entry: Any, base: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _refuse("the header must give dtype, shape and data_offsets and nothing else", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise _refuse(f"has dtype {shown(str(dtype))}; F32, BF16 and F16 are accepted", name)
    if not _is_sizes(shape) or len(shape) > 8:
        raise _refuse("has a malformed shape", name)
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise _refuse("has malformed data_offsets", name)
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_SIZES[dtype]:
        raise _refuse("its bytes do not fit its shape and dtype", name)
    return TensorInfo(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """Each tensor begins where the one before it ends, and the last ends the file."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            problem = "overlaps another tensor" if tensor.start < end else "leaves a hole before it"
            raise _refuse(f"{problem} in the file", name)
        end = tensor.end
    if end > size:
        raise _refuse(f"the file is truncated: {end:,} bytes are declared and {size:,} are there")
    if end < size:
        raise _refuse(f"{size - end:,} bytes follow the last tensor")


def _refuse(reason: str, tensor: str | None = None) -> AdapterInvalid:
    return AdapterInvalid(reason, file=WEIGHTS_FILE, field=None if tensor is None else shown(tensor))
