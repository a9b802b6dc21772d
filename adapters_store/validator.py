"""Validates an unpacked adapter and writes its canonical file; runs only in the confined process (see `sandbox`)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from adapters_store.adapter_config import AdapterConfig
from adapters_store.adapter_contents import TensorRule
from adapters_store.base_spec import BaseSpec, module_path
from adapters_store.canonical import CANONICAL_FILE, tensor_order, write_canonical
from adapters_store.config_schema import parse_config
from adapters_store.errors import AdapterInvalid
from adapters_store.file_names import CONFIG_FILE, PATCHBAY_FILE, WEIGHTS_FILE
from adapters_store.kronecker import KroneckerProduct
from adapters_store.manifest import BASE_METADATA_KEY, AdapterFile, AdapterManifest, AdapterSpec, LoRADelta
from adapters_store.module_matching import refuse
from adapters_store.safetensors_header import SafetensorsHeader, TensorInfo, read_header
from adapters_store.strict_json import parse_object, shown

_CHUNK: Final = 1 << 20  # a multiple of every item size
# What F32 holds may be served in bfloat16, and what overflows there is infinite in products that other tenants share.
_LARGEST: Final = {"F32": 3.3895e38, "BF16": 3.3895e38, "F16": 65504.0}

Arrays = Mapping[str, npt.NDArray[np.float32]]


def validate(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Check the adapter in `folder` against the base, write `canonical.safetensors`, return its manifest as JSON.

    request: "base" (a `BaseSpec` as a dict), "weights_file" (its name), "max_rank", "max_virtual_tokens",
    "max_token_rows", "max_import_error" and
    "base_fingerprint" (what the uploader stated, or None).
    Raises `AdapterInvalid` naming the file and the field or tensor.
    """
    try:
        return _validate(folder, folder / request["weights_file"], request)
    except AdapterInvalid as error:
        if error.file == WEIGHTS_FILE:  # said of the tensors, whatever their file's name
            raise AdapterInvalid(error.reason, file=request["weights_file"], field=error.field) from None
        raise


def _validate(folder: Path, weights: Path, request: dict[str, Any]) -> dict[str, Any]:
    base = BaseSpec(**request["base"])
    config = parse_config((folder / CONFIG_FILE).read_bytes())
    header = read_header(weights)
    _check_fingerprint(folder, header, base, request["base_fingerprint"])
    contents = config.contents(base)
    contents.cut_ranks(int(request["max_rank"]))
    spec = AdapterSpec(
        kind=config.kind,
        base_fingerprint=base.fingerprint,
        deltas=contents.deltas,
        vectors=contents.vectors,
        virtual_tokens=contents.virtual_tokens,
        token_rows=contents.token_rows,
        kronecker=contents.kronecker,
        tensor_rank=contents.tensor_rank,
        bottleneck=contents.bottleneck,
    )
    _check_rank(config, spec, int(request["max_rank"]))
    _check_virtual_tokens(spec.num_virtual_tokens, int(request["max_virtual_tokens"]))
    _check_token_rows(spec.num_token_rows, int(request["max_token_rows"]))
    for train in contents.trains:
        contents.tensors |= train.rules(header.tensors)
    _check_tensors(header.tensors, contents.tensors)
    _check_library_agrees(weights, header.tensors)
    made = contents.make()
    tensors = dict(header.tensors) | {
        name: TensorInfo("F32", array.shape, 0, array.nbytes) for name, array in made.items()
    }
    with weights.open("rb") as file:
        data = _checked_bytes(file, tensors, _limits(header.tensors, contents.tensors), made)
        digest, size = write_canonical(folder / CANONICAL_FILE, spec, tensors, data)
        import_error = _import_error(file, header.tensors, spec, float(request["max_import_error"]))
    manifest = AdapterManifest(
        **spec.model_dump(),
        digest=digest,
        num_parameters=sum(math.prod(tensor.shape) for tensor in header.tensors.values()),
        size_bytes=size,
        import_error=import_error,
        files=(_describe(folder / CONFIG_FILE), _describe(weights)),
    )
    return manifest.model_dump(mode="json")


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


def _check_rank(config: AdapterConfig, spec: AdapterSpec, max_rank: int) -> None:
    if spec.rank > max_rank:
        reason = f"the rank {spec.rank} is above your limit of {max_rank}; train with a smaller rank"
        raise AdapterInvalid(reason, file=CONFIG_FILE, field=config.rank_field(spec.rank))
    if spec.bottleneck is not None and (size := spec.bottleneck.size) > max_rank:
        reason = f"makes a bottleneck of {size} units, and your limit is that of ranks, {max_rank}; train with fewer"
        raise AdapterInvalid(reason, file=CONFIG_FILE, field=config.rank_field(size))


