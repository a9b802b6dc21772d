"""Validates an unpacked adapter and writes its canonical file; runs only in the confined process (see `sandbox`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from adapters_store.base_spec import LINEARS, BaseSpec, lora_tensor_name
from adapters_store.canonical import CANONICAL_FILE, tensor_order, write_canonical
from adapters_store.config_schema import LoRAConfig, parse_lora_config
from adapters_store.errors import AdapterInvalid
from adapters_store.file_names import CONFIG_FILE, PATCHBAY_FILE, WEIGHTS_FILE
from adapters_store.lora_targets import LoRATarget, resolve_targets
from adapters_store.manifest import (
    BASE_METADATA_KEY,
    PROMPT_TENSOR,
    AdapterFile,
    AdapterManifest,
    AdapterSpec,
    LoRADelta,
)
from adapters_store.prompt_config import PromptConfig, is_prompt_config, parse_prompt_config
from adapters_store.safetensors_header import SafetensorsHeader, TensorInfo, read_header
from adapters_store.strict_json import parse_object, shown

_CHUNK: Final = 1 << 20  # a multiple of every item size
# What F32 holds may be served in bfloat16, and what overflows there is infinite in products that other tenants share.
_LARGEST: Final = {"F32": 3.3895e38, "BF16": 3.3895e38, "F16": 65504.0}

Targets = Mapping[tuple[int, str], LoRATarget]


@dataclass(frozen=True)
class _Content:
    """What a config promises: the arithmetic, each tensor's shape, and what its values are multiplied by, if not 1."""

    spec: AdapterSpec
    shapes: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, float] = field(default_factory=dict)


