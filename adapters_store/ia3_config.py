"""IA3 (arXiv 2205.05638) as peft up to 0.21 writes it."""

from __future__ import annotations

from typing import ClassVar, Final

from adapters_store.adapter_config import ManyPatterns, Pattern, TargetedConfig
from adapters_store.adapter_contents import AdapterContents
from adapters_store.base_spec import LINEARS, BaseSpec
from adapters_store.module_matching import choose, compile_pattern, refuse

_TENSOR: Final = "ia3_l"


class IA3Config(TargetedConfig):
    """A vector on each linear: of its outputs, or where it is one of `feedforward_modules` of its inputs."""

    kind = "IA3"
    inert: ClassVar = frozenset({"init_ia3_weights"})

    feedforward_modules: ManyPatterns | Pattern
    exclude_modules: ManyPatterns | Pattern | None = None

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths = AdapterContents(), base.paths(LINEARS)
        for path in choose(paths, self.target_modules, exclude=self.exclude_modules):
            layer, linear = paths[path]
            out_features, in_features = base.linears[linear]
            if not self._scales_inputs(path):
                contents.add_vector(layer, linear, "out_scale", _TENSOR, (out_features, 1))
            elif linear == "down_proj":
                contents.add_vector(layer, linear, "in_scale", _TENSOR, (1, in_features))
            else:
                reason = f"the inputs of {linear} are not scaled in this release; only those of down_proj are"
                raise refuse("feedforward_modules", reason)
        contents.add_saved_modules(base, self.modules_to_save)
        return contents

    def _scales_inputs(self, path: str) -> bool:
        modules = self.feedforward_modules
        if isinstance(modules, str):
            return compile_pattern(modules, "feedforward_modules").fullmatch(path) is not None
        return path.endswith(modules)  # peft's own rule: the end of a part will do
