"""The gate of a feed-forward block."""

import torch.nn.functional as F
from torch import Tensor

from lora_kernels.vectors import SlotVectors, scale_and_shift


def silu_mul_ref(gate_up: Tensor, vectors: SlotVectors | None = None) -> Tensor:
    """`silu_mul` in plain PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    y = F.silu(gate).mul_(up)
    return y if vectors is None else scale_and_shift(y.float(), vectors).to(y.dtype)


def silu_mul(gate_up: Tensor, vectors: SlotVectors | None = None) -> Tensor:
    """silu(gate) * up (SwiGLU, arXiv 2002.05202), then each row's own scale and bias; in fp32 and rounded once.

    gate_up: [num_tokens, 2 * width] fp32, bf16 or fp16, rows contiguous, the gate first. IA3 (arXiv 2205.05638) scales
    the result. Returns [num_tokens, width] in its dtype. Triton on a GPU, `silu_mul_ref` elsewhere.
    """
    if gate_up.is_cuda:
        from lora_kernels.triton_activation import silu_mul_triton

        return silu_mul_triton(gate_up, vectors)
    return silu_mul_ref(gate_up, vectors)
