"""BEFT (arXiv 2509.15974), trained biases on linears that may have none, as peft up to 0.21 writes it."""

from __future__ import annotations

from typing import ClassVar

from adapters_store.adapter_config import TargetedConfig
from adapters_store.adapter_contents import AdapterContents
from adapters_store.base_spec import LINEARS, BaseSpec
from adapters_store.module_matching import choose


class BEFTConfig(TargetedConfig):
    """A vector that is added to each linear's outputs."""

    kind = "BEFT"
    inert: ClassVar = frozenset({"init_weights"})

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths = AdapterContents(), base.paths(LINEARS)
        for path in choose(paths, self.target_modules):
            layer, linear = paths[path]
            contents.add_vector(layer, linear, "bias", "beft_bias", (1, base.linears[linear][0]))
        contents.add_saved_modules(base, self.modules_to_save)
        return contents
