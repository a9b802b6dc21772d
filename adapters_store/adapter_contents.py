"""What an upload must hold: the tensors that its config and the base call for, and what they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from adapters_store.base_spec import EMBEDDINGS, LINEARS, NORMS, BaseSpec, module_path, tensor_name
from adapters_store.manifest import (
    Bottleneck,
    EmbeddingModule,
    KroneckerSplit,
    LoRADelta,
    TokenRows,
    VectorRole,
    VectorSite,
    VirtualTokens,
)
from adapters_store.module_matching import refuse

if TYPE_CHECKING:
    from adapters_store.tensor_train import TensorTrain

_MODULES: Final = (*LINEARS, *NORMS)
SQRT_LARGEST: Final = 1.8e19  # the product of two such is finite in fp32 and bf16


@dataclass(frozen=True)
class TensorRule:
    """A tensor's shape, and what keeps its values finite.

    factor: what they are multiplied by in their own dtype. most: the largest magnitude, where fp32 products are made.
    """

    shape: tuple[int, ...]
    factor: float = 1.0
    most: float = math.inf


@dataclass
class AdapterContents:
    """Filled by a kind's config: `tensors` by name, and what they make: deltas, vectors, rows and virtual tokens.

    make: makes those tensors that a file leaves out, fp32 by name, once the ranks are known to be allowed. trains: the
    matrices that are factors in the file, of `tensor_rank`; in how many, the file itself says.
    """

    tensors: dict[str, TensorRule] = field(default_factory=dict)
    make: Callable[[], Mapping[str, npt.NDArray[np.float32]]] = dict
    virtual_tokens: VirtualTokens | None = None
    token_rows: tuple[TokenRows, ...] = ()
    kronecker: KroneckerSplit | None = None
    trains: list[TensorTrain] = field(default_factory=list)
    tensor_rank: int | None = None
    bottleneck: Bottleneck | None = None
    _deltas: list[LoRADelta] = field(default_factory=list)
    _vectors: list[tuple[str, VectorRole, str, float, int]] = field(default_factory=list)

    def add_delta(self, layer: int, linear: str, rank: int, scale: float, **more: int) -> None:
        """A low-rank delta, whose tensors the caller adds; `more`: further fields of `LoRADelta`."""
        self._deltas.append(LoRADelta(linear=linear, rank=rank, scale=scale, layers=(layer,), **more))

    def cut_ranks(self, most: int) -> None:
        """Keep `most` ranks of each delta that may be served by fewer than it has."""
        self._deltas = [
            delta if delta.exact_rank is None else delta.model_copy(update={"rank": min(delta.exact_rank, most)})
            for delta in self._deltas
        ]

    def add_vector(
        self, layer: int, module: str, role: VectorRole, tensor: str, shape: tuple[int, ...], scale: float = 1.0
    ) -> None:
        """A vector and its tensor."""
        self.tensors[tensor_name(layer, module, tensor)] = TensorRule(shape, abs(scale))
        self._vectors.append((module, role, tensor, scale, layer))

    def add_own_biases(self, base: BaseSpec, which: str, targets: Mapping[str, object]) -> None:
        """The trained biases of the base that go with `bias`: those of all linears, or only of the targets' paths."""
        for path, (layer, linear) in base.paths(base.biased).items() if which != "none" else ():
            if which == "all" or path in targets:
                name = "base_layer.bias" if path in targets else "bias"
                self.add_vector(layer, linear, "own_bias", name, (base.linears[linear][0],))

    def add_token_rows(
        self, base: BaseSpec, modules: tuple[EmbeddingModule, ...], tensor: str, ids: tuple[int, ...] | None = None
    ) -> None:
        """Rows of `modules` and their tensor, which has its name from the first. ids: of which tokens; None: of all."""
        name, num_tokens = tensor_name(0, modules[0], tensor), base.vocab_size if ids is None else len(ids)
        self.tensors[name] = TensorRule((num_tokens, base.hidden_size))
        self.token_rows += (TokenRows(modules=modules, tensor=name, num_tokens=num_tokens, ids=ids),)

    def add_saved_modules(self, base: BaseSpec, modules_to_save: tuple[str, ...], *, tie: bool = False) -> None:
        """The norms and embeddings that `modules_to_save` names: those whose path ends so, as many do in "norm".

        tie: what the base ties is trained together, and saved twice.
        """
        _check_saved(base, modules_to_save)
        for path, (layer, norm) in base.paths(NORMS).items():
            if path.endswith(modules_to_save):
                self.add_vector(layer, norm, "norm", "weight", (base.hidden_size,))
        saved = [module for module in EMBEDDINGS if module_path(0, module).endswith(modules_to_save)]
        for module in EMBEDDINGS if saved and tie and base.tied else saved:
            self.add_token_rows(base, (module,), "weight")

    @property
    def deltas(self) -> tuple[LoRADelta, ...]:
        """Those alike but for their layer put together, in the model's order."""
        ordered = sorted(self._deltas, key=lambda delta: (*_but_for_layers(delta), delta.layers))
        groups = [list(group) for _, group in groupby(ordered, key=_but_for_layers)]
        return tuple(
            group[0].model_copy(update={"layers": tuple(delta.layers[0] for delta in group)}) for group in groups
        )

    @property
    def vectors(self) -> tuple[VectorSite, ...]:
        """Those alike but for their layer put together, in the model's order."""
        ordered = sorted(self._vectors, key=lambda vector: (_MODULES.index(vector[0]), *vector[1:]))
        return tuple(
            VectorSite(module=module, role=role, tensor=tensor, scale=scale, layers=tuple(v[-1] for v in group))
            for (module, role, tensor, scale), group in groupby(ordered, key=lambda vector: vector[:4])
        )


def _but_for_layers(delta: LoRADelta) -> tuple[float, ...]:
    return (_MODULES.index(delta.linear), delta.rank, delta.scale, delta.in_features or 0, delta.peft_rank or 0)


def _check_saved(base: BaseSpec, modules_to_save: tuple[str, ...]) -> None:
    """Raises `AdapterInvalid` for a name that leads to anything else, or to nothing."""
    others, served = _other_modules(base), base.paths((*NORMS, *EMBEDDINGS))
    for name in modules_to_save:
        other = next((path for path in others if path.endswith(name)), None)
        if other is not None:
            reason = f"{name[:80]!r} leads to {other}; of fully trained modules norms and embeddings are served"
            raise refuse("modules_to_save", reason)
        if not any(path.endswith(name) for path in served):
            raise refuse("modules_to_save", f"{name[:80]!r} is not a module of the base")


def _other_modules(base: BaseSpec) -> list[str]:
    """Paths of what is neither a norm over the hidden state nor inside one, and has no row for each token."""
    layers = [f"model.layers.{layer}" for layer in range(base.num_layers)]
    inner = [f"{layer}.{block}" for layer in layers for block in ("self_attn", "mlp", "mlp.act_fn")]
    return [*base.paths(LINEARS), "model", "model.layers", "model.rotary_emb", *layers, *inner]
