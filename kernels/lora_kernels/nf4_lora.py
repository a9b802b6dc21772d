"""The product of an NF4 base and its adapters: y = x W^T + b + B (A x), each row with its own adapter's A and B."""

from torch import Tensor

from lora_kernels.nf4 import NF4Tiles, nf4_matmul, nf4_matmul_ref
from lora_kernels.segments import FEW_PAGES, SHORT_STEP, LoRASegments
from lora_kernels.sgmv import sgmv_expand, sgmv_expand_ref, sgmv_shrink, sgmv_shrink_ref

FEWEST_ROWS, FEWEST_PAGES = 8, 4  # nf4_few_adapters.cuh's TOKENS and MOST_PAGES
_FEW_ROWS = 16
_MOST_HIDDEN_PAGES = 128


def nf4_lora_matmul_ref(
    x: Tensor,
    weight: NF4Tiles,
    bias: Tensor | None,
    a_pages: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    slice_widths: tuple[int, ...],
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
) -> Tensor:
    """`nf4_lora_matmul` in plain PyTorch."""
    y = nf4_matmul_ref(x, weight, bias)
    sgmv_expand_ref(sgmv_shrink_ref(x, a_pages, segments, a_scales), b_pages, segments, y, slice_widths, b_scales)
    return y


def nf4_lora_matmul(
    x: Tensor,
    weight: NF4Tiles,
    bias: Tensor | None,
    a_pages: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    slice_widths: tuple[int, ...],
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b + B (A x) in x's dtype [num_tokens, out].

    x, weight, bias: `nf4_matmul`'s. The others: `sgmv_shrink`'s and `sgmv_expand`'s, pages in x's dtype or int8; every
    number of b_pages is finite. On Hopper A x is computed beside the base's product; few pages are added by the same
    launch, as columns [x | A x] [W | B]^T or behind a tile's own, and rounded once, others by an expand behind it.
    Elsewhere: the base's product, a shrink and an expand.
    """
    if x.is_cuda:
        from lora_kernels.cuda_nf4_lora import nf4_lora_matmul_cuda

        fused = nf4_lora_matmul_cuda(x, weight, bias, a_pages, b_pages, segments, slice_widths, a_scales, b_scales)
        if fused is not None:
            return fused
    y = nf4_matmul(x, weight, bias)
    sgmv_expand(sgmv_shrink(x, a_pages, segments, a_scales), b_pages, segments, y, slice_widths, b_scales)
    return y


def most_fused_pages(num_tokens: int) -> int:
    """Up to how many pages the base's own launch multiplies; measured on one H200, at Llama-3.1-8B's shapes.

    As columns every page is there for all rows, and up to 8 rows B's are read behind a tile's own: more pages have a
    kernel of their own.
    """
    if num_tokens <= FEWEST_ROWS:
        return FEWEST_PAGES
    return FEW_PAGES // 2 if num_tokens <= _FEW_ROWS or num_tokens > SHORT_STEP else FEW_PAGES


def most_hidden_pages(num_tokens: int) -> int:
    """Up to how many pages A x may be computed beside the base's product; measured likewise.

    At 128 it gained from 64 to 256 rows, and at 64 3 % at 512; at 160 it lost 8 % at 160 rows and gained 6 % at 256.
    """
    return _MOST_HIDDEN_PAGES if _FEW_ROWS < num_tokens <= SHORT_STEP // 2 else 0


def hides_shrink(num_tokens: int, most_pages: int, out_features: int, num_slices: int) -> bool:
    """Whether A x of so many pages is computed beside the base's product, rather than by a launch of its own.

    Measured likewise: with a page a row it gained for all linears, with two at 64 rows for all but q, k and v, with
    more for gate and up alone.
    """
    fits = num_slices * most_pages * 2_000 <= out_features * num_tokens
    return fits and most_pages <= most_hidden_pages(num_tokens)


def page_limits(num_tokens: int, most_pages: int) -> list[int]:
    """The numbers of pages, ascending up to `most_pages`, up to which steps of so many rows run alike.

    Among them, where A x is hidden, a page a row, as many as of adapters of rank 16, and half of what may be hidden:
    the warps that compute it share out as many pages as there may be.
    """
    fused, hidden = most_fused_pages(num_tokens), most_hidden_pages(num_tokens)
    limits = (fused, min(num_tokens, hidden // 2), min(num_tokens, hidden), hidden, most_pages)
    return sorted({min(limit, most_pages) for limit in limits} - {0})
