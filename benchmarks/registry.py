"""The adapter store: look-ups among many adapters, one adapter from disk into host memory, and a large upload.

    python -m benchmarks.registry lookups [--postgresql URL]
    python -m benchmarks.registry load [--layers 32]
    python -m benchmarks.registry upload [--gigabytes 5]

"lookups": a reference to its version, as a front door does for each request, with a live set of 8 among all that are
known. "load": an adapter of rank 16 on all linears of Llama-3.1-8B's shape, from a file that the system has in memory,
to a page image; of that the checksum alone. "upload": a real gateway takes an adapter of that size as it is made; the
growth is that of the front door's peak resident memory (Linux). Notes tell the machine's load: with other work on its
cores the slowest look-ups are those that waited for one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import torch
from sqlalchemy import insert

from adapters_store.accounts import Accounts
from adapters_store.base_spec import LINEARS, lora_tensor_name
from adapters_store.blobs import BlobStore
from adapters_store.canonical import write_canonical
from adapters_store.database import Database
from adapters_store.host_cache import HostCache
from adapters_store.lora_layout import LoRALayout
from adapters_store.manifest import AdapterManifest, AdapterSpec, LoRADelta
from adapters_store.registry import AdapterRegistry
from adapters_store.safetensors_header import TensorInfo
from adapters_store.tables import adapter_versions, adapters, aliases
from benchmarks.gateway import tenant_key
from benchmarks.record import record
from gateway.config import EngineConfig, GatewayConfig, LimitsConfig, ServerConfig, StoreConfig, TrainerConfig

KNOWN = (10, 1_000, 10_000)
LIVE, LOOKUPS = 8, 5_000
ROUNDS = 9
RANK = 16
LLAMA_8B = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
_PIECE = 1 << 20


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("lookups", "load", "upload"))
    parser.add_argument("--postgresql", help="the SQLAlchemy URL of an empty database")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.what == "load":
            measure_load(folder, args.layers)
        elif args.what == "upload":
            measure_upload(folder, args.gigabytes)
        else:
            measure_lookups(f"sqlite:///{folder / 'patchbay.db'}", folder)
            if args.postgresql:
                measure_lookups(args.postgresql, folder)


def load() -> str:
    """What else the machine does."""
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, niceness {os.nice(0)}"


# -- look-ups ---------------------------------------------------------------------------------------------------


def measure_lookups(url: str, folder: Path) -> None:
    """Add adapters up to each number of `KNOWN`, and look the live ones up."""
    database = Database(url)
    database.upgrade()
    Accounts(database).create_tenant("bench")
    registry, known = AdapterRegistry(database, BlobStore(f"file://{folder / 'blobs'}")), 0
    for number in KNOWN:
        add_adapters(database, known, number)
        known = number
        times = sorted(time_lookup(registry, f"bench/a{i % LIVE}") for i in range(LOOKUPS))
        note = f"{LOOKUPS} look-ups of {LIVE} adapters, one after the other; {load()}"
        case = f"{number} known, {database.engine.dialect.name}"
        record("registry", case, "lookup_p50", times[LOOKUPS // 2], "ms", note=note)
        record("registry", case, "lookup_p99", times[LOOKUPS * 99 // 100], "ms", target=2.0, note=note)
    database.dispose()


def time_lookup(registry: AdapterRegistry, ref: str) -> float:
    """Milliseconds of one."""
    start = time.perf_counter()
    registry.resolve("bench", ref)
    return (time.perf_counter() - start) * 1e3


def add_adapters(database: Database, first: int, end: int) -> None:
    """Rows as `publish` leaves them, of a real manifest's size, all at once."""
    spec = adapter_spec(LLAMA_8B, 32, RANK)
    manifest = AdapterManifest(**spec.model_dump(), digest="0" * 64, num_parameters=1, size_bytes=1).model_dump()
    ids = range(first + 1, end + 1)
    version = {"version": 1, "digest": "0" * 64, "rank": RANK, "manifest": manifest, "created_at": 0}
    named = {"alias": "default", "version": 1, "updated_at": 0}
    with database.write() as connection:
        rows = [{"id": i, "tenant": "bench", "name": f"a{i - 1}", "last_version": 1, "created_at": 0} for i in ids]
        connection.execute(insert(adapters), rows)
        connection.execute(insert(adapter_versions), [{"adapter_id": i, **version} for i in ids])
        connection.execute(insert(aliases), [{"adapter_id": i, **named} for i in ids])


# -- one adapter into host memory -------------------------------------------------------------------------------


def measure_load(folder: Path, num_layers: int) -> None:
    """The checksum of a blob, and all that `HostCache.get` does."""
    blobs, digest, num_bytes = store_adapter(folder, num_layers)
    layout = LoRALayout.from_linears(LLAMA_8B, num_layers)
    room = 2 * layout.page_bytes(torch.bfloat16)
    checks, loads = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        blobs.open(digest).close()
        checks.append(time.perf_counter() - start)
        cache = HostCache(blobs, layout, torch.bfloat16, room)
        start = time.perf_counter()
        cache.get(digest).result()
        loads.append(time.perf_counter() - start)
        cache.close()
    check, case = statistics.median(checks), f"rank {RANK}, {num_layers} layers of 8B, {num_bytes / 1e6:.0f} MB"
    note = f"median of {ROUNDS}, file in the page cache; {load()}"
    record("registry", case, "checksum_rate", num_bytes / check / 1e9, "GB/s", note=note)
    record("registry", case, "checksum_seconds", check, "s", note=note)
    record("registry", case, "disk_to_host", statistics.median(loads), "s", target=0.15, note=f"{note}; checksum in it")


