"""MiSS (arXiv 2409.15371) as peft up to 0.21 writes it: one trained matrix over sums of the inputs."""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal, Self

from pydantic import StrictBool

from adapters_store.adapter_config import LayeredConfig, ManyPatterns, Pattern, Rank
from adapters_store.adapter_contents import AdapterContents, TensorRule
from adapters_store.base_spec import LINEARS, MISS_BLOCK, BaseSpec, tensor_name
from adapters_store.module_matching import refuse
from adapters_store.strict_json import shown

_BAT: Final = (
    "Bat multiplies blocks of the base's weights: what that adds is of full rank; train with init_weights=true or mini"
)


class MiSSConfig(LayeredConfig):
    """y_i += sum_j block_ji s_j, with s_j the sum of those inputs whose number leaves j when divided by r.

    With "mini" a block has `mini_r` columns, which are repeated over the outputs: i is then what is left of its number.
    """

    kind = "MISS"
    inert: ClassVar = frozenset({"miss_dropout"})

    r: Rank = 64
    mini_r: Rank = 1
    init_weights: StrictBool | Literal["mini"] = True
    bias: Literal["none", "all", "MiSS_only"] = "none"
    exclude_modules: ManyPatterns | Pattern | None = None

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Self:
        init = raw.get("init_weights")
        if init is not None and not isinstance(init, bool) and init != "mini":
            reason = _BAT if init == "bat" else f"{shown(str(init))} is none of those that peft has"
            raise refuse("init_weights", reason)
        if init != "mini":
            raw.pop("mini_r", None)  # peft writes it, and does not read it
        return super().parse(raw)

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths = AdapterContents(), base.paths(LINEARS)
        chosen = self.chosen(base, self.exclude_modules)
        for layer, linear in (paths[path] for path in chosen):
            out_features, in_features = base.linears[linear]
            rank, width, more = self.r, out_features, {"in_features": in_features}
            if self.init_weights == "mini":
                self._check_repeats(linear, out_features)
                # Of the block's two sides the smaller is the delta's rank.
                rank, width = min(self.r, self.mini_r), self.mini_r
                more |= {"out_features": out_features, "peft_rank": self.r, "mini_r": self.mini_r}
            contents.add_delta(layer, linear, rank, 1.0, **more)
            contents.tensors[tensor_name(layer, linear, MISS_BLOCK)] = TensorRule((self.r, width))
        contents.add_own_biases(base, self.bias, dict.fromkeys(chosen))
        contents.add_saved_modules(base, self.modules_to_save)
        return contents

    def _check_repeats(self, linear: str, out_features: int) -> None:
        if out_features % self.mini_r:
            reason = f"is {self.mini_r}, which does not divide the {out_features} outputs of {linear}, as peft asks for"
            raise refuse("mini_r", reason)
