"""Where the kernels run: compiled on a GPU, or under Triton's interpreter on the CPU.

The interpreter cuts bf16 off where hardware rounds to nearest, so bf16 kernels are tested on a GPU only.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported


@pytest.fixture(
    scope="session", params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> str:
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
