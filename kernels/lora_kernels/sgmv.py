"""Segmented low-rank products, y += B (A x) with each row's own adapter (Punica's SGMV, arXiv 2310.18547).

Adapter weights lie in pages of PAGE_RANK ranks: a_pages [num_pages, num_slices, PAGE_RANK, in] and
b_pages [num_pages, PAGE_RANK, out_total], the slices being the linears fused into one (q, k, v or gate, up). A page
whose rank is not full is zero beyond it. B carries the LoRA scale already.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.segments import PAGE_RANK, BatchedSegments, LoRASegments

Activation = Literal["none", "relu", "gelu", "silu", "tanh"]
"""What bottleneck adapters put between A and B (gelu: the exact one)."""
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda h: h,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def sgmv_shrink_ref(x: Tensor, a_pages: Tensor, segments: LoRASegments, a_scales: Tensor | None = None) -> Tensor:
    """`sgmv_shrink` in plain PyTorch: one batched product for the short segments, one product for each long one."""
    if a_scales is not None:
        a_pages = a_pages * a_scales[..., None]
    num_slices, ranks = a_pages.shape[1], segments.max_pages * PAGE_RANK
    batched = segments.batched
    if batched is not None:
        h = _shrink_batched(x, a_pages, batched)
        if batched.tokens is None:
            return h.unsqueeze(0)
    out = x.new_zeros((x.shape[0], num_slices, ranks), dtype=torch.float32)
    if batched is not None and batched.tokens is not None:
        out.index_copy_(0, batched.tokens, h)
    for tokens, pages in segments.long:
        a = a_pages.index_select(0, pages).float().transpose(0, 1).flatten(0, 2)  # [slices * own ranks, in]
        h = (x.index_select(0, tokens).float() @ a.T).view(len(tokens), num_slices, -1)
        out[tokens, :, : h.shape[2]] = h
    return out.unsqueeze(0)


def sgmv_expand_ref(
    h: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    y: Tensor,
    slice_widths: tuple[int, ...],
    b_scales: Tensor | None = None,
    bias_pages: Tensor | None = None,
    activation: Activation = "none",
) -> None:
    """`sgmv_expand` in plain PyTorch."""
    h = h[0] if len(h) == 1 else h.sum(0)
    if b_scales is not None or bias_pages is not None or activation != "none":
        h = _between(h, segments, b_scales, bias_pages, activation)
    if b_scales is not None:
        b_pages = b_pages.to(y.dtype)
    batched = segments.batched
    if batched is not None:
        delta = _expand_batched(h, b_pages, batched, slice_widths)
        _add_rows(y, batched.tokens, delta)
    for tokens, pages in segments.long:
        b = b_pages.index_select(0, pages).flatten(0, 1)  # [own ranks, out_total]
        own = h.index_select(0, tokens)[:, :, : b.shape[0]].to(b.dtype).float()
        parts = [own[:, s] @ part.float() for s, part in enumerate(b.split_with_sizes(slice_widths, 1))]
        _add_rows(y, tokens, torch.cat(parts, 1))


def sgmv_shrink(x: Tensor, a_pages: Tensor, segments: LoRASegments, a_scales: Tensor | None = None) -> Tensor:
    """h = A x for each row with its own adapter's A.

    x: [num_tokens, in] fp32, bf16 or fp16. a_pages: [num_pages, num_slices, PAGE_RANK, in], a float dtype, or int8 with
    a_scales fp32 [num_pages, num_slices, PAGE_RANK]. Returns fp32 [num_planes, num_tokens, num_slices, max_pages *
    PAGE_RANK], whose sum over the planes is h: a row's own pages first; what lies beyond them, and in rows of the bare
    base, is undefined. The planes make the sum over the inputs parallel, and the same in every run. Triton on a GPU,
    `sgmv_shrink_ref` elsewhere, which has one plane.
    """
    if x.is_cuda:
        from lora_kernels.triton_shrink import sgmv_shrink_triton

        return sgmv_shrink_triton(x, a_pages, segments, a_scales)
    return sgmv_shrink_ref(x, a_pages, segments, a_scales)


def sgmv_expand(
    h: Tensor,
    b_pages: Tensor,
    segments: LoRASegments,
    y: Tensor,
    slice_widths: tuple[int, ...],
    b_scales: Tensor | None = None,
    bias_pages: Tensor | None = None,
    activation: Activation = "none",
) -> None:
    """y += B f(h + bias) in place, for each row with its own adapter's B; rows of the bare base are not touched.

    h: as `sgmv_shrink` returns it; f(h + bias) is rounded to b_pages' dtype (y's, where that is int8) before the
    product, which accumulates in fp32. b_pages: [num_pages, PAGE_RANK, out_total], a float dtype, or int8 with b_scales
    fp32 [num_pages, num_slices, PAGE_RANK]. bias_pages: [num_pages, num_slices, PAGE_RANK] or None. y: [num_tokens,
    out_total] fp32, bf16 or fp16, rows contiguous; the columns of slice s, `slice_widths[s]` of them, use h[:, :, s].
    Deterministic: no atomics.
    """
    if y.is_cuda:
        from lora_kernels.triton_expand import sgmv_expand_triton

        sgmv_expand_triton(h, b_pages, segments, y, slice_widths, b_scales, bias_pages, activation)
    else:
        sgmv_expand_ref(h, b_pages, segments, y, slice_widths, b_scales, bias_pages, activation)


def _between(
    h: Tensor,
    segments: LoRASegments,
    b_scales: Tensor | None,
    bias_pages: Tensor | None,
    activation: Activation,
) -> Tensor:
    """f(h + bias) times the scales of B's ranks, each row with its own adapter's."""
    h = h.clone()
    for segment in segments.segments:
        tokens, pages = torch.from_numpy(segment.tokens), torch.tensor(segment.pages.ids)
        ranks = len(segment.pages) * PAGE_RANK
        own = h[tokens, :, :ranks]  # [n, num_slices, own ranks]
        if bias_pages is not None:
            own = own + bias_pages[pages].float().transpose(0, 1).flatten(1)
        own = _ACTIVATIONS[activation](own)
        if b_scales is not None:
            own = own * b_scales[pages].transpose(0, 1).flatten(1)
        h[tokens, :, :ranks] = own
    return h


def _shrink_batched(x: Tensor, a_pages: Tensor, batched: BatchedSegments) -> Tensor:
    """h fp32 [n, num_slices, max_pages * PAGE_RANK] of the batched tokens, ascending."""
    num_slices, in_features = a_pages.shape[1], x.shape[1]
    rows = (x if batched.in_order else x.index_select(0, batched.rows)).float()
    rows = rows.reshape(batched.num_segments, -1, in_features)
    a = _take_pages(a_pages, batched).float().view(batched.num_segments, -1, in_features)
    h = torch.bmm(rows, a.transpose(1, 2)).view(len(batched.rows), -1, num_slices, PAGE_RANK)
    h = h.transpose(1, 2).reshape(len(batched.rows), num_slices, -1)
    h = h if batched.in_order else h.index_select(0, batched.positions)
    return h if batched.rank_mask is None else h * batched.rank_mask


def _expand_batched(h: Tensor, b_pages: Tensor, batched: BatchedSegments, slice_widths: tuple[int, ...]) -> Tensor:
    """B h, fp32 [n, out_total] of the batched tokens, ascending.

    One product of every slice's h with all columns, of which each slice keeps its own: several times the arithmetic,
    yet half the time of a product a slice on 2 cores (32 rows, out_total 512).
    """
    num_slices, out_total = h.shape[1], b_pages.shape[2]
    b = _take_pages(b_pages, batched).float().view(batched.num_segments, -1, out_total)
    own = (
        (h if batched.in_order else h.index_select(0, batched.rows))
        .to(b_pages.dtype)
        .float()
        .reshape(batched.num_segments, -1, b.shape[1])
    )
    delta = torch.bmm(own, b).view(len(batched.rows), num_slices, out_total)
    if num_slices > 1:
        parts = zip(delta.unbind(1), slice_widths, _starts(slice_widths), strict=True)
        delta = torch.cat([part[:, start : start + width] for part, width, start in parts], 1)
    delta = delta.view(-1, out_total)
    return delta if batched.in_order else delta.index_select(0, batched.positions)


def _starts(widths: tuple[int, ...]) -> list[int]:
    return [sum(widths[:index]) for index in range(len(widths))]


def _take_pages(pool: Tensor, batched: BatchedSegments) -> Tensor:
    if batched.page_run is not None:
        return pool[batched.page_run[0] : batched.page_run[1]]
    return pool.index_select(0, batched.pages)


def _add_rows(y: Tensor, tokens: Tensor | None, delta: Tensor) -> None:
    if tokens is None:
        y.add_(delta)
    else:
        y.index_copy_(0, tokens, (y.index_select(0, tokens) + delta).to(y.dtype))
