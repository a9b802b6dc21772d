"""What an adapter is, once validated: the part inside its blob, and the manifest that the registry keeps."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters_store.base_spec import LINEARS

ADAPTER_METADATA_KEY = "patchbay.adapter"
"""Key of the safetensors header under which a stored blob carries its `AdapterSpec` as JSON."""

BASE_METADATA_KEY = "patchbay.base_fingerprint"
"""Key of the safetensors header under which an uploader may state the base an adapter was trained on."""


class LoRADelta(BaseModel):
    """One linear's delta, alike in each of `layers`: y += scale * B(A x), A [rank, in], B [out, rank]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    linear: str
    rank: int = Field(ge=1)
    scale: float = Field(allow_inf_nan=False)
    layers: tuple[int, ...]


class AdapterSpec(BaseModel):
    """An adapter's arithmetic beside its tensors; it travels inside the blob, so the digest covers it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    kind: Literal["LORA"] = "LORA"
    base_fingerprint: str
    deltas: tuple[LoRADelta, ...] = Field(min_length=1)

    @property
    def rank(self) -> int:
        """The largest rank of any linear."""
        return max(delta.rank for delta in self.deltas)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The linears that carry a delta in some layer, in the model's order."""
        present = {delta.linear for delta in self.deltas}
        return tuple(linear for linear in LINEARS if linear in present)

    def canonical_json(self) -> str:
        """The one text that equal specs share."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


class AdapterFile(BaseModel):
    """One uploaded file as it arrived. `sha256` is in hex, `size_bytes` in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size_bytes: int
    sha256: str


class AdapterManifest(AdapterSpec):
    """What the registry keeps of one version.

    digest: SHA-256 in hex of the blob: the canonical safetensors file, whose header holds the `AdapterSpec`.
    size_bytes: size of that blob. num_parameters: elements of all A and B. files: what was uploaded.
    """

    digest: str
    num_parameters: int
    size_bytes: int
    files: tuple[AdapterFile, ...] = ()
