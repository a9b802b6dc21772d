"""Vectors that each row takes by its adapter's slot: the scales of IA3 and DoRA, the biases of BitFit, tuned norms."""

from typing import NamedTuple

import torch
from torch import Tensor


class SlotVectors(NamedTuple):
    """A scale and a bias a slot, either of them optional; the rows of the bare base take none.

    token_slots: int32 [num_tokens], -1 for the bare base. scale, bias: [num_slots, width], contiguous, any float dtype.
    """

    token_slots: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None


NO_VECTORS = (None, None, None)


def apply_vectors_ref(y: Tensor, vectors: SlotVectors) -> None:
    """`apply_vectors` in plain PyTorch."""
    y.copy_(scale_and_shift(y.float(), vectors))


def apply_vectors(y: Tensor, vectors: SlotVectors) -> None:
    """y = y * scale[slot] + bias[slot] in place, in fp32 and rounded once; rows of the bare base are not touched.

    y: [num_tokens, width] fp32, bf16 or fp16, rows contiguous: a linear's output. For DoRA (arXiv 2402.09353) on
    y = (W + B A) x + b the scale is its magnitude over the norms of W + B A, and the bias (1 - scale) b.
    Triton on a GPU, `apply_vectors_ref` elsewhere.
    """
    if y.is_cuda:
        from lora_kernels.triton_vectors import apply_vectors_triton

        apply_vectors_triton(y, vectors)
    else:
        apply_vectors_ref(y, vectors)


def scale_and_shift(y: Tensor, vectors: SlotVectors) -> Tensor:
    """y fp32 [num_tokens, width] -> the same with each row's own scale and bias."""
    if vectors.scale is not None:
        y = y * vectors_of_rows(vectors.scale, vectors.token_slots, 1.0)
    if vectors.bias is not None:
        y = y + vectors_of_rows(vectors.bias, vectors.token_slots, 0.0)
    return y


def vectors_of_rows(pool: Tensor, token_slots: Tensor, base: Tensor | float) -> Tensor:
    """fp32 [num_tokens, width]: each row's vector out of `pool`, `base` for the rows of the bare base."""
    own = pool.index_select(0, token_slots.clamp(min=0)).float()
    return torch.where(token_slots.unsqueeze(1) < 0, base, own)
