"""What an adapter is, once validated: the part inside its blob, and the manifest that the registry keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters_store.base_spec import EMBEDDINGS, LINEARS, NORMS

ADAPTER_METADATA_KEY = "patchbay.adapter"
"""Key of the safetensors header under which a stored blob carries its `AdapterSpec` as JSON."""

PROMPT_TENSOR = "prompt_embeddings"
"""The one tensor that peft saves of virtual tokens, and the blob holds."""

BASE_METADATA_KEY = "patchbay.base_fingerprint"
"""Key of the safetensors header under which an uploader may state the base an adapter was trained on."""


Kind = Literal[
    "LORA",
    "ADALORA",
    "LOHA",
    "LOKR",
    "DELORA",
    "MISS",
    "LORETTA_REP",
    "VERA",
    "IA3",
    "BEFT",
    "LN_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "BOTTLENECK",
    "LORETTA_ADP",
    "TRAINABLE_TOKENS",
]
"""peft's names of the kinds that are served, and ours of those that it does not have."""

EmbeddingModule = Literal["embed_tokens", "lm_head"]
"""What has a row for each token: the input embeddings and the output projection."""

VectorRole = Literal["out_scale", "in_scale", "bias", "own_bias", "magnitude", "norm"]
"""What a vector does to its module: scales its outputs or its inputs, is added to its outputs, takes the place of its
bias, is DoRA's magnitude (an output scale once divided by the rows' norms), or takes the place of a norm's weight."""


class LoRADelta(BaseModel):
    """One linear's delta, alike in each of `layers`: y += scale * B(A x), A [rank, in], B [out, rank].

    rank: 0 where AdaLoRA left nothing. in_features, out_features: of the linear, where no tensor of its own has them
    (VeRA and MiSS). peft_rank: the rank in peft's config where a delta may have another (AdaLoRA's init_r, LoKr's r,
    that of MiSS's "mini"). exact_rank: of a Kronecker product, of which `rank` may be fewer, the largest singular
    values. mini_r: of MiSS's "mini", how many outputs have columns of their own, which the others repeat.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    linear: str
    rank: int = Field(ge=0)
    scale: float = Field(allow_inf_nan=False)
    layers: tuple[int, ...]
    in_features: int | None = None
    peft_rank: int | None = None
    exact_rank: int | None = None
    out_features: int | None = None
    mini_r: int | None = None


class VectorSite(BaseModel):
    """One vector of a linear or norm, in each of `layers`; the last norm is of layer 0.

    tensor: the end of its name in the file, such as "ia3_l". scale: what it is multiplied by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    role: VectorRole
    tensor: str
    scale: float = Field(default=1.0, allow_inf_nan=False)
    layers: tuple[int, ...]


class VirtualTokens(BaseModel):
    """Tokens that come before every prompt: the rows of the tensor `PROMPT_TENSOR`, [num_tokens, width].

    num_layers: of as many layers a row has keys and values: view(num_tokens, 2 * num_layers, kv_width), a layer's keys,
    then its values, keys as they are cached (prefix tuning). None: a row is an input embedding.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_tokens: int = Field(ge=1)
    num_layers: int | None = None


class KroneckerSplit(BaseModel):
    """How peft cuts linears into LoKr's two factors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decompose_both: bool
    decompose_factor: int


