"""The life of adapters in a whole gateway on this machine: from an upload to its first token, and many that are known.

    python -m benchmarks.lifecycle upload [--megabytes 100] [--rounds 20]
    python -m benchmarks.lifecycle known [--known 10000] [--rounds 5]

"upload": from the first byte of an upload of so many bytes to the first token of a streamed request by its alias: the
checks, the self-test on the replica, the publication, the load and the prompt are in it. The adapter has fp32 matrices
on all linears of the embedded base, of the rank that makes it so large, new ones in each round.

"known": tokens/s of 64 streams over 8 adapters of rank 16, while 10 adapters are registered and while `--known` are, in
turn, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import torch
from safetensors.torch import save
from sqlalchemy import delete

from adapters_store.base_spec import LINEARS, lora_tensor_name
from adapters_store.database import Database
from adapters_store.tables import adapter_versions, adapters, aliases
from benchmarks.gateway import prompts, tenant_key
from benchmarks.record import record
from benchmarks.registry import LIVE, RANK, add_adapters, load
from benchmarks.sse_client import stream_completion
from gateway.config import EngineConfig, GatewayConfig, LimitsConfig, ServerConfig, StoreConfig, TrainerConfig
from gateway.embedded import embedded_path
from gateway.models.config import DecoderConfig

NUM_STREAMS, OUTPUT, FEW = 64, 64, 10
UPLOAD_TARGET, KNOWN_TARGET = 2.0, 0.98  # seconds; times the throughput with few


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("upload", "known"))
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--known", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, help="20 of upload, 5 of known")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if args.what == "upload":
            measure_upload(Path(name), args.megabytes, args.rounds or 20)
        else:
            measure_known(Path(name), args.known, args.rounds or 5)


@contextmanager
def gateway(folder: Path, rank: int) -> Iterator[tuple[str, str]]:
    """A running gateway over the embedded base that takes adapters of this rank: its URL and a tenant's key."""
    from gateway.server import app

    config = GatewayConfig(
        engine=EngineConfig(
            device="cpu",
            max_lora_rank=rank,
            num_adapter_slots=LIVE,
            kv_cache_tokens=32_768,
            enable_prefix_caching=False,
        ),
        store=StoreConfig(data_dir=str(folder / "data")),
        limits=LimitsConfig(default_max_rank=rank),
        server=ServerConfig(http_port=0, grpc_port=0),
        trainer=TrainerConfig(enabled=False),
    )
    running = app.start(config)
    try:
        yield running.http_url, tenant_key(running.http_url, running.admin_key_path.read_text().strip())
    finally:
        app.stop()


def adapter_files(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, bytes]:
    """A random LoRA of this rank on all linears of the embedded base, as peft saves it."""
    base, generator = DecoderConfig.from_folder(embedded_path()), torch.Generator().manual_seed(seed)
    tensors = {
        lora_tensor_name(layer, linear, side): 0.01 * torch.randn(shape, generator=generator).to(dtype)
        for layer in range(base.num_layers)
        for linear, (out_features, in_features) in base.linears.items()
        for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank)))
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LINEARS)}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


def upload(url: str, key: str, request: httpx.Request) -> float:
    """Publish an adapter under its alias `default`; the seconds of its self-test."""
    request.headers["authorization"] = f"Bearer {key}"
    request.url = httpx.URL(f"{url}/v1/adapters")
    with httpx.Client(timeout=120) as client:
        answer = client.send(request)
    assert answer.status_code == 200, answer.text
    seconds: float = answer.json()["report"]["seconds"]
    return seconds


def form(name: str, files: dict[str, bytes]) -> httpx.Request:
    """The whole body of an upload in memory, as it would come from a network."""
    parts = [("files", (file, data)) for file, data in files.items()]
    request = httpx.Request("POST", "http://gateway", data={"name": name}, files=parts)
    request.read()
    return request


