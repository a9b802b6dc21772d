"""Tensors as safetensors' own reader gives them, in memory that a thread uses again."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store import tensor_file
from adapters_store.errors import AdapterInvalid
from adapters_store.tensor_file import ReadMemory, TensorFile


def _save(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    tensors = {
        "first": torch.randn(3, 5).half(),
        "second": torch.randn(2, 2, 3),
        "none": torch.zeros(0, 4),
        "third": torch.randn(7).bfloat16(),
        "number": torch.tensor(2.5),
    }
    save_file(tensors, path, metadata={"said": "something"})
    return path


def _all(file: TensorFile) -> dict[str, torch.Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _same(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == other.keys() and all(
        ours[name].dtype == other[name].dtype and torch.equal(ours[name], other[name]) for name in ours
    )


def test_tensors_and_metadata_are_those_of_the_package(tmp_path: Path) -> None:
    path = _save(tmp_path / "file")
    file = TensorFile(path)
    assert _same(_all(file), load_file(path))
    assert file.metadata() == {"said": "something"}
    with pytest.raises(KeyError):
        file.get_tensor("fourth")


def test_a_tensor_that_lies_at_an_odd_place_is_read(tmp_path: Path) -> None:
    half, single = torch.randn(3).half(), torch.randn(4)
    entries = (
        b'{"half":{"dtype":"F16","shape":[3],"data_offsets":[0,6]},'
        b'"single":{"dtype":"F32","shape":[4],"data_offsets":[6,22]}}'
    )
    path = tmp_path / "file"
    path.write_bytes(len(entries).to_bytes(8, "little") + entries + half.numpy().tobytes() + single.numpy().tobytes())
    assert _same(_all(TensorFile(path)), {"half": half, "single": single})


def test_a_thread_reads_the_next_file_over_the_last_and_no_other_thread_s(tmp_path: Path) -> None:
    memory, paths = ReadMemory(), [_save(tmp_path / str(seed), seed) for seed in range(3)]
    first = _all(TensorFile(paths[0], memory))
    others: list[dict[str, torch.Tensor]] = []
    thread = threading.Thread(target=lambda: others.append(_all(TensorFile(paths[1], memory))))
    thread.start()
    thread.join()
    assert _same(first, load_file(paths[0]))
    second = _all(TensorFile(paths[2], memory))
    assert second["second"].data_ptr() == first["second"].data_ptr()
    assert _same(second, load_file(paths[2]))
    assert _same(others[0], load_file(paths[1]))


def test_a_large_file_has_memory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_MOST_KEPT", 16)
    memory, paths = ReadMemory(), [_save(tmp_path / str(seed), seed) for seed in range(2)]
    first, second = (_all(TensorFile(path, memory)) for path in paths)
    assert _same(first, load_file(paths[0]))
    assert _same(second, load_file(paths[1]))


def test_a_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "file")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterInvalid, match="truncated"):
        TensorFile(path)
