"""DeLoRA (arXiv 2503.18225) as peft up to 0.21 writes it: ranks of norm 1 and one strength for a linear."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from adapters_store.adapter_config import LayeredConfig, ManyPatterns, Pattern, Rank
from adapters_store.adapter_contents import AdapterContents, TensorRule
from adapters_store.base_spec import LINEARS, BaseSpec, tensor_name
from adapters_store.module_matching import pattern_lookup

_LARGEST: Final = 1e17  # the product of two such over the smallest norm, 1e-4, is finite in fp32


class DeLoRAConfig(LayeredConfig):
    """y += lambda / r B diag(1 / (|A_i| |B_i|)) A (w_norm * x); w_norm, norms of the base's columns, is saved."""

    kind = "DELORA"
    inert: ClassVar = frozenset({"delora_lambda", "lambda_pattern", "module_dropout", "init_weights"})

    r: Rank = 8
    bias: Literal["none", "all", "delora_only"] = "none"
    exclude_modules: ManyPatterns | Pattern | None = None
    rank_pattern: Annotated[dict[Pattern, Rank], Field(max_length=4096, default_factory=dict)]

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths = AdapterContents(), base.paths(LINEARS)
        rank_of = pattern_lookup(self.rank_pattern, "rank_pattern", self.r)
        chosen = self.chosen(base, self.exclude_modules)
        for path in chosen:
            (layer, linear), rank = paths[path], rank_of(path)
            out_features, in_features = base.linears[linear]
            contents.add_delta(layer, linear, rank, 1.0)
            contents.tensors |= {
                tensor_name(layer, linear, "delora_A"): TensorRule((rank, in_features)),
                tensor_name(layer, linear, "delora_B"): TensorRule((out_features, rank)),
                tensor_name(layer, linear, "delora_lambda"): TensorRule((1,), most=_LARGEST),
                tensor_name(layer, linear, "delora_w_norm"): TensorRule((in_features,), most=_LARGEST),
            }
        contents.add_own_biases(base, self.bias, dict.fromkeys(chosen))
        contents.add_saved_modules(base, self.modules_to_save)
        return contents

    def rank_field(self, rank: int) -> str:
        return "r" if rank == self.r else "rank_pattern"