def validate(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Check the adapter in `folder` against the base, write `canonical.safetensors`, return its manifest as JSON.

    request: "base" (a `BaseSpec` as a dict), "max_rank", "max_virtual_tokens", and "base_fingerprint" (what the
    uploader stated, or None).
    Raises `AdapterInvalid` naming the file and the field or tensor.
    """
    base = BaseSpec(**request["base"])
    config = _parse_config((folder / CONFIG_FILE).read_bytes())
    header = read_header(folder / WEIGHTS_FILE)
    _check_fingerprint(folder, header, base, request["base_fingerprint"])
    if isinstance(config, PromptConfig):
        content = _Content(
            config.spec(base, int(request["max_virtual_tokens"])), {PROMPT_TENSOR: config.tensor_shape(base)}
        )
    else:
        content = _lora_content(config, base, int(request["max_rank"]))
    _check_tensors(header.tensors, content.shapes)
    _check_library_agrees(folder / WEIGHTS_FILE, header.tensors)
    with (folder / WEIGHTS_FILE).open("rb") as file:
        data = _checked_bytes(file, header.tensors, _limits(header.tensors, content.scales))
        digest, size = write_canonical(folder / CANONICAL_FILE, content.spec, header.tensors, data)
    manifest = AdapterManifest(
        **content.spec.model_dump(),
        digest=digest,
        num_parameters=sum(tensor.shape[0] * tensor.shape[1] for tensor in header.tensors.values()),
        size_bytes=size,
        files=tuple(_describe(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)),
    )
    return manifest.model_dump(mode="json")


def _parse_config(data: bytes) -> LoRAConfig | PromptConfig:
    raw = parse_object(data, CONFIG_FILE)
    return parse_prompt_config(raw) if is_prompt_config(raw) else parse_lora_config(data)


def _check_fingerprint(folder: Path, header: SafetensorsHeader, base: BaseSpec, stated: str | None) -> None:
    """Each of the three places that may state the base must name the one that is served."""
    _check_one_fingerprint(stated, base, None)
    _check_one_fingerprint(header.metadata.get(BASE_METADATA_KEY), base, WEIGHTS_FILE)
    path = folder / PATCHBAY_FILE
    if path.exists():
        value = parse_object(path.read_bytes(), PATCHBAY_FILE)
        unknown = value.keys() - {"base_fingerprint"}
        if unknown:
            raise AdapterInvalid("unknown field", file=PATCHBAY_FILE, field=shown(min(unknown)))
        _check_one_fingerprint(value.get("base_fingerprint"), base, PATCHBAY_FILE)


def _check_one_fingerprint(stated: object, base: BaseSpec, file: str | None) -> None:
    if stated is None or stated == base.fingerprint:
        return
    reason = (
        f"the adapter was trained on the base {shown(str(stated))[:16]} and {base.fingerprint[:16]} is served; "
        "train it on the served base"
    )
    raise AdapterInvalid(reason, file=file, field="base_fingerprint")


def _check_ranks(config: LoRAConfig, targets: Targets, max_rank: int) -> None:
    rank = max(target.rank for target in targets.values())
    if rank > max_rank:
        field = "r" if rank == config.r else "rank_pattern"
        reason = f"the rank {rank} is above your limit of {max_rank}; train with a smaller rank"
        raise AdapterInvalid(reason, file=CONFIG_FILE, field=field)


def _lora_content(config: LoRAConfig, base: BaseSpec, max_rank: int) -> _Content:
    targets = resolve_targets(config, base.num_layers)
    _check_ranks(config, targets, max_rank)
    shapes: dict[str, tuple[int, ...]] = {}
    scales: dict[str, float] = {}
    for (layer, linear), target in targets.items():
        out_features, in_features = base.linears[linear]
        shapes[lora_tensor_name(layer, linear, "A")] = (target.rank, in_features)
        shapes[lora_tensor_name(layer, linear, "B")] = (out_features, target.rank)
        scales[lora_tensor_name(layer, linear, "B")] = target.scale
    return _Content(AdapterSpec(base_fingerprint=base.fingerprint, deltas=_deltas(targets)), shapes, scales)


def _check_tensors(tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Exactly the tensors that the config promises, in the base's shapes."""
    for name in tensors:
        if name not in expected:
            raise AdapterInvalid(_why_unexpected(name), file=WEIGHTS_FILE, field=shown(name))
    for name, shape in expected.items():
        if name not in tensors:
            reason = f"is missing; {CONFIG_FILE} promises it"
            raise AdapterInvalid(reason, file=WEIGHTS_FILE, field=name)
        if tensors[name].shape != shape:
            reason = f"has the shape {list(tensors[name].shape)}; the base and {CONFIG_FILE} need {list(shape)}"
            raise AdapterInvalid(reason, file=WEIGHTS_FILE, field=name)


_UNSERVED_TENSORS: Final = {
    "lora_magnitude_vector": "DoRA magnitudes are not served in this release",
    "lora_embedding_": "adapted embeddings are not served in this release",
    ".base_layer.": "copies of base weights are not served in this release",
    "trainable_tokens": "trained token embeddings are not served in this release",
    ".tensor.factors.": "tensor-train factors (LoRETTA) are not served in this release",
    ".bias": "biases are not served in this release",
}


def _why_unexpected(name: str) -> str:
    for part, reason in _UNSERVED_TENSORS.items():
        if part in name:
            return reason
    return f"is not a tensor that {CONFIG_FILE} and the base call for"


def _check_library_agrees(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """A second opinion: the safetensors library must read the same header."""
    try:
        with safe_open(path, framework="np") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            read = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
    except SafetensorError as error:
        raise AdapterInvalid(f"safetensors refuses it ({shown(str(error))})", file=WEIGHTS_FILE) from None
    if read != {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}:
        raise AdapterInvalid("its header can be read in two ways", file=WEIGHTS_FILE)


def _deltas(targets: Targets) -> tuple[LoRADelta, ...]:
    """The targets with equal linear, rank and scale put together."""

    def key(item: tuple[tuple[int, str], LoRATarget]) -> tuple[int, int, float, int]:
        (layer, linear), target = item
        return LINEARS.index(linear), target.rank, target.scale, layer

    groups = groupby(sorted(targets.items(), key=key), key=lambda item: key(item)[:3])
    return tuple(
        LoRADelta(linear=LINEARS[i], rank=rank, scale=scale, layers=tuple(layer for (layer, _), _ in items))
        for (i, rank, scale), items in groups
    )


def _limits(tensors: Mapping[str, TensorInfo], scales: Mapping[str, float]) -> dict[str, float]:
    """The largest magnitude that each tensor's values may have: B is multiplied by the scale in its own dtype."""
    return {name: _LARGEST[tensor.dtype] / max(1.0, abs(scales.get(name, 1.0))) for name, tensor in tensors.items()}


def _checked_bytes(file: IO[bytes], tensors: Mapping[str, TensorInfo], limits: Mapping[str, float]) -> Iterator[bytes]:
    """The tensors' bytes in the order of storage, each checked to be finite and within its limit."""
    for name in tensor_order(tensors):
        tensor = tensors[name]
        file.seek(tensor.start)
        for start in range(tensor.start, tensor.end, _CHUNK):
            chunk = file.read(min(_CHUNK, tensor.end - start))
            _check_values(name, _as_float32(chunk, tensor.dtype), limits[name])
            yield chunk


def _check_values(name: str, values: npt.NDArray[np.float32], limit: float) -> None:
    if not np.isfinite(values).all():
        raise AdapterInvalid("holds NaN or infinite values", file=WEIGHTS_FILE, field=name)
    if np.abs(values).max() > limit:
        reason = "overflows bfloat16, or float16 where it is saved so, when multiplied by the LoRA scale"
        raise AdapterInvalid(reason, file=WEIGHTS_FILE, field=name)


def _as_float32(chunk: bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "F32":
        return np.frombuffer(chunk, dtype="<f4")
    if dtype == "F16":
        return np.frombuffer(chunk, dtype="<f2").astype(np.float32)
    return (np.frombuffer(chunk, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


def _describe(path: Path) -> AdapterFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return AdapterFile(name=path.name, size_bytes=path.stat().st_size, sha256=digest)