def store_adapter(folder: Path, num_layers: int) -> tuple[BlobStore, str, int]:
    """A stored adapter of random bytes in bf16: the store, its digest and its size."""
    spec = adapter_spec(LLAMA_8B, num_layers, RANK)
    tensors = adapter_tensors(LLAMA_8B, num_layers, RANK, "BF16", 2)
    num_bytes = sum(tensor.end - tensor.start for tensor in tensors.values())
    data = torch.randn(num_bytes // 2).bfloat16().view(torch.uint8).numpy().tobytes()
    path = folder / "adapter.safetensors"
    digest, size = write_canonical(path, spec, tensors, [data])
    blobs = BlobStore(f"file://{folder / 'blobs'}")
    blobs.put(digest, path)
    return blobs, digest, size


def adapter_spec(linears: dict[str, tuple[int, int]], num_layers: int, rank: int) -> AdapterSpec:
    """A LoRA of one rank on every linear."""
    layers = tuple(range(num_layers))
    deltas = tuple(LoRADelta(linear=name, rank=rank, scale=1.0, layers=layers) for name in linears)
    return AdapterSpec(base_fingerprint="f" * 64, deltas=deltas)


def adapter_tensors(
    linears: dict[str, tuple[int, int]], num_layers: int, rank: int, dtype: str, item_bytes: int
) -> dict[str, TensorInfo]:
    """Its tensors, one after the other."""
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for layer in range(num_layers):
        for linear, (out_features, in_features) in linears.items():
            for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                start, end = end, end + shape[0] * shape[1] * item_bytes
                tensors[lora_tensor_name(layer, linear, side)] = TensorInfo(dtype, shape, start, end)
    return tensors


# -- a large upload ---------------------------------------------------------------------------------------------


def measure_upload(folder: Path, gigabytes: float) -> None:
    """Send an adapter to the embedded base, of a rank that makes it so large, and look at the front door's memory."""
    from gateway.embedded import embedded_path
    from gateway.models.config import DecoderConfig
    from gateway.server import app

    base = DecoderConfig.from_folder(embedded_path())
    linears = dict(base.linears)
    rank_bytes = 4 * base.num_layers * sum(sum(shape) for shape in linears.values())
    rank = int(gigabytes * 1e9 / rank_bytes)
    config = GatewayConfig(
        engine=EngineConfig(max_lora_rank=rank, num_adapter_slots=1, num_adapter_pages=1, kv_cache_tokens=4096),
        store=StoreConfig(data_dir=str(folder / "data"), self_test=False),  # no engine here has room for it
        limits=LimitsConfig(max_upload_bytes=64 << 30, max_unpacked_bytes=64 << 30, default_max_rank=rank),
        server=ServerConfig(http_port=0, grpc_port=0),
        trainer=TrainerConfig(enabled=False),
    )
    running = app.start(config)
    try:
        key = tenant_key(running.http_url, running.admin_key_path.read_text().strip())
        process = find_front_door()
        send(running.http_url, key, linears, base.num_layers, 8)  # whatever is loaded once
        before = reset_peak(process)
        start = time.perf_counter()
        num_bytes = send(running.http_url, key, linears, base.num_layers, rank)
        seconds = time.perf_counter() - start
        growth = peak_bytes(process) - before
    finally:
        app.stop()
    case, note = (
        f"{num_bytes / 1e9:.1f} GB",
        f"one upload of rank {rank} in {seconds:.0f} s, checked and published; {load()}",
    )
    record("registry", case, "upload_memory_growth", growth / 1e6, "MB", target=64.0, note=note)
    record("registry", case, "upload_rate", num_bytes / seconds / 1e6, "MB/s", note=note)


def send(url: str, key: str, linears: dict[str, tuple[int, int]], num_layers: int, rank: int) -> int:
    """Upload an adapter that is made piece by piece; its bytes."""
    tensors = adapter_tensors(linears, num_layers, rank, "F32", 4)
    headers = {"authorization": f"Bearer {key}", "content-type": "multipart/form-data; boundary=edge"}
    response = httpx.post(f"{url}/v1/adapters", content=form(tensors, rank), headers=headers, timeout=1800)
    assert response.status_code == 200, response.text
    size: int = response.json()["size_bytes"]
    return size


def form(tensors: dict[str, TensorInfo], rank: int) -> Iterator[bytes]:
    """The multipart body: a name, a config, and the weights."""
    yield b'--edge\r\ncontent-disposition: form-data; name="name"\r\n\r\nlarge\r\n'
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LINEARS)}
    yield part("adapter_config.json") + json.dumps(config).encode() + b"\r\n" + part("adapter_model.safetensors")
    entries = {
        name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.start, info.end]}
        for name, info in tensors.items()
    }
    header = json.dumps(entries).encode()
    yield len(header).to_bytes(8, "little") + header
    left, piece = max(info.end for info in tensors.values()), torch.full((_PIECE // 4,), 0.01).numpy().tobytes()
    while left:
        yield piece[:left]
        left -= min(left, len(piece))
    yield b"\r\n--edge--\r\n"


def part(file: str) -> bytes:
    """The head of a file's part."""
    return f'--edge\r\ncontent-disposition: form-data; name="files"; filename="{file}"\r\n\r\n'.encode()


def find_front_door() -> Path:
    """The /proc folder of the process that Ray runs the front door in."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"FrontDoor" in path.read_bytes():
                return path.parent
        except OSError:  # it has ended
            continue
    raise LookupError("no front door is running on this machine")


def reset_peak(process: Path) -> int:
    """Forget the peak of resident memory; the bytes resident now."""
    (process / "clear_refs").write_text("5")
    return peak_bytes(process)


def peak_bytes(process: Path) -> int:
    """Peak resident memory since then."""
    lines = (process / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    main()
