"""Trained norms (LN tuning, arXiv 2312.11420) as peft up to 0.21 writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from adapters_store.adapter_config import ManyPatterns, Pattern, TargetedConfig
from adapters_store.adapter_contents import AdapterContents
from adapters_store.base_spec import NORMS, BaseSpec
from adapters_store.module_matching import choose, refuse


class LNTuningConfig(TargetedConfig):
    """A weight of its own for each norm over the hidden state."""

    kind = "LN_TUNING"
    refused: ClassVar[Mapping[str, str]] = {
        "modules_to_save": "norms are named by target_modules here; set modules_to_save=null"
    }

    exclude_modules: ManyPatterns | Pattern | None = None

    def contents(self, base: BaseSpec) -> AdapterContents:
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            raise refuse("target_modules", "linears have no norm to train; name norms")
        contents, paths = AdapterContents(), base.paths(NORMS)
        for path in choose(paths, self.target_modules, exclude=self.exclude_modules, what="norm"):
            layer, norm = paths[path]
            contents.add_vector(layer, norm, "norm", "ln_tuning_layers.weight", (base.hidden_size,))
        return contents
