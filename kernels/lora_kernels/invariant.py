"""Products and attention whose rows do not depend on each other, bit for bit ("batch invariance").

Elsewhere the number of rows, and what else a step runs, decides which kernel runs and how it cuts its sums. Here each
output is summed in one order: fixed tiles, cuts that depend on the weight or on the row's own context alone. See
Thinking Machines, "Defeating Nondeterminism in LLM Inference" (2025). Adapters do so too when their routing is made for
it (`LoRASegments.build`); norm, rotary and gate always do.

On a CPU these are the plain paths, which promise that for one row at a time only: PyTorch's products there depend on
the number of rows.
"""

import torch.nn.functional as F
from torch import Tensor

from lora_kernels.attention import AttentionMetadata, paged_attention_ref
from lora_kernels.layer_cache import LayerCache
from lora_kernels.nf4 import NF4Tiles, nf4_matmul_ref


def invariant_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b, accumulated in fp32.

    x: [num_tokens, in], weight: [out, in], bias: [out] or None, all fp32, bf16 or fp16, rows of x and of the weight
    contiguous. Returns [num_tokens, out] in x's dtype. Triton on a GPU, PyTorch's product elsewhere.
    """
    if x.is_cuda:
        from lora_kernels.triton_invariant_matmul import invariant_matmul_triton

        return invariant_matmul_triton(x, weight, bias)
    return F.linear(x, weight, bias)


def invariant_nf4_matmul(x: Tensor, weight: NF4Tiles, bias: Tensor | None = None) -> Tensor:
    """`lora_kernels.nf4.nf4_matmul`; its kernels on a GPU, with plans that differ in nothing that a sum shows."""
    if x.is_cuda:
        from lora_kernels.cuda_nf4 import invariant_nf4_matmul_cuda

        return invariant_nf4_matmul_cuda(x, weight, bias)
    return nf4_matmul_ref(x, weight, bias)


def invariant_attention(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, scale: float, sliding_window: int | None
) -> Tensor:
    """`lora_kernels.attention.paged_attention`, where a token is the same in a chunk of a prompt and as a decode row.

    Triton on a GPU, for pages in q's dtype; the plain path elsewhere.
    """
    if q.is_cuda:
        from lora_kernels.triton_invariant_attention import invariant_attention_triton

        return invariant_attention_triton(q, cache, meta, scale, sliding_window)
    return paged_attention_ref(q, cache, meta, scale, sliding_window)
