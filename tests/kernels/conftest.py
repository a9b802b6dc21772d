"""Where the kernels run: compiled on a GPU, or under Triton's interpreter on the CPU.

The interpreter cuts bf16 off where hardware rounds to nearest, so bf16 kernels are tested on a GPU only.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported


@pytest.fixture(scope="session")
def exact_fp8() -> Iterator[None]:
    """PyTorch's rounding to fp8 in the interpreter, whose own loses the carry (1.98 becomes 1, not 2)."""
    if torch.cuda.is_available():
        yield
        return
    from triton.language import float8e4nv, float32
    from triton.runtime import interpreter

    truncate = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) != (float32, float8e4nv):
            return truncate(data, source, target, rounding)
        return torch.from_numpy(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


@pytest.fixture(scope="session")
def rows_alike() -> Iterator[None]:
    """Products of a tile in the interpreter whose rows have the same bits at any place, as on a GPU.

    Its own are the BLAS library's, which on some processors adds up the last rows of a tile in another order.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        if min(a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth) < 16:
            return multiply(self, a, b, d, *how)
        exact = np.einsum("...ij,...jk->...ik", a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(exact.astype(d.data.dtype) + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(scope="session")
def quick_interpreter() -> Iterator[None]:
    """The interpreter without two things that take more than half of its time and show nothing here.

    It prepares `triton.language` for every function that a kernel calls, though the kernel's launch has done so, and
    looks for overflow in each sum of whole numbers, to which no test's shape comes near.
    """
    if torch.cuda.is_available():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    prepare, builder = interpreter._patch_lang, interpreter.interpreter_builder
    prepared: dict[frozenset[int], Any] = {}

    def restore() -> None:
        while prepared:
            prepared.popitem()[1].restore()

    def prepare_once(function: Any) -> Any:
        modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if not any(modules <= others for others in prepared):
            prepared[modules] = prepare(function)
        return SimpleNamespace(restore=restore)  # which a launch calls at its end, and a function's call does not

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture(
    scope="session", params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest, exact_fp8: None, rows_alike: None, quick_interpreter: None) -> str:
    """The device of the kernel's arguments."""
    device = str(request.param)
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled, not interpreted")
    return device


@pytest.fixture(scope="session", params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    """The dtype of a kernel's activations and weights."""
    if device == "cpu" and request.param == torch.bfloat16:
        pytest.skip("the interpreter truncates bf16")
    return request.param


@pytest.fixture(scope="session")
def bits_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """`dtype` for tests of many interpreted runs, which one dtype shows as well as two."""
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("the interpreter is slow, and the order of its sums is fp32's")
    return dtype
