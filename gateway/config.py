"""The configuration: frozen dataclasses, composed, whose values are checked; read from a YAML file.

The docstring of a section explains its keys.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from gateway.errors import ConfigInvalid

T = TypeVar("T")

DATABASE_URL_VARIABLE: Final = "PATCHBAY_DATABASE_URL"
# On the CPU: 2,048 prompt tokens of the embedded base took 203 ms in two steps and 248 ms in one (2 cores).
_STEP_TOKENS: Final = {"cuda": 2048, "cpu": 1024}
_CHECKED: Final = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
Natural = Annotated[int, Field(ge=0, lt=1 << 63)]
Ranks = Annotated[int, Field(ge=1, le=64)]  # no host has as many GPUs
Port = Annotated[int, Field(ge=0, lt=1 << 16)]
Share = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=_CHECKED)
class EngineConfig:
    """One engine: its base, its memory and its batch limits.

    base: a Hugging Face folder, or "embedded" for the model that ships with Patchbay.
    quantization: how the base's linears are kept ("nf4" is bitsandbytes' NF4 with double quantization).
    dtype: activations and unquantized weights; "auto" is bfloat16 on CUDA and float32 on the CPU.
    tensor_parallel_size: GPUs of one host that share the base, its cache and its adapters, each run by a process. Host
        memory (kv_host_bytes, host_cache_bytes) is divided among them.
    block_size: tokens of a page of the KV cache.
    kv_cache_dtype: keys and values in the cache; "fp8" (e4m3, a scale for each token and head) takes half the bytes of
        bfloat16, on CUDA with Ada, Hopper or later cards. "auto" is the dtype of activations.
    kv_cache_tokens: room of the KV cache in tokens, beside the adapters' pages; None takes what memory allows (CUDA) or
        65,536 (CPU).
    kv_host_bytes: pinned host memory for blocks that the KV cache drops, to be fetched instead of computed again; None
        takes 4 GiB (CUDA) or nothing (CPU). Nothing is taken without prefix caching, or where fetching never pays.
    gpu_memory_utilization: the part of the GPU's memory that is in use at most, by whatever is on it.
    max_num_seqs: sequences that run at once; the others wait.
    max_num_batched_tokens: tokens of one step, prefill and decode together; None takes 2,048 (CUDA) or 1,024 (CPU). No
        more sequences run at once than that.
    max_model_len: tokens of a prompt and its completion; None takes the base's positions, or the cache's if fewer.
    max_waiting: requests of a replica that have not ended, those that run among them; the next is refused (429).
    default_max_tokens: tokens generated where a request does not say, as far as the context has room.
    enable_prefix_caching: keep the blocks of prompts for those that begin with the same tokens, of the same tenant.
    share_base_prefixes: of the bare base's prompts across tenants too, who may then learn from the time to the first
        token whether somebody has sent the same.
    num_adapter_slots: adapters on the device at once; 0 serves the bare base alone.
    max_lora_rank: of an adapter, at most.
    num_adapter_pages: room for adapters in pages of 16 ranks; None takes what all slots may need at max_lora_rank, but
        half of the memory beside the base at most (CUDA).
    lend_adapter_pages: what adapters leave of their room is the KV cache's, until one that comes has it emptied. Those
        that nobody uses give theirs up too: for prefixes that were used since, and for sequences that would wait or be
        preempted otherwise.
    adapter_dtype: how adapters' weights are kept; "auto" is dtype, "int8" has one scale a rank and matrix: twice the
        adapters in as much memory.
    num_vector_slots: room on the device for adapters with vectors (DoRA, IA3, trained biases and norms), 14 MB each at
        Llama-3.1-8B's shape, taken at the start; as many as adapters' slots at most. 0 refuses them. They also take a
        sixteenth of host_cache_bytes.
    num_bottleneck_pages: room on the device for bottleneck adapters, in pages of 16 units at one place of all layers:
        8.9 MB each at Llama-3.1-8B's shape, taken at the start. 0 refuses them.
    num_token_rows: room on the device for what adapters have of embed_tokens and lm_head, in rows of a token: one for
        each that is trained, as many as the vocabulary for a whole module (`modules_to_save`). Taken at the start; a
        row is 8 KB at Llama-3.1-8B's shape, a whole module there 1.05 GB. 0 refuses them.
    host_cache_bytes: host memory for adapters on their way to the device and for those that left it; taken and pinned
        at the start (CUDA), or as it fills (CPU). A larger adapter, or one that finds no room there, stalls a step.
        Beside it up to a sixteenth is kept of virtual tokens and rows of tokens, and each of two threads that read
        adapters keeps memory for the largest, up to 512 MiB.
    max_virtual_tokens: the most that an adapter may put before its prompts (prompt, P- and prefix tuning). Beside
        host_cache_bytes each adapter that has a slot keeps its own in host memory: so many embeddings, or tokens' keys
        and values.
    tenant_adapter_share: the part of all slots and pages that one tenant's adapters may take, but one adapter always. A
        tenant that has its share exchanges its own adapters, and its requests alone wait while they are in use.
    max_adapter_pages_per_step: pages of distinct adapters that run in one step, whose bytes it reads beside the base's;
        None sets no limit. At the limit requests whose adapter already runs go first, past 16 others at most.
    torch_threads: of PyTorch on the CPU; None leaves it to PyTorch.
    enforce_eager: record no CUDA graphs: a faster start; decode steps and short prompts are slower.
    overlap_steps: prepare a step while the one before runs: the host's work hides behind the device's, and tokens are
        handed out one step later. None does so on CUDA alone.
    max_speculative_tokens: the most tokens that a request may ask to be guessed ahead in a step; 0 refuses it.
    batch_invariant: a token's logits depend on nothing but its sequence, bit for bit: not on what else runs, nor on how
        its prompt was cut, preempted or found in the cache. Slower; on the CPU much slower.
    """

    base: Text = "embedded"
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor_parallel_size: Ranks = 1
    block_size: Literal[1, 2, 4, 8, 16, 32] = 16
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    kv_cache_tokens: Positive | None = None
    kv_host_bytes: Natural | None = None
    gpu_memory_utilization: Share = 0.9
    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive | None = None
    max_model_len: Positive | None = None
    max_waiting: Positive = 4096
    default_max_tokens: Positive = 256
    enable_prefix_caching: bool = True
    share_base_prefixes: bool = False
    num_adapter_slots: Natural = 64
    max_lora_rank: Positive = 64
    num_adapter_pages: Positive | None = None
    lend_adapter_pages: bool = True
    adapter_dtype: Literal["auto", "int8"] = "auto"
    num_vector_slots: Natural = 16
    num_bottleneck_pages: Natural = 32
    num_token_rows: Natural = 4096
    max_virtual_tokens: Natural = 512
    tenant_adapter_share: Share = 1.0
    max_adapter_pages_per_step: Positive | None = None
    host_cache_bytes: Natural = 4 << 30
    torch_threads: Positive | None = None
    enforce_eager: bool = False
    overlap_steps: bool | None = None
    max_speculative_tokens: Natural = 8
    batch_invariant: bool = False

    @property
    def max_rows(self) -> int:
        """Rows of one decode step at most: sequences, or one with all that is guessed for it."""
        return max(self.max_num_seqs, 1 + self.max_speculative_tokens)

    def step_tokens(self, device_type: str) -> int:
        """Tokens of one step at most."""
        return self.max_num_batched_tokens or _STEP_TOKENS[device_type]

    @property
    def num_vector_rows(self) -> int:
        """Adapters with vectors that are on the device at once, at most."""
        return min(self.num_vector_slots, self.num_adapter_slots)

    @property
    def num_usable_bottleneck_pages(self) -> int:
        """0 where no adapter is served."""
        return self.num_bottleneck_pages if self.num_adapter_slots else 0

    @property
    def num_usable_token_rows(self) -> int:
        """0 where no adapter is served."""
        return self.num_token_rows if self.num_adapter_slots else 0


@dataclass(frozen=True, config=_CHECKED)
class StoreConfig:
    """Where state lives: `data_dir` holds the embedded database and blobs unless the URLs name others.

    database_url: SQLAlchemy's, of PostgreSQL where there are several machines; see `database`.
    blob_url: a folder ("file:///...") or one that fsspec reaches ("s3://bucket/prefix", with the extra `s3`:
        its keys, region and endpoint come from botocore's AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on).
    cache_dir: where a machine keeps blobs of such a store, on a disk of its own; None takes a folder in data_dir.
    cache_bytes: the most that it keeps; least recently used out first.
    import_roots: folders and URLs below which an admin's /v1/load_lora_adapter may make the server read; default none.
    self_test: run each new version on a replica before an alias may name it.
    self_test_timeout_s: for all of one self-test; where no replica could do it in that time nothing is published.
    """

    data_dir: Text = "patchbay-data"
    database_url: str | None = None
    blob_url: str | None = None
    cache_dir: str | None = None
    cache_bytes: Natural = 20 << 30
    import_roots: tuple[str, ...] = ()
    self_test: bool = True
    self_test_timeout_s: PositiveFloat = 60.0

    @property
    def database(self) -> str:
        """The SQLAlchemy URL: database_url, else the environment's PATCHBAY_DATABASE_URL, else SQLite in data_dir.

        The environment is the way in for a URL with a password: it stays out of files and of Ray's messages.
        """
        url = self.database_url or os.environ.get(DATABASE_URL_VARIABLE)
        return url or f"sqlite:///{Path(self.data_dir).resolve() / 'patchbay.db'}"

    @property
    def blobs(self) -> str:
        """The fsspec URL of the blob folder."""
        return self.blob_url or f"file://{Path(self.data_dir).resolve() / 'blobs'}"

    @property
    def cache(self) -> Path:
        """Where blobs of an object store are kept on this machine's disk."""
        return Path(self.cache_dir or Path(self.data_dir) / "blob-cache").resolve()

    @property
    def staging(self) -> Path:
        """Where uploads wait while they are checked, on this machine's disk."""
        return Path(self.data_dir).resolve() / "staging"


@dataclass(frozen=True, config=_CHECKED)
class LimitsConfig:
    """What one request or upload may ask for. Sizes in bytes.

    max_upload_bytes: of an adapter's archive or file; max_unpacked_bytes: of what is in it.
    max_training_file_bytes: of an uploaded file of examples. max_request_bytes: of any other body or gRPC message.
    max_n, max_prompts, max_logprobs: what a request may ask for of each.
    max_stop: entries of `stop`, and of `stop_token_ids`; max_stop_chars: of an entry; max_logit_bias: entries.
    default_max_rank: of the adapters of a tenant for whom no other is set; never above engine.max_lora_rank.
    max_priority_boost: how far below 0 a tenant may set the priority of its requests (lower runs earlier); above it may
        always. tenant_weights: the shares of tenants beside others of the same priority; 1 for those not named.
    max_import_error: of an adapter that is served with fewer ranks than its deltas have (LoKr), the largest relative
        error of a linear's delta, in the Frobenius norm; 0 refuses all but exact ones.
    max_uploads: of a tenant under way at once, at each front door; the next is told to come again.
    """

    max_uploads: Positive = 8
    max_upload_bytes: Positive = 2 << 30
    max_unpacked_bytes: Positive = 4 << 30
    max_training_file_bytes: Positive = 512 << 20
    max_request_bytes: Positive = 4 << 20
    max_n: Positive = 16
    max_prompts: Positive = 128
    max_logprobs: Natural = 20
    max_stop: Natural = 16
    max_stop_chars: Positive = 1024
    max_logit_bias: Natural = 1024
    default_max_rank: Positive = 64
    max_import_error: Annotated[float, Field(ge=0, lt=1)] = 0.01
    max_priority_boost: Natural = 0
    tenant_weights: dict[str, PositiveFloat] = field(default_factory=dict)


@dataclass(frozen=True, config=_CHECKED)
class ServerConfig:
    """The front doors and the replicas. Port 0 asks the system for a free one.

    num_front_doors, num_replicas: processes; replica_num_cpus: what Ray reserves for each of the latter.
    replica_num_gpus: of each replica; `tensor_parallel_size` where that is more than one.
    default_tenant: whose adapters an admin key means by a name without a tenant; None asks for tenant/name.
    front_door_resource: a custom Ray resource of the nodes that front doors run on, one front door to each unit of it.
    ray_address: a Ray cluster to join; None starts one on this machine.
    metrics_aggregate: /metrics of a front door has all front doors' and replicas' counts; turn it off where each is
        scraped for itself: a replica at replica_metrics_port, which None closes.
    """

    host: Text = "127.0.0.1"
    http_port: Port = 8000
    grpc_port: Port = 50051
    default_tenant: str | None = None
    num_front_doors: Positive = 1
    front_door_resource: str | None = None
    num_replicas: Positive = 1
    replica_num_cpus: NonNegativeFloat = 1.0
    replica_num_gpus: NonNegativeFloat = 0.0
    ray_address: str | None = None
    metrics_aggregate: bool = True
    replica_metrics_port: Port | None = None


@dataclass(frozen=True, config=_CHECKED)
class TrainerConfig:
    """The fine-tune worker.

    enabled: whether there is one. num_cpus, num_gpus: what Ray reserves for it.
    torch_threads: of PyTorch on the CPU; None leaves it to PyTorch.
    max_steps, max_seq_len: of a job, and tokens of an example, at most.
    """

    enabled: bool = True
    num_cpus: NonNegativeFloat = 0.5
    num_gpus: NonNegativeFloat = 0.0
    torch_threads: Positive | None = None
    max_steps: Positive = 100_000
    max_seq_len: Positive = 2048


@dataclass(frozen=True, config=_CHECKED)
class GatewayConfig:
    """The whole configuration of one Patchbay deployment."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @classmethod
    def from_file(cls, path: str | Path) -> GatewayConfig:
        """Read a YAML file. Raises `ConfigInvalid`, naming each wrong key and value."""
        try:
            data = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:  # as of what is no text, or no day of a calendar
            raise ConfigInvalid(f"cannot read the configuration {path}: {error}") from error
        return from_dict(cls, data)


def from_dict(cls: type[T], data: object, where: str = "") -> T:
    """Build `cls`, the whole or the section at `where`, from plain data. Raises `ConfigInvalid` with dotted keys."""
    try:
        # As JSON, where a list may become a tuple and a mapping a section, though types are strict.
        return TypeAdapter(cls).validate_json(json.dumps(data, default=str))
    except TypeError as error:  # of a key
        raise ConfigInvalid(f"{where or 'the configuration'}: {error}; quote it") from error
    except ValidationError as error:
        complaints = [_complaint(cls, details, where) for details in error.errors()]
        raise ConfigInvalid("; ".join(text for _, text in complaints), param=complaints[0][0]) from error


def _complaint(cls: type[Any], details: ErrorDetails, where: str) -> tuple[str | None, str]:
    """The dotted key, and what is wrong with it."""
    path = details["loc"]
    key = ".".join(map(str, (where, *path) if where else path))
    if details["type"] != "unexpected_keyword_argument":
        what = details["msg"][0].lower() + details["msg"][1:]
        return key or None, f"{key or 'the configuration'}: {what}, not {details['input']!r}"
    for section in path[:-1]:
        cls = next(each.default_factory for each in dataclasses.fields(cls) if each.name == section)  # type: ignore[assignment]
    return key, f"unknown key {key}; known keys: {', '.join(sorted(each.name for each in dataclasses.fields(cls)))}"