def completion(model: str, prompt: list[int], output: int) -> dict[str, object]:
    """A greedy request of so many tokens."""
    return {"model": model, "prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}


def measure_upload(folder: Path, megabytes: float, rounds: int) -> None:
    """Upload a new version in each round, and ask for a token of it by the alias."""
    base = DecoderConfig.from_folder(embedded_path())
    rank = int(megabytes * 1e6 / (4 * base.num_layers * sum(sum(shape) for shape in base.linears.values())))
    uploaded, tested, first = [], [], []
    with gateway(folder, rank) as (url, key):
        for number in range(rounds + 1):
            request = form("large", adapter_files(rank, number))
            start = time.perf_counter()
            tested.append(upload(url, key, request))
            uploaded.append(time.perf_counter() - start)
            stream = asyncio.run(stream_completion(url, key, completion("bench/large", prompts(1, number)[0], 4)))
            assert stream.status == 200
            assert stream.first is not None
            first.append(uploaded[-1] + stream.first)
    case, note = f"upload {megabytes:.0f} MB", f"{rounds} rounds, rank {rank}, self-test in it; {load()}"
    first, uploaded, tested = first[1:], uploaded[1:], tested[1:]
    early, late = (statistics.median(half) for half in (first[: rounds // 2], first[rounds // 2 :]))
    spread = f"{note}; from {min(first):.2f} to {max(first):.2f}, the first half {early:.2f}, the second {late:.2f}"
    record("lifecycle", case, "first_token_p50", statistics.median(first), "s", note=spread)
    record("lifecycle", case, "first_token_p95", float(np.percentile(first, 95)), "s", target=UPLOAD_TARGET, note=note)
    record("lifecycle", case, "upload_p50", statistics.median(uploaded), "s", note=note)
    record("lifecycle", case, "self_test_p50", statistics.median(tested), "s", note=note)


def measure_known(folder: Path, known: int, rounds: int) -> None:
    """Throughput with few adapters registered and with many, in turn."""
    rates: dict[int, list[float]] = {FEW: [], known: []}
    with gateway(folder, RANK) as (url, key):
        for number in range(LIVE):
            upload(url, key, form(f"live{number}", adapter_files(RANK, number)))
        database = Database(f"sqlite:///{folder / 'data' / 'patchbay.db'}")
        for round_ in range(rounds + 1):
            for number in (FEW, known):
                add_adapters(database, LIVE, number)
                rates[number].append(asyncio.run(throughput(url, key, round_)))
                remove_adapters(database, LIVE)
        database.dispose()
    shares = [many / few for few, many in zip(rates[FEW][1:], rates[known][1:], strict=True)]
    note = f"median of {rounds} rounds, in turn; {NUM_STREAMS} streams, {LIVE} live; {load()}"
    for number, values in rates.items():
        record("lifecycle", f"{number} known", "tokens_per_s", statistics.median(values[1:]), "1/s", note=note)
    spread = f"{note}; from {min(shares):.3f} to {max(shares):.3f}"
    share = statistics.median(shares)
    record("lifecycle", f"{known} known", "share_of_few", share, "x", target=KNOWN_TARGET, note=spread)


def remove_adapters(database: Database, first: int) -> None:
    """Take the rows behind the first ones away."""
    with database.write() as connection:
        for table in (aliases, adapter_versions):
            connection.execute(delete(table).where(table.c.adapter_id > first))
        connection.execute(delete(adapters).where(adapters.c.id > first))


async def throughput(url: str, key: str, seed: int) -> float:
    """Tokens/s of all streams at once."""
    start = time.perf_counter()
    bodies = [
        completion(f"bench/live{number % LIVE}", prompt, OUTPUT)
        for number, prompt in enumerate(prompts(NUM_STREAMS, seed))
    ]
    streams = await asyncio.gather(*(stream_completion(url, key, body) for body in bodies))
    assert all(stream.tokens == OUTPUT for stream in streams)
    return NUM_STREAMS * OUTPUT / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