class TokenRows(BaseModel):
    """Rows that take the place of those of some tokens in `modules`, alike in each: a tensor [num_tokens, hidden].

    tensor: its name in the file. num_tokens: how many. ids: of which tokens, a row each; None: of all, in their order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    modules: tuple[EmbeddingModule, ...]
    tensor: str
    num_tokens: int = Field(ge=1)
    ids: tuple[int, ...] | None = None


BottleneckSite = Literal["attention", "gate", "up", "output"]
"""Where in a layer a bottleneck adapter is: behind the block of attention or of feed-forward ("output", in AdapterHub's
words), or before gate_proj or up_proj, whose inputs it changes for that linear alone."""

BOTTLENECK_SITES: Final[tuple[BottleneckSite, ...]] = ("attention", "gate", "up", "output")

LORETTA_LINEARS: Final[Mapping[BottleneckSite, str]] = {"gate": "gate_proj", "up": "up_proj", "output": "down_proj"}
"""The linears that LoRETTA_adp may target, by where it then has a bottleneck: behind down_proj, before the others."""

BottleneckReads = Literal["block", "stream", "sum"]
"""What a bottleneck adapter reads: what comes to its site, or of a block also the residual stream before that is added
to it, or after."""

BottleneckActivation = Literal["none", "relu", "gelu", "silu", "tanh"]
"""What stands between its two linears (gelu: the exact one)."""


class BottleneckSize(BaseModel):
    """The width between the two linears, in each of `layers`. sites: where; None: at all of the adapter's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1)
    layers: tuple[int, ...]
    sites: tuple[BottleneckSite, ...] | None = None


class Bottleneck(BaseModel):
    """Bottleneck adapters at `sites`: what is there gets scale * up(activation(down(x))), with biases, beside.

    name: AdapterHub's, which is part of its tensors' names; LoRETTA's have none. hidden_size: the base's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    hidden_size: int
    sites: tuple[BottleneckSite, ...]
    sizes: tuple[BottleneckSize, ...]
    reads: BottleneckReads
    activation: BottleneckActivation
    scale: float = Field(allow_inf_nan=False)

    @property
    def size(self) -> int:
        """The largest in any layer."""
        return max(each.size for each in self.sizes)

    @property
    def places(self) -> list[tuple[int, BottleneckSite, int]]:
        """Layer, site and size of each."""
        return [
            (layer, site, own.size) for own in self.sizes for layer in own.layers for site in own.sites or self.sites
        ]


class AdapterSpec(BaseModel):
    """An adapter's arithmetic beside its tensors; it travels inside the blob, so the digest covers it.

    tensor_rank: of LoRETTA's matrices, which are tensor trains.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    kind: Kind = "LORA"
    base_fingerprint: str
    deltas: tuple[LoRADelta, ...] = ()
    vectors: tuple[VectorSite, ...] = ()
    virtual_tokens: VirtualTokens | None = None
    token_rows: tuple[TokenRows, ...] = ()
    kronecker: KroneckerSplit | None = None
    tensor_rank: int | None = None
    bottleneck: Bottleneck | None = None

    @property
    def rank(self) -> int:
        """The largest rank of any linear; 0 where there is no delta."""
        return max((delta.rank for delta in self.deltas), default=0)

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that come before every prompt."""
        return self.virtual_tokens.num_tokens if self.virtual_tokens is not None else 0

    @property
    def num_token_rows(self) -> int:
        """Rows of its own for tokens, in all tensors."""
        return sum(rows.num_tokens for rows in self.token_rows)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The modules that are changed in some layer, in the model's order, what is there once behind."""
        present = {delta.linear for delta in self.deltas} | {site.module for site in self.vectors}
        present |= {module for rows in self.token_rows for module in rows.modules}
        return tuple(module for module in (*LINEARS, *NORMS, *EMBEDDINGS) if module in present)

    def canonical_json(self) -> str:
        """The one text that equal specs share; what is empty is left out, so that later fields change no digest."""
        dumped = self.model_dump(mode="json", exclude_none=True)
        said = {field: value for field, value in dumped.items() if value != []}
        return json.dumps(said, sort_keys=True, separators=(",", ":"))


class AdapterFile(BaseModel):
    """One uploaded file as it arrived. `sha256` is in hex, `size_bytes` in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size_bytes: int
    sha256: str


class AdapterManifest(AdapterSpec):
    """What the registry keeps of one version.

    digest: SHA-256 in hex of the blob: the canonical safetensors file, whose header holds the `AdapterSpec`.
    size_bytes: size of that blob. num_parameters: elements of all tensors. files: what was uploaded. import_error: the
    largest relative error of a linear's delta, in the Frobenius norm, that fewer ranks than it has make; else 0.
    """

    digest: str
    num_parameters: int
    size_bytes: int
    import_error: float = 0.0
    files: tuple[AdapterFile, ...] = ()
