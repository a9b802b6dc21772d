"""MiSS (arXiv 2409.15371) as peft up to 0.21 writes it: one trained matrix over sums of the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from adapters_store.adapter_config import LayeredConfig, ManyPatterns, Pattern, Rank
from adapters_store.adapter_contents import AdapterContents, TensorRule
from adapters_store.base_spec import LINEARS, MISS_BLOCK, BaseSpec, tensor_name
from adapters_store.module_matching import refuse
from adapters_store.strict_json import shown

_REASONS: Mapping[object, str] = {
    "bat": "Bat multiplies blocks of the base's weights: what that adds is of full rank; train with init_weights=true",
    "mini": "blocks that are repeated over the outputs are not served in this release; train with init_weights=true",
}


class MiSSConfig(LayeredConfig):
    """y += block^T s, with s_j the sum of those inputs whose number leaves j when divided by r."""

    kind = "MISS"
    inert: ClassVar = frozenset({"miss_dropout", "mini_r"})

    r: Rank = 64
    bias: Literal["none", "all", "MiSS_only"] = "none"
    exclude_modules: ManyPatterns | Pattern | None = None

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Self:
        init = raw.pop("init_weights", None)
        if init is not None and not isinstance(init, bool):
            text = shown(str(init))
            raise refuse("init_weights", _REASONS.get(text, f"{text} is none of those that peft has"))
        return super().parse(raw)

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths = AdapterContents(), base.paths(LINEARS)
        chosen = self.chosen(base, self.exclude_modules)
        for layer, linear in (paths[path] for path in chosen):
            out_features, in_features = base.linears[linear]
            contents.add_delta(layer, linear, self.r, 1.0, in_features=in_features)
            contents.tensors[tensor_name(layer, linear, MISS_BLOCK)] = TensorRule((self.r, out_features))
        contents.add_own_biases(base, self.bias, dict.fromkeys(chosen))
        contents.add_saved_modules(base, self.modules_to_save)
        return contents
