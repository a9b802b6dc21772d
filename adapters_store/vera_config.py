"""VeRA (arXiv 2310.11454) as peft up to 0.21 writes it: two matrices shared by all linears, two vectors on each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from numpy.random import RandomState
from pydantic import Field, StrictBool, StrictInt

from adapters_store.adapter_config import LayeredConfig, Rank
from adapters_store.adapter_contents import SQRT_LARGEST, AdapterContents, TensorRule
from adapters_store.base_spec import LINEARS, VERA_A, VERA_B, VERA_LAMBDA_B, VERA_LAMBDA_D, BaseSpec, tensor_name


class VeRAConfig(LayeredConfig):
    """y += lambda_b * B (lambda_d * A x), with the parts of A and B that a linear's widths need."""

    kind = "VERA"
    inert: ClassVar = frozenset({"vera_dropout", "d_initial", "init_weights"})

    r: Rank = 256
    projection_prng_key: Annotated[StrictInt, Field(ge=0, lt=1 << 63)] = 0
    save_projection: StrictBool = True
    bias: Literal["none", "all", "vera_only"] = "none"

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths = AdapterContents(), base.paths(LINEARS)
        targets = {path: paths[path] for path in self.chosen(base)}
        for layer, linear in targets.values():
            contents.add_delta(layer, linear, self.r, 1.0, in_features=base.linears[linear][1])
            lambda_b, lambda_d = (tensor_name(layer, linear, name) for name in (VERA_LAMBDA_B, VERA_LAMBDA_D))
            contents.tensors[lambda_b] = TensorRule((base.linears[linear][0],), most=SQRT_LARGEST)
            contents.tensors[lambda_d] = TensorRule((self.r,), most=SQRT_LARGEST)
        shapes = self._projections(base, {linear for _, linear in targets.values()})
        if self.save_projection:
            contents.tensors |= {name: TensorRule(shape, most=SQRT_LARGEST) for name, shape in shapes.items()}
        else:
            contents.make = partial(draw_projections, shapes, self.projection_prng_key)
        contents.add_own_biases(base, self.bias, targets)
        contents.add_saved_modules(base, self.modules_to_save)
        return contents

    def _projections(self, base: BaseSpec, linears: set[str]) -> dict[str, tuple[int, int]]:
        """Shapes of A and B: as wide as the widest of the linears."""
        out_features, in_features = (max(base.linears[linear][side] for linear in linears) for side in (0, 1))
        return {VERA_A: (self.r, in_features), VERA_B: (out_features, self.r)}


def draw_projections(shapes: Mapping[str, tuple[int, int]], key: int) -> dict[str, npt.NDArray[np.float32]]:
    """The matrices that peft draws on a CPU when a file leaves them out, to the bit.

    Kaiming's uniform distribution from torch's generator: MT19937 as NumPy's frozen `RandomState` has it, 24 bits of
    each word, in double precision, rounded once.
    """
    generator = RandomState(key & 0xFFFFFFFF)
    return {name: _draw(generator, shape) for name, shape in shapes.items()}


def _draw(generator: RandomState, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    low, high = float(np.float32(-bound)), float(np.float32(bound))
    words = np.frombuffer(generator.bytes(4 * math.prod(shape)), "<u4") & 0xFFFFFF
    return (words * 2.0**-24 * (high - low) + low).astype(np.float32).reshape(shape)
