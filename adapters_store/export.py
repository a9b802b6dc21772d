"""A stored version as the `peft` folder with the same arithmetic, in a tar that is made as it is sent."""

from __future__ import annotations

import json
import math
import tarfile
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, TypeVar

from adapters_store.adalora_config import ADALORA_EPSILON
from adapters_store.base_spec import LINEARS, BaseSpec, module_path
from adapters_store.bottleneck_config import FAMILIES
from adapters_store.file_names import ADAPTERHUB_WEIGHTS_FILE, CONFIG_FILE, PATCHBAY_FILE, WEIGHTS_FILE
from adapters_store.manifest import LORETTA_LINEARS, AdapterManifest, AdapterSpec, Bottleneck

_CHUNK: Final = 1 << 20
_ADAPTERHUB_VERSION: Final = "adapters.1.3.0"
_ACTIVATIONS: Final = {"none": "linear"}
_END: Final = bytes(2 * tarfile.BLOCKSIZE)

V = TypeVar("V", bound=Hashable)
Modules = dict[tuple[int, str], V]
"""A value for each adapted linear, by (layer, linear)."""


@dataclass(frozen=True)
class PeftTar:
    """A tar of one folder, ready for `PeftModel.from_pretrained` and for uploading again.

    small: its small files by name. weights: the version's blob, open at its start, which is a safetensors file with
    `peft`'s names and is sent as it is; `weights_bytes` is its size.
    """

    folder: str
    small: Mapping[str, bytes]
    weights_file: str
    weights: BinaryIO
    weights_bytes: int

    @classmethod
    def of(cls, folder: str, manifest: AdapterManifest, base: BaseSpec, weights: BinaryIO) -> PeftTar:
        """base: that the version is for."""
        small = {
            CONFIG_FILE: _json_file(peft_config(manifest, base)),
            PATCHBAY_FILE: _json_file({"base_fingerprint": manifest.base_fingerprint}),
        }
        weights_file = ADAPTERHUB_WEIGHTS_FILE if manifest.kind == "BOTTLENECK" else WEIGHTS_FILE
        return cls(folder, small, weights_file, weights, manifest.size_bytes)

    @property
    def num_bytes(self) -> int:
        """Size of the whole tar."""
        sizes = [*map(len, self.small.values()), self.weights_bytes]
        return sum(tarfile.BLOCKSIZE + _padded(size) for size in sizes) + len(_END)

    def chunks(self) -> Iterator[bytes]:
        """The tar's bytes, in pieces of a megabyte at most."""
        with self.weights:
            for name, data in self.small.items():
                yield self._head(name, len(data)) + data + _padding(len(data))
            yield self._head(self.weights_file, self.weights_bytes)
            while chunk := self.weights.read(_CHUNK):
                yield chunk
            yield _padding(self.weights_bytes) + _END

    def _head(self, name: str, size: int) -> bytes:
        info = tarfile.TarInfo(f"{self.folder}/{name}")
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)


