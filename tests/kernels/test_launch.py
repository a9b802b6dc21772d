"""Kernels compiled ahead of their launches."""

from pathlib import Path
from threading import current_thread, main_thread

import pytest
import torch

from lora_kernels.launch import begun, compiled_ahead, is_rehearsal
from lora_kernels.vectors import SlotVectors
from tests.kernels.test_compile import needs_nvrtc


def _scaled(y: torch.Tensor) -> torch.Tensor:
    from lora_kernels.triton_vectors import apply_vectors_triton

    slots, scale = torch.zeros(len(y), dtype=torch.int32, device=y.device), torch.full_like(y[:1], 3)
    apply_vectors_triton(y, SlotVectors(slots, scale, torch.zeros_like(scale)))
    return y


def test_a_rehearsal_launches_nothing_and_what_follows_does(device: str) -> None:
    y = torch.ones(2, 40, device=device)
    with compiled_ahead(lambda: _scaled(y)):
        assert torch.equal(y, torch.ones_like(y))
        assert torch.equal(_scaled(y), torch.full_like(y, 3))
    assert torch.equal(_scaled(y), torch.full_like(y, 9))


def test_in_a_rehearsal_a_thread_compiles_and_else_who_asks() -> None:
    threads = []
    waiting = begun(lambda: threads.append(current_thread()))
    assert not threads
    waiting()
    with compiled_ahead(lambda: begun(lambda: threads.append(current_thread()))):
        pass
    assert [thread is main_thread() for thread in threads] == [True, False]


def test_what_a_thread_could_not_compile_is_told_to_who_launches() -> None:
    def compilation() -> None:
        raise RuntimeError("no such instruction")

    begun_with = []
    with compiled_ahead(lambda: begun_with.append(begun(compilation))):
        pass
    with pytest.raises(RuntimeError, match="no such instruction"):
        begun_with[0]()


def test_a_rehearsal_that_fails_is_over() -> None:
    with pytest.raises(ZeroDivisionError), compiled_ahead(lambda: 1 / 0):
        pass
    assert not is_rehearsal()


@needs_nvrtc
def test_machine_code_is_there_when_a_rehearsal_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels.nvrtc import compile_cubin

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with compiled_ahead(lambda: begun(lambda: compile_cubin("nf4_unpack.cu", {"BF16": 1}, "sm_80"))):
        pass
    assert len(list((tmp_path / "patchbay").iterdir())) == 1
