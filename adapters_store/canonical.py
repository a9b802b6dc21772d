"""Writes the one safetensors file that an adapter is stored as: sorted tensors, our header, nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from adapters_store.manifest import ADAPTER_METADATA_KEY, AdapterSpec
from adapters_store.safetensors_header import ITEM_SIZES, TensorInfo

CANONICAL_FILE: Final = "canonical.safetensors"


def tensor_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The order of storage: widest dtype first, so that each tensor is aligned, then by name."""
    return sorted(tensors, key=lambda name: (-ITEM_SIZES[tensors[name].dtype], name))


def canonical_header(spec: AdapterSpec, tensors: Mapping[str, TensorInfo]) -> bytes:
    """The file's first bytes: length, JSON, padding to 8. Equal adapters have equal headers."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", ADAPTER_METADATA_KEY: spec.canonical_json()}}
    end = 0
    for name in tensor_order(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.end - tensor.start
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_canonical(
    path: Path, spec: AdapterSpec, tensors: Mapping[str, TensorInfo], data: Iterable[bytes]
) -> tuple[str, int]:
    """Write the file; `data` yields the tensors' bytes in `tensor_order`. Returns its SHA-256 and size in bytes."""
    hasher, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in _chain(canonical_header(spec, tensors), data):
            hasher.update(chunk)
            file.write(chunk)
            size += len(chunk)
    return hasher.hexdigest(), size


def _chain(first: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
