"""LoKr as plain LoRA: how long A and B of its Kronecker products take, and how far off fewer ranks are.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.lokr [--layers 32] [--steps 100]

NumPy then has one thread, as in a gateway's processes. Each case is an upload under a limit of ranks.

"8B": random numbers on all linears of Llama-3.1-8B's shape. "factors" is the reading of all pairs of factors, which are
decomposed where the limit cuts their product: an upload does that to know the error. "pairs" is that and the making of
A and B: so it is each time that the adapter comes into host memory. The spectra of random numbers are nearly flat, and
the error is large. "trained": that of what peft trains on the embedded base in so many steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoKrConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from adapters_store.base_spec import LINEARS, BaseSpec
from adapters_store.config_schema import parse_config
from adapters_store.kronecker import KroneckerProduct
from adapters_store.plain_lora import read_pairs
from adapters_store.upload import StagedAdapter, Staging, UploadLimits
from benchmarks.record import record
from benchmarks.registry import LLAMA_8B, load
from gateway.config import EngineConfig
from gateway.embedded import demo_path, embedded_path
from gateway.embedded.adapters import load_nf4_base
from gateway.embedded.packing import encode_chat, pack
from gateway.embedded.tenants import read_chats
from gateway.embedded.train import row_loss
from gateway.models.loader import load_model

# r, decompose_factor (-1 is peft's default), and limits of ranks.
RANDOM = ((8, 4, (64,)), (8, 8, (64, 32)), (4, -1, (256,)), (8, -1, (256, 64)), (256, 8, (64,)))
TRAINED = ((8, 4, (32, 16)), (8, 8, (64, 32, 16)), (8, -1, (128, 64, 32)))
ROUNDS = 5
TRAIN_FILE, ROW_TOKENS, NUM_ROWS, RATE = "harbor.train.jsonl", 256, 8, 1e-2


def main() -> None:
    """Measure and record both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    args = parser.parse_args()
    for r, factor, limits in RANDOM:
        measure_random(args.layers, r, factor, limits)
    for r, factor, limits in TRAINED:
        measure_trained(args.steps, r, factor, limits)


def measure_random(num_layers: int, r: int, factor: int, limits: tuple[int, ...]) -> None:
    """Times and the error of one adapter under each limit."""
    base = BaseSpec("0" * 64, num_layers, LLAMA_8B)
    with tempfile.TemporaryDirectory() as name:
        folder = write_random(Path(name) / "adapter", base, r, factor)
        for limit in limits:
            with staged(folder, base, limit) as adapter:
                case = f"8B, {num_layers} layers, r {r}, factor {factor}, limit {limit}"
                rounds = [(seconds(read_factors, adapter), seconds(make_pairs, adapter)) for _ in range(ROUNDS)]
                factors, pairs = zip(*rounds, strict=True)
                note = f"{told(adapter)}; median of {ROUNDS}, in turn; {machine_load()}"
                record("lokr", case, "factors_seconds", statistics.median(factors), "s", note=note)
                record("lokr", case, "pairs_seconds", statistics.median(pairs), "s", note=note)
                record_error(case, adapter, "random numbers")


def measure_trained(num_steps: int, r: int, factor: int, limits: tuple[int, ...]) -> None:
    """The error of one adapter under each limit."""
    base = load_model(EngineConfig(base="embedded", device="cpu")).spec
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        first, last = train(folder, num_steps, r, factor)
        for limit in limits:
            with staged(folder, base, limit) as adapter:
                note = f"{num_steps} steps on {TRAIN_FILE}, loss {first:.2f} to {last:.2f}"
                record_error(f"trained, r {r}, factor {factor}, limit {limit}", adapter, note)


def write_random(folder: Path, base: BaseSpec, r: int, factor: int) -> Path:
    """A LoKr of normal numbers in fp32, as peft saves it."""
    folder.mkdir()
    fields = {"peft_type": "LOKR", "r": r, "alpha": r, "decompose_factor": factor, "target_modules": list(LINEARS)}
    config = json.dumps(fields).encode()
    (folder / "adapter_config.json").write_bytes(config)
    generator = torch.Generator().manual_seed(0)
    rules = parse_config(config).contents(base).tensors
    tensors = {name: torch.randn(rule.shape, generator=generator) for name, rule in rules.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def train(folder: Path, num_steps: int, r: int, factor: int) -> tuple[float, float]:
    """Train a LoKr on all linears of the embedded base, save it, and return the first and the last ten's mean loss."""
    torch.manual_seed(0)
    base, tokenizer = load_nf4_base(embedded_path())
    config = LoKrConfig(r=r, alpha=r, decompose_factor=factor, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    chats = read_chats(demo_path() / TRAIN_FILE)
    rows = pack((encode_chat(tokenizer.backend_tokenizer, chat) for chat in chats), ROW_TOKENS, tokenizer.pad_token_id)
    ids, trained = torch.from_numpy(rows.ids).long(), torch.from_numpy(rows.trained)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE, weight_decay=0.0)
    losses = []
    for _ in range(num_steps):
        picked = torch.randint(len(ids), (NUM_ROWS,))
        loss = row_loss(base, ids[picked], trained[picked])  # peft has changed it in its place
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder, save_embedding_layers=False)
    return losses[0], statistics.mean(losses[-10:])


@contextmanager
def staged(folder: Path, base: BaseSpec, limit: int) -> Iterator[StagedAdapter]:
    """What an upload of the folder leaves under a limit of ranks, whatever its error."""
    with Staging(folder.parent / "staging", UploadLimits(max_import_error=0.9999)) as staging:
        for path in folder.iterdir():
            staging.add_file(path.name, [path.read_bytes()])
        yield staging.validate(base, limit)


def read_factors(adapter: StagedAdapter) -> None:
    """All linears' Kronecker products, of factors as they are or decomposed."""
    with safe_open(adapter.path, "pt") as file:
        names = set(file.keys())
        for delta in adapter.manifest.deltas:
            for layer in delta.layers:
                KroneckerProduct.read(lambda name: file.get_tensor(name).double().numpy(), names, layer, delta)


def make_pairs(adapter: StagedAdapter) -> None:
    """All linears' A and B, one after the other."""
    with safe_open(adapter.path, "pt") as file:
        for _ in read_pairs(file, adapter.manifest):
            pass


def seconds(work: Callable[[StagedAdapter], None], adapter: StagedAdapter) -> float:
    """Of doing it once."""
    start = time.perf_counter()
    work(adapter)
    return time.perf_counter() - start


def record_error(case: str, adapter: StagedAdapter, note: str) -> None:
    """Of the worst linear, as the version states it."""
    error = 100 * adapter.manifest.import_error
    record("lokr", case, "import_error", error, "%", note=f"{told(adapter)}; worst linear; {note}")


def told(adapter: StagedAdapter) -> str:
    """The ranks that are served, of those that the deltas have."""
    exact = max(delta.exact_rank or 0 for delta in adapter.manifest.deltas)
    return f"rank {adapter.manifest.rank} of {exact}"


def machine_load() -> str:
    """What the machine has and does, and NumPy's share of it."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "any")
    return f"{load()}, {gib:.0f} GiB; NumPy's threads: {threads}"


if __name__ == "__main__":
    main()