def peft_config(spec: AdapterSpec, base: BaseSpec) -> dict[str, Any]:
    """The `adapter_config.json` with which `peft` (or the package `adapters`) computes `spec` on its base.

    It computes it from the stored tensors.
    """
    if spec.bottleneck is not None and spec.kind == "BOTTLENECK":
        return _adapterhub_config(spec.bottleneck, base)
    common: dict[str, Any] = {
        "peft_type": spec.kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    if spec.virtual_tokens is not None:
        return common | {"num_virtual_tokens": spec.num_virtual_tokens}
    norms = [module_path(layer, site.module) for site in spec.vectors if site.role == "norm" for layer in site.layers]
    if spec.kind == "LN_TUNING":
        return common | {"target_modules": norms}
    if spec.kind == "TRAINABLE_TOKENS":
        return common | _trained_tokens_fields(spec, base)
    of_kind = {
        "LORA": _lora_fields,
        "ADALORA": _adalora_fields,
        "LOHA": _loha_fields,
        "LOKR": _lokr_fields,
        "DELORA": _delora_fields,
        "MISS": _miss_fields,
        "LORETTA_REP": _loretta_rep_fields,
        "LORETTA_ADP": _loretta_adp_fields,
        "VERA": _vera_fields,
        "IA3": _ia3_fields,
        "BEFT": _beft_fields,
    }[spec.kind]
    whole = [module_path(0, rows.modules[0]) for rows in spec.token_rows if rows.ids is None]
    trained = {module_path(0, rows.modules[0]): rows.ids for rows in spec.token_rows if rows.ids is not None}
    if trained:
        common |= {"trainable_token_indices": trained}
    return common | {"modules_to_save": [*norms, *whole] or None} | of_kind(spec, base.num_layers)


def _trained_tokens_fields(spec: AdapterSpec, base: BaseSpec) -> dict[str, Any]:
    """peft makes the second of tied modules from the first."""
    rows = spec.token_rows[:1] if base.tied else spec.token_rows
    return {"token_indices": rows[0].ids, "target_modules": [module_path(0, own.modules[0]) for own in rows]}


def _lora_fields(spec: AdapterSpec, num_layers: int) -> dict[str, Any]:
    ranks = {(layer, delta.linear): delta.rank for delta in spec.deltas for layer in delta.layers}
    roles = {site.role for site in spec.vectors}
    return {
        "bias": _own_biases(spec, "lora_only"),
        "use_dora": "magnitude" in roles,
        "lora_bias": "bias" in roles,
        **_ranked(spec, ranks, "lora_alpha", num_layers),
    }


def _adalora_fields(spec: AdapterSpec, num_layers: int) -> dict[str, Any]:
    """Of a mask peft only counts what is true. It asks for a number of steps, and reads it no more."""
    ranks = {(layer, delta.linear): delta.rank for delta in spec.deltas for layer in delta.layers}
    init_r, scale = spec.deltas[0].peft_rank, spec.deltas[0].scale
    assert init_r is not None, "every delta of AdaLoRA has it"
    return {
        "bias": _own_biases(spec, "lora_only"),
        "init_r": init_r,
        "lora_alpha": _alpha(scale, init_r + ADALORA_EPSILON),
        "rank_pattern": {
            f"{module_path(*module)}.lora_E": [index < rank for index in range(init_r)]
            for module, rank in ranks.items()
            if rank != init_r
        },
        "total_step": 1,
        **_targets(set(ranks), num_layers),
    }


def _loha_fields(spec: AdapterSpec, num_layers: int) -> dict[str, Any]:
    """Its rank is the root of the delta's."""
    ranks = {(layer, delta.linear): math.isqrt(delta.rank) for delta in spec.deltas for layer in delta.layers}
    return _ranked(spec, ranks, "alpha", num_layers)


def _lokr_fields(spec: AdapterSpec, num_layers: int) -> dict[str, Any]:
    ranks = {(layer, delta.linear): delta.peft_rank or 0 for delta in spec.deltas for layer in delta.layers}
    assert spec.kronecker is not None, "a spec of LoKr has it"
    return spec.kronecker.model_dump() | _ranked(spec, ranks, "alpha", num_layers)


def _delora_fields(spec: AdapterSpec, num_layers: int) -> dict[str, Any]:
    """Its strengths are in the file."""
    ranks = {(layer, delta.linear): delta.rank for delta in spec.deltas for layer in delta.layers}
    rank, rank_pattern = _default_and_pattern(ranks)
    own = {"bias": _own_biases(spec, "delora_only"), "r": rank, "rank_pattern": rank_pattern}
    return own | _targets(set(ranks), num_layers)


def _loretta_rep_fields(spec: AdapterSpec, num_layers: int) -> dict[str, Any]:
    """As loretta writes it, which says LORA too; it has one rank and alpha, and names no layers."""
    paths = [module_path(layer, delta.linear) for delta in spec.deltas for layer in delta.layers]
    return {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": _alpha(spec.deltas[0].scale, spec.rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "tensor_rank": spec.tensor_rank,
        "target_modules": sorted(paths),
    }


def _loretta_adp_fields(spec: AdapterSpec, num_layers: int) -> dict[str, Any]:
    """As loretta writes it, under a kind of its own name."""
    assert spec.bottleneck is not None
    return {
        "peft_type": "BOTTLENECK",
        "bottleneck_size": spec.bottleneck.size,
        "non_linearity": _ACTIVATIONS.get(spec.bottleneck.activation, spec.bottleneck.activation),
        "scaling": spec.bottleneck.scale,
        "bias": "none",
        "tensorized": True,
        "tensor_rank": spec.tensor_rank,
        "target_modules": [module_path(layer, LORETTA_LINEARS[site]) for layer, site, _ in spec.bottleneck.places],
    }


def _adapterhub_config(bottleneck: Bottleneck, base: BaseSpec) -> dict[str, Any]:
    """Its sizes are the base's width over the reduction factor, rounded down."""
    hidden, family = bottleneck.hidden_size, base.model_type if base.model_type in FAMILIES else FAMILIES[0]
    factors = {
        str(layer): hidden // each.size if hidden % each.size == 0 else hidden / (each.size + 0.5)
        for each in bottleneck.sizes
        for layer in each.layers
    }
    is_one = len(bottleneck.sizes) == 1
    config = {
        "mh_adapter": "attention" in bottleneck.sites,
        "output_adapter": "output" in bottleneck.sites,
        "reduction_factor": next(iter(factors.values())) if is_one else factors,
        "non_linearity": _ACTIVATIONS.get(bottleneck.activation, bottleneck.activation),
        "original_ln_before": bottleneck.reads == "sum",
        "original_ln_after": True,
        "residual_before_ln": True,
        "is_parallel": bottleneck.reads == "stream",
        "scaling": bottleneck.scale,
        "leave_out": [layer for layer in range(base.num_layers) if str(layer) not in factors],
    }
    return {
        "config": config,
        "hidden_size": hidden,
        "model_class": f"{family.capitalize()}ForCausalLM",
        "model_name": None,
        "model_type": family,
        "name": bottleneck.name,
        "version": _ADAPTERHUB_VERSION,
    }


def _ranked(spec: AdapterSpec, ranks: Modules[int], alpha_field: str, num_layers: int) -> dict[str, Any]:
    """Every scale as alpha / r; the commonest rank and alpha are the defaults, the others patterns."""
    scales = {(layer, delta.linear): delta.scale for delta in spec.deltas for layer in delta.layers}
    rank, rank_pattern = _default_and_pattern(ranks)
    alpha, alpha_pattern = _default_and_pattern({module: _alpha(scales[module], ranks[module]) for module in ranks})
    return {
        "r": rank,
        alpha_field: alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        **_targets(set(ranks), num_layers),
    }


def _miss_fields(spec: AdapterSpec, num_layers: int) -> dict[str, Any]:
    modules = {(layer, delta.linear) for delta in spec.deltas for layer in delta.layers}
    mini_r, rank = spec.deltas[0].mini_r, spec.deltas[0].peft_rank or spec.rank
    mini = {} if mini_r is None else {"init_weights": "mini", "mini_r": mini_r}
    return {"bias": _own_biases(spec, "MiSS_only"), "r": rank, **mini, **_targets(modules, num_layers)}


def _vera_fields(spec: AdapterSpec, num_layers: int) -> dict[str, Any]:
    """The shared matrices are in the file, also where they were drawn."""
    modules = {(layer, delta.linear) for delta in spec.deltas for layer in delta.layers}
    bias = _own_biases(spec, "vera_only")
    return {"bias": bias, "r": spec.rank, "save_projection": True, **_targets(modules, num_layers)}


def _ia3_fields(spec: AdapterSpec, num_layers: int) -> dict[str, Any]:
    scaled = {role: _modules(spec, role) for role in ("in_scale", "out_scale")}
    paths = {role: [module_path(*module) for module in sorted(modules)] for role, modules in scaled.items()}
    return {"target_modules": [*paths["out_scale"], *paths["in_scale"]], "feedforward_modules": paths["in_scale"]}


def _beft_fields(spec: AdapterSpec, num_layers: int) -> dict[str, Any]:
    return {"target_modules": [module_path(*module) for module in sorted(_modules(spec, "bias"))]}


def _modules(spec: AdapterSpec, role: str) -> set[tuple[int, str]]:
    return {(layer, site.module) for site in spec.vectors if site.role == role for layer in site.layers}


def _own_biases(spec: AdapterSpec, of_targets: str) -> str:
    """`bias`: none, those of the targets alone, or all, of which those of other linears have the base's names."""
    names = {site.tensor for site in spec.vectors if site.role == "own_bias"}
    return "all" if "bias" in names else of_targets if names else "none"


def _alpha(scale: float, divisor: float) -> float:
    """The alpha whose quotient with `divisor` is `scale`, to the bit: a whole number where one is."""
    alpha = scale * divisor
    near = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((one for one in near if one / divisor == scale), alpha)


def _default_and_pattern(values: Modules[V]) -> tuple[V, dict[str, V]]:
    """The commonest value, and the others by the linear's name where all its layers agree, else by module path."""
    default = Counter(values.values()).most_common(1)[0][0]
    pattern: dict[str, V] = {}
    for linear in LINEARS:
        own = {layer: value for (layer, name), value in values.items() if name == linear}
        if len(set(own.values())) == 1:
            named = {linear: next(iter(own.values()))}
        else:
            named = {module_path(layer, linear): value for layer, value in own.items()}
        pattern |= {name: value for name, value in named.items() if value != default}
    return default, pattern


def _targets(modules: set[tuple[int, str]], num_layers: int) -> dict[str, Any]:
    """Linears by name, and the layers unless all; full module paths where the linears' layers differ."""
    linears = [linear for linear in LINEARS if any(name == linear for _, name in modules)]
    layers = sorted({layer for layer, _ in modules})
    if len(modules) != len(linears) * len(layers):
        return {"target_modules": sorted(module_path(*module) for module in modules)}
    if layers == list(range(num_layers)):
        return {"target_modules": linears}
    return {"target_modules": linears, "layers_to_transform": layers}


def _json_file(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _padded(size: int) -> int:
    return size + len(_padding(size))


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
