"""The product of an NF4 base and its adapters: y = x W^T + b + B (A x), each row with its own adapter's A and B."""

from torch import Tensor

from lora_kernels.nf4 import NF4Tiles, nf4_matmul, nf4_matmul_ref
from lora_kernels.segments import FEW_PAGES, SHORT_STEP, LoRASegments
from lora_kernels.sgmv import sgmv_expand, sgmv_expand_ref, sgmv_shrink, sgmv_shrink_ref


def nf4_lora_matmul_ref(
    x: Tensor,
    weight: NF4Tiles,
    bias: Tensor | None,
    a_pages: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    slice_widths: tuple[int, ...],
) -> Tensor:
    """`nf4_lora_matmul` in plain PyTorch."""
    y = nf4_matmul_ref(x, weight, bias)
    sgmv_expand_ref(sgmv_shrink_ref(x, a_pages, segments), b_pages, segments, y, slice_widths)
    return y


def nf4_lora_matmul(
    x: Tensor,
    weight: NF4Tiles,
    bias: Tensor | None,
    a_pages: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    slice_widths: tuple[int, ...],
) -> Tensor:
    """y = x W^T + b + B (A x) in x's dtype [num_tokens, out].

    x, weight, bias: `nf4_matmul`'s. a_pages, b_pages, segments, slice_widths: `sgmv_shrink`'s and `sgmv_expand`'s, in
    x's dtype; every number of b_pages is finite. On Hopper a step of few pages is one product, [x | A x] [W | B]^T,
    which rounds once; elsewhere the base's product, a shrink and an expand.
    """
    if x.is_cuda:
        from lora_kernels.cuda_nf4_lora import nf4_lora_matmul_cuda

        fused = nf4_lora_matmul_cuda(x, weight, bias, a_pages, b_pages, segments, slice_widths)
        if fused is not None:
            return fused
    y = nf4_matmul(x, weight, bias)
    sgmv_expand(sgmv_shrink(x, a_pages, segments), b_pages, segments, y, slice_widths)
    return y


def fuses(num_tokens: int, most_pages: int) -> bool:
    """Whether one product for the base and so many pages is faster than two, where it can be had.

    Measured on one H200, at rank 16 and Llama-3.1-8B's shapes: every page is columns for all rows, and at 16 rows and
    fewer there is no time in which to hide A x.
    """
    return num_tokens > 16 and most_pages <= (FEW_PAGES if num_tokens <= SHORT_STEP else FEW_PAGES // 2)
