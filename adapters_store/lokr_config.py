"""LoKr (arXiv 2309.14859) as peft up to 0.21 writes it: the Kronecker product of two small matrices."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Final

from pydantic import Field, StrictBool, StrictInt

from adapters_store.adapter_config import Alpha, LayeredConfig, ManyPatterns, Pattern, Rank
from adapters_store.adapter_contents import AdapterContents, TensorRule
from adapters_store.base_spec import LINEARS, LOKR_FACTORS, BaseSpec, tensor_name
from adapters_store.manifest import KroneckerSplit
from adapters_store.module_matching import pattern_lookup

_LARGEST: Final = 1e6  # products of four such, two summed over any rank and times any alpha / r, are finite in fp32


class LoKrConfig(LayeredConfig):
    """y += alpha / r kron(w1, w2) x: as plain LoRA of rank(w1) rank(w2), or the best of the rank that is allowed."""

    kind = "LOKR"
    inert: ClassVar = frozenset(
        {"rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "init_weights"}
    )

    r: Rank = 8
    alpha: Alpha = 8.0
    decompose_both: StrictBool = False
    decompose_factor: Annotated[StrictInt, Field(ge=-1, le=1 << 16)] = -1
    exclude_modules: ManyPatterns | Pattern | None = None
    rank_pattern: Annotated[dict[Pattern, Rank], Field(max_length=4096, default_factory=dict)]
    alpha_pattern: Annotated[dict[Pattern, Alpha], Field(max_length=4096, default_factory=dict)]

    def contents(self, base: BaseSpec) -> AdapterContents:
        split = KroneckerSplit(decompose_both=self.decompose_both, decompose_factor=self.decompose_factor)
        contents, paths = AdapterContents(kronecker=split), base.paths(LINEARS)
        rank_of = pattern_lookup(self.rank_pattern, "rank_pattern", self.r)
        alpha_of = pattern_lookup(self.alpha_pattern, "alpha_pattern", self.alpha)
        for path in self.chosen(base, self.exclude_modules):
            (layer, linear), r = paths[path], rank_of(path)
            factors = self._factors(*base.linears[linear], r)
            rank = math.prod(min(map(min, parts.values())) for parts in factors)
            contents.add_delta(layer, linear, rank, alpha_of(path) / r, peft_rank=r, exact_rank=rank)
            for name, shape in (part for parts in factors for part in parts.items()):
                contents.tensors[tensor_name(layer, linear, name)] = TensorRule(shape, most=_LARGEST)
        contents.add_saved_modules(base, self.modules_to_save)
        return contents

    def _factors(self, out_features: int, in_features: int, r: int) -> list[dict[str, tuple[int, int]]]:
        """The tensors of both: one, or two of rank r where that is less than half of its longer side."""
        sides = zip(self._divisors(out_features), self._divisors(in_features), strict=True)
        may_split = (self.decompose_both, True)
        return [
            {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}
            if may and 2 * r < max(rows, columns)
            else {name: (rows, columns)}
            for name, (rows, columns), may in zip(LOKR_FACTORS, sides, may_split, strict=True)
        ]

    def _divisors(self, width: int) -> tuple[int, int]:
        """`decompose_factor` where it divides, else the largest divisor up to it (-1: any) and the root; the rest."""
        factor = self.decompose_factor
        if factor > 0 and width % factor == 0:
            return factor, width // factor
        most = math.isqrt(width) if factor == -1 else max(1, min(factor, math.isqrt(width)))
        divisor = next(number for number in range(most, 0, -1) if width % number == 0)
        return divisor, width // divisor