def _import_error(file: IO[bytes], tensors: Mapping[str, TensorInfo], spec: AdapterSpec, most: float) -> float:
    """The largest relative error of a delta that is cut to fewer ranks than it has; the first above `most` ends it."""

    def matrix(name: str) -> npt.NDArray[np.float64]:
        tensor = tensors[name]
        file.seek(tensor.start)
        values = _as_float32(file.read(tensor.end - tensor.start), tensor.dtype)
        return values.astype(np.float64).reshape(tensor.shape)

    worst = 0.0
    for delta in spec.deltas:
        for layer in delta.layers if (delta.exact_rank or 0) > delta.rank else ():
            error = KroneckerProduct.read(matrix, tensors, layer, delta).error(delta.rank)
            if error > most:
                raise refuse("r", _why_too_rough(module_path(layer, delta.linear), delta, error, most))
            worst = max(worst, error)
    return worst


def _why_too_rough(path: str, delta: LoRADelta, error: float, most: float) -> str:
    return (
        f"the delta of {path} has the rank {delta.exact_rank}, your limit is {delta.rank}, and the best approximation "
        f"of that rank is off by {error:.2%} in the Frobenius norm, above the limit of {most:.2%} "
        "(limits.max_import_error); train with a smaller r or a decompose_factor such as 4"
    )


def _check_virtual_tokens(number: int, most: int) -> None:
    if number > most:
        reason = f"{number} virtual tokens are above the limit of {most}; train with fewer"
        raise AdapterInvalid(reason, file=CONFIG_FILE, field="num_virtual_tokens")


def _check_token_rows(number: int, most: int) -> None:
    if number > most:
        reason = f"its {number} rows of embed_tokens and lm_head are above the limit of {most} (engine.num_token_rows)"
        raise AdapterInvalid(reason, file=CONFIG_FILE)


def _check_tensors(tensors: Mapping[str, TensorInfo], expected: Mapping[str, TensorRule]) -> None:
    """Exactly the tensors that the config promises, in the base's shapes."""
    for name in tensors:
        if name not in expected:
            raise AdapterInvalid(_why_unexpected(name), file=WEIGHTS_FILE, field=shown(name))
    for name, rule in expected.items():
        if name not in tensors:
            reason = f"is missing; {CONFIG_FILE} and the base call for it"
            raise AdapterInvalid(reason, file=WEIGHTS_FILE, field=name)
        if tensors[name].shape != rule.shape:
            reason = f"has the shape {list(tensors[name].shape)}; the base and {CONFIG_FILE} need {list(rule.shape)}"
            raise AdapterInvalid(reason, file=WEIGHTS_FILE, field=name)


_UNSERVED_TENSORS: Final = {
    "lora_magnitude_vector": f"is a DoRA magnitude, and {CONFIG_FILE} does not say use_dora",
    "lokr_t2": "is of a convolution, and the base has linears alone",
    "lora_embedding_": "adapted embeddings are not served in this release",
    ".base_layer.": "copies of base weights are not served in this release",
    "trainable_tokens": f"holds trained tokens that {CONFIG_FILE} does not name",
    ".tensor.factors.": f"is a factor of a tensor train (LoRETTA) that {CONFIG_FILE} and the base do not call for",
    "_norm.weight": "trained norms over single heads are not served in this release",
    ".bias": f"is a bias that {CONFIG_FILE} and the base do not call for",
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


def _limits(tensors: Mapping[str, TensorInfo], rules: Mapping[str, TensorRule]) -> dict[str, float]:
    """The largest magnitude that each tensor's values may have."""
    return {name: min(_LARGEST[tensors[name].dtype] / max(1.0, rule.factor), rule.most) for name, rule in rules.items()}


def _checked_bytes(
    file: IO[bytes], tensors: Mapping[str, TensorInfo], limits: Mapping[str, float], made: Arrays
) -> Iterator[bytes]:
    """The tensors' bytes in the order of storage, each of the file's checked to be finite and within its limit."""
    for name in tensor_order(tensors):
        if name in made:
            yield made[name].tobytes()
            continue
        tensor = tensors[name]
        file.seek(tensor.start)
        for start in range(tensor.start, tensor.end, _CHUNK):
            chunk = file.read(min(_CHUNK, tensor.end - start))
            _check_values(name, _as_float32(chunk, tensor.dtype), limits[name])
            yield chunk


def _check_values(name: str, values: npt.NDArray[np.float32], limit: float) -> None:
    if -limit <= values.min() and values.max() <= limit:  # neither is so where a number is not one
        return
    reason = "overflows bfloat16, or float16 where it is saved so, when multiplied by what it is scaled with"
    if not np.isfinite(values).all():
        reason = "holds NaN or infinite values"
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
