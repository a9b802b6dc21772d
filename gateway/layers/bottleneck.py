"""Bottleneck adapters at a block's output, or before gate and up (arXiv 1902.00751)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapters_store.bottleneck_layout import BottleneckPools
from adapters_store.manifest import BottleneckActivation, BottleneckReads, BottleneckSite
from lora_kernels.segments import LoRASegments
from lora_kernels.sgmv import sgmv_expand, sgmv_shrink


@dataclass(frozen=True)
class BottleneckRows:
    """The rows of a step whose adapters are computed alike at one site.

    tokens: int64 [n], which rows these are. first_pages: int64 [n], where their adapters' `up_bias` is.
    """

    site: BottleneckSite
    reads: BottleneckReads
    activation: BottleneckActivation
    segments: LoRASegments
    tokens: torch.Tensor
    first_pages: torch.Tensor

    def add(self, stream: torch.Tensor, block: torch.Tensor, pools: BottleneckPools) -> None:
        """block += up(activation(down(x))) in place for these rows, x as `reads` says; up has its scale already.

        stream, block: [num_tokens, hidden], the residual stream and what will be added to it; before gate or up both
        are what that linear reads. pools: of the layer.
        """
        x = {"block": block, "stream": stream}[self.reads] if self.reads != "sum" else stream + block
        h = sgmv_shrink(x, pools.down, self.segments)
        width = (block.shape[1],)
        sgmv_expand(h, pools.up, self.segments, block, width, bias_pages=pools.down_bias, activation=self.activation)
        block.index_add_(0, self.tokens, pools.up_bias.index_select(0, self.first_pages).to(block.dtype))
