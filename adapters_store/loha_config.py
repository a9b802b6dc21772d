"""LoHa (FedPara, arXiv 2108.06098) as peft up to 0.21 writes it: the elementwise product of two low-rank matrices."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from adapters_store.adapter_config import Alpha, LayeredConfig, ManyPatterns, Pattern, Rank
from adapters_store.adapter_contents import SQRT_LARGEST, AdapterContents, TensorRule
from adapters_store.base_spec import LINEARS, LOHA_A, LOHA_B, BaseSpec, tensor_name
from adapters_store.module_matching import pattern_lookup


class LoHaConfig(LayeredConfig):
    """y += alpha / r ((W1a W1b) * (W2a W2b)) x: as plain LoRA of rank r^2, exactly, by the rows' products."""

    kind = "LOHA"
    inert: ClassVar = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"})

    r: Rank = 8
    alpha: Alpha = 8.0
    exclude_modules: ManyPatterns | Pattern | None = None
    rank_pattern: Annotated[dict[Pattern, Rank], Field(max_length=4096, default_factory=dict)]
    alpha_pattern: Annotated[dict[Pattern, Alpha], Field(max_length=4096, default_factory=dict)]

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths = AdapterContents(), base.paths(LINEARS)
        rank_of = pattern_lookup(self.rank_pattern, "rank_pattern", self.r)
        alpha_of = pattern_lookup(self.alpha_pattern, "alpha_pattern", self.alpha)
        for path in self.chosen(base, self.exclude_modules):
            (layer, linear), rank = paths[path], rank_of(path)
            out_features, in_features = base.linears[linear]
            scale = alpha_of(path) / rank
            contents.add_delta(layer, linear, rank * rank, scale)
            for name in LOHA_A:
                contents.tensors[tensor_name(layer, linear, name)] = TensorRule((rank, in_features), most=SQRT_LARGEST)
            for name in LOHA_B:
                most = SQRT_LARGEST / math.sqrt(max(1.0, abs(scale)))
                contents.tensors[tensor_name(layer, linear, name)] = TensorRule((out_features, rank), most=most)
        contents.add_saved_modules(base, self.modules_to_save)
        return contents

    def rank_field(self, rank: int) -> str:
        return "r" if rank == self.r**2 else "rank_pattern"
