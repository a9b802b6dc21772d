"""Tensor trains (Oseledets, 2011), in which LoRETTA (arXiv 2402.11417) keeps its matrices."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from adapters_store.adapter_contents import TensorRule
from adapters_store.errors import AdapterInvalid
from adapters_store.file_names import CONFIG_FILE, WEIGHTS_FILE
from adapters_store.safetensors_header import TensorInfo

_MAX_FACTORS: Final = 16
_LARGEST: Final = 3e38  # finite in fp32 and bf16


@dataclass(frozen=True)
class TensorTrain:
    """A matrix of `size` numbers as factors [left, n, right], where each right is the next one's left.

    factors: their names but for the number. rank: left and right between two factors; at the ends they are 1. The n
    are the file's own, their product is `size`. scale: what the matrix is multiplied by.
    """

    factors: str
    size: int
    rank: int
    scale: float = 1.0

    def rules(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorRule]:
        """Of the factors that a file has. Raises `AdapterInvalid` where they do not make such a matrix."""
        names = factor_names(self.factors, tensors)
        if names[0] not in tensors:
            reason = f"is missing; {CONFIG_FILE} and the base call for it"
            raise AdapterInvalid(reason, file=WEIGHTS_FILE, field=names[0])
        sizes = [tensors[name].shape[1] if len(tensors[name].shape) == 3 else 1 for name in names]
        if math.prod(sizes) != self.size:
            reason = (
                f"the middle sizes of its factors multiply to {math.prod(sizes)}; the base and {CONFIG_FILE} need "
                f"{self.size}"
            )
            raise AdapterInvalid(reason, file=WEIGHTS_FILE, field=self.factors)
        ranks = [1, *[self.rank] * (len(names) - 1), 1]
        # A number of the matrix is a sum of so many products of one number of each factor.
        num_products = float(self.rank) ** (len(names) - 1)
        most = (_LARGEST / num_products / max(1.0, abs(self.scale))) ** (1 / len(names))
        return {names[i]: TensorRule((ranks[i], size, ranks[i + 1]), most=most) for i, size in enumerate(sizes)}


def factor_names(factors: str, names: Collection[str]) -> list[str]:
    """The names of a train's factors in their order: the first, and those after it that are among `names`."""
    first, *others = (f"{factors}.{number}" for number in range(_MAX_FACTORS))
    return [first, *takewhile(names.__contains__, others)]
