"""The header pre-check: a subset of what the safetensors library accepts, and never more."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from adapters_store.errors import AdapterInvalid
from adapters_store.safetensors_header import read_header


def refused(folder: Path, content: bytes) -> AdapterInvalid:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterInvalid) as caught:
        read_header(path)
    assert caught.value.file == path.name
    return caught.value


def entry(start: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
         b"1234", "appears twice"),
        (json.dumps({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}).encode(), bytes(12), "overlaps"),
        (json.dumps({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}).encode(), bytes(12), "hole"),
        (json.dumps({"a": entry(4, 8, [1])}).encode(), bytes(8), "hole"),
        (json.dumps({"a": entry(0, 4, [1])}).encode(), bytes(9), "follow the last"),
        (json.dumps({"a": entry(0, 4, [2])}).encode(), bytes(4), "do not fit"),
        (json.dumps({"a": entry(4, 0, [-1])}).encode(), bytes(4), "malformed shape"),
        (json.dumps({"a": entry(0, 4, [True])}).encode(), bytes(4), "malformed shape"),
        (json.dumps({"a": entry(0, 4, [2**62, 2**62])}).encode(), bytes(4), "do not fit"),
        (json.dumps({"a": {**entry(0, 4, [1]), "x": 1}}).encode(), bytes(4), "nothing else"),
        (json.dumps({"__metadata__": {"a": 1}}).encode(), b"", "__metadata__"),
        (b"[" * 100_000, b"", "not safetensors"),
        (b'{"a":' + b"[" * 100_000, b"", "JSON"),
        (b'{"a": NaN}', b"", "JSON"),
        (b"\xff\xfe{}", b"", "not safetensors"),
        (b'{"\xff":1}', b"", "UTF-8"),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(tmp_path: Path, header: bytes, data: bytes, reason: str) -> None:
    assert reason in refused(tmp_path, struct.pack("<Q", len(header)) + header + data).reason


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_begins_as_a_pickle_does_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "adapter_model.safetensors"
    header = json.dumps({"a": entry(0, 4, [1])}).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", length) + header + b"1234")
    assert read_header(path).tensors["a"].shape == (1,)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100 << 20, (16 << 20) + 1])
def test_a_giant_header_length_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    assert "header is larger" in refused(tmp_path, struct.pack("<Q", length) + b"{}").reason


def test_what_the_library_writes_is_read_alike(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, dtype=torch.bfloat16),
        "b": torch.zeros(2, 5),
        "c": torch.zeros((), dtype=torch.half),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"k": "v"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"k": "v"}
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a": ("BF16", (3,)),
        "b": ("F32", (2, 5)),
        "c": ("F16", ()),
    }


GOOD = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.half)}, {"k": "v"})
EDITS = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=800, deadline=None)
@given(edits=EDITS, cut=st.integers(0, 16))
def test_whatever_is_accepted_the_library_accepts_too(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(GOOD)
    for position, value in edits:
        data[position] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data[: len(data) - cut])
    try:
        ours = read_header(path)
    except AdapterInvalid:
        return
    try:
        with safe_open(path, framework="np") as file:
            assert set(file.keys()) == set(ours.tensors)
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors refuses: {error}")
