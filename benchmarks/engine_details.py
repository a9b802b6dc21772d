"""What the table of `benchmarks.engine` leaves out: costs that should be none, latencies, and the host's work.

    python -m benchmarks.engine_details [--cases "host work,mixed ranks"] [--scratch DIR]
    python -m benchmarks.engine_details --shape tiny --layers 2 --rows 4 --live 3 --registered 12     # on a CPU

start: seconds from safetensors to an engine that is ready. host work: Python's milliseconds of a decode step at 256
rows, what it waits for the device left out. unused adapters: tokens/s without adapters in an engine that has slots for
them, over one that has none. mixed ranks: tokens/s over adapters of ranks 8, 16, 32 and 64 in turn, over that of as
many bytes at one rank. prefill: prompt tokens/s of 8 x 2,048 tokens over 8 adapters on NF4, over that of the bare bf16
base. first token: of one request of 128 tokens with nobody else there. registered: tokens/s over adapters that a
registry of 1,000 finds, over one that has no others. What is compared takes turns where both engines fit the device.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from adapters_store.accounts import Accounts
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.manifest import AdapterManifest
from adapters_store.registry import AdapterRegistry
from adapters_store.upload import StagedAdapter
from benchmarks.engine import (
    OUTPUT,
    PROMPT,
    RANK,
    START_TARGET,
    adapter_spec,
    bench_config,
    build_engine,
    free_device,
    label,
    make_parser,
    make_requests,
    page_bytes,
    run,
    write_adapters,
    write_base,
)
from benchmarks.record import record
from gateway.engine.interpreter import favour_steps
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef
from gateway.engine.transfers import HostCopy

RANKS, ONE_RANK = (8, 16, 32, 64), 30  # their mean
LONG_PROMPT, NUM_LONG = 2048, 8
ROUNDS = 5
NUM_FIRST_TOKENS = 50
UNUSED_TARGET, RANKS_TARGET, PREFILL_TARGET, REGISTERED_TARGET = 0.985, 0.9, 0.85, 0.97
FIRST_TOKEN_TARGET = 15.0  # ms


class Bench:
    """The engine of most cases, its adapters, and what it takes to build others beside it."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder = folder
        self.rows: int = args.rows
        self.live: int = args.live
        self.registered: int = args.registered
        self.suffix = label(args)
        self.blobs = BlobStore(f"file://{folder / 'blobs'}")
        self.base = write_base(folder / "base", args.layers, args.shape)
        target = None if self.suffix else START_TARGET
        config = replace(bench_config(self.base), host_cache_bytes=self.live * page_bytes(self.base))
        self.engine = build_engine(config, self.blobs, f"start nf4{self.suffix}", target)
        self.refs = write_adapters(self.blobs, folder, self.engine.model.spec, [RANK] * self.live)

    @contextmanager
    def beside(self, **settings: Any) -> Iterator[LLMEngine]:
        """Another engine, with room for 64 requests, while the first one keeps its memory."""
        config = replace(bench_config(self.base), kv_cache_tokens=32_768, **settings)
        engine = LLMEngine(config, self.blobs, lambda: None)
        try:
            yield engine
        finally:
            engine.close()

    def record(
        self, case: str, metric: str, value: float, unit: str, target: float | None = None, note: str = ""
    ) -> None:
        """A line of this subject."""
        target = None if self.suffix else target
        record("engine_details", f"{case}{self.suffix}", metric, value, unit, target=target, note=note)

    def compare(self, case: str, ours: Callable[[], float], other: Callable[[], float], target: float) -> None:
        """Record how much faster than the other ours is: the median over rounds, in which both take turns."""
        ours(), other()
        pairs = [(ours(), other()) for _ in range(ROUNDS)]
        ratios = [theirs / mine for mine, theirs in pairs]
        self.record(case, "seconds", statistics.median(mine for mine, _ in pairs), "s", note=f"median of {ROUNDS}")
        note = f"median of {ROUNDS} rounds in turn, from {min(ratios):.3f} to {max(ratios):.3f}"
        self.record(case, "ratio", statistics.median(ratios), "x", target=target, note=note)


def start(bench: Bench) -> None:
    """Recorded when the bench was made."""


def host_work(bench: Bench) -> None:
    """Decode steps of the most rows, without adapters and over all live ones, in a process set up as a replica's is."""
    favour_steps()
    for refs in ([None], bench.refs):
        host_seconds(bench.engine, refs, 4 * bench.rows)
        seconds = host_seconds(bench.engine, refs, 4 * bench.rows)
        case = f"host work {4 * bench.rows}x{len(refs) if refs != [None] else 0}"
        note = f"median of {len(seconds)} decode steps, at most {max(seconds) * 1e3:.2f}"
        bench.record(case, "host_step_ms", statistics.median(seconds) * 1e3, "ms", note=note)


def host_seconds(engine: LLMEngine, refs: Sequence[AdapterRef | None], num_requests: int) -> list[float]:
    """What each decode step of all rows takes, but for waiting."""
    run(engine, refs, num_requests, 2)
    for request, prompt in make_requests(refs, num_requests, OUTPUT // 4):
        engine.add(request, prompt)
    seconds = []
    with waits() as waited:
        while engine.has_work:
            waited.clear()
            begin = time.perf_counter()
            output = engine.step()
            spent = time.perf_counter() - begin - sum(waited)
            if output.num_tokens == output.num_sequences == num_requests:
                seconds.append(spent)
    return seconds


@contextmanager
def waits() -> Iterator[list[float]]:
    """The seconds of each wait for the device, as they come."""
    seconds: list[float] = []
    wait = HostCopy.wait

    def timed(copy: HostCopy) -> Any:
        begin = time.perf_counter()
        try:
            return wait(copy)
        finally:
            seconds.append(time.perf_counter() - begin)

    HostCopy.wait = timed  # type: ignore[method-assign, assignment]
    try:
        yield seconds
    finally:
        HostCopy.wait = wait  # type: ignore[method-assign]


def unused_adapters(bench: Bench) -> None:
    """The bare base in an engine with slots and in one without."""
    with bench.beside(num_adapter_slots=0, host_cache_bytes=0) as bare:
        bench.compare(
            f"unused adapters {bench.rows}x0",
            lambda: run(bench.engine, [None], bench.rows, OUTPUT),
            lambda: run(bare, [None], bench.rows, OUTPUT),
            UNUSED_TARGET,
        )


def mixed_ranks(bench: Bench) -> None:
    """Adapters of several ranks, and of their mean: the same bytes, and the same number of pages."""
    ranks = [*islice(cycle(RANKS), bench.live), *[ONE_RANK] * bench.live]
    refs = write_adapters(bench.blobs, bench.folder, bench.engine.model.spec, ranks)
    mixed, alike = refs[: bench.live], refs[bench.live :]
    room = {
        "num_adapter_slots": 2 * bench.live,
        "num_adapter_pages": 2 * 2 * bench.live,  # on average 2 each
        "max_lora_rank": max(RANKS),
        "host_cache_bytes": 32 * page_bytes(bench.base),
    }
    with bench.beside(**room) as engine:
        bench.compare(
            f"mixed ranks {bench.rows}x{bench.live}",
            lambda: run(engine, mixed, bench.rows, OUTPUT),
            lambda: run(engine, alike, bench.rows, OUTPUT),
            RANKS_TARGET,
        )
    for ref in {*refs} - {*bench.refs}:
        bench.blobs.delete(ref.digest)


def prefill(bench: Bench) -> None:
    """Long prompts over a few adapters, and on the bare base in bf16."""
    ours = prefill_seconds(bench.engine, bench.refs[:NUM_LONG])
    with bench.beside(quantization="none", num_adapter_slots=1, host_cache_bytes=0) as dense:
        theirs = prefill_seconds(dense, [None])
    note = f"median of {ROUNDS} each, one engine after the other"
    for case, seconds in ((f"prefill {NUM_LONG}x{NUM_LONG} nf4", ours), (f"prefill {NUM_LONG}x0 bf16", theirs)):
        bench.record(case, "tokens_per_s", NUM_LONG * LONG_PROMPT / seconds, "1/s", note=note)
    bench.record(f"prefill {NUM_LONG}x{NUM_LONG} nf4", "ratio", theirs / ours, "x", target=PREFILL_TARGET, note=note)


def prefill_seconds(engine: LLMEngine, refs: Sequence[AdapterRef | None]) -> float:
    """To the first tokens of all prompts, once adapters are there and kernels compiled."""
    run(engine, refs, NUM_LONG, 1, LONG_PROMPT)
    return statistics.median(run(engine, refs, NUM_LONG, 1, LONG_PROMPT) for _ in range(ROUNDS))


def first_token(bench: Bench) -> None:
    """One request after the other."""
    seconds = [run(bench.engine, [None], 1, 1) for _ in range(NUM_FIRST_TOKENS + 3)][3:]
    note = f"median of {len(seconds)}, at most {max(seconds) * 1e3:.1f}; {PROMPT} tokens, concurrency 1"
    p50 = statistics.median(seconds) * 1e3
    bench.record("first token 1x0", "first_token_ms", p50, "ms", target=FIRST_TOKEN_TARGET, note=note)


def registered(bench: Bench) -> None:
    """The live adapters by name through a registry that has no others, and one that has many, small ones."""
    few, many = bench.folder / "few", bench.folder / "many"
    publish(bench, few, bench.refs, 0)
    shutil.copytree(few, many)
    spec = bench.engine.model.spec
    small = replace(spec, num_layers=1, linears={"q_proj": spec.linears["q_proj"]})
    idle = write_adapters(bench.blobs, bench.folder, small, [1])
    publish(bench, many, idle * (bench.registered - bench.live), bench.live)
    among_few, among_many = (AdapterRegistry(open_database(folder), bench.blobs) for folder in (few, many))
    bench.compare(
        f"registered {bench.rows}x{bench.live} of {bench.registered}",
        lambda: resolve_and_run(bench, among_many),
        lambda: resolve_and_run(bench, among_few),
        REGISTERED_TARGET,
    )


def open_database(folder: Path) -> Database:
    """A registry's tables in a folder."""
    folder.mkdir(exist_ok=True)
    return Database(f"sqlite:///{folder / 'registry.db'}")


def publish(bench: Bench, folder: Path, refs: Sequence[AdapterRef], first: int) -> None:
    """Register stored adapters as t/a<first> and on, as an upload does once it is checked."""
    database = open_database(folder)
    if first == 0:
        database.upgrade()
        Accounts(database).create_tenant("t")
    registry = AdapterRegistry(database, bench.blobs)
    for number, ref in enumerate(refs, first):
        path = bench.blobs.local_path(ref.digest)
        spec = adapter_spec(bench.engine.model.spec, ref.rank)
        size = path.stat().st_size
        manifest = AdapterManifest(**spec.model_dump(), digest=ref.digest, num_parameters=size // 2, size_bytes=size)
        registry.publish("t", f"a{number}", StagedAdapter(manifest, path))
    database.dispose()


def resolve_and_run(bench: Bench, registry: AdapterRegistry) -> float:
    """Resolve each request's adapter, as a front door does, and serve them. Returns seconds."""
    begin = time.perf_counter()
    versions = [registry.resolve("t", f"t/a{i % bench.live}") for i in range(bench.rows)]
    refs = [AdapterRef.of(version.ref, version.manifest) for version in versions]
    return time.perf_counter() - begin + run(bench.engine, refs, bench.rows, OUTPUT)


CASES: dict[str, Callable[[Bench], None]] = {
    "start": start,
    "host work": host_work,
    "unused adapters": unused_adapters,
    "mixed ranks": mixed_ranks,
    "prefill": prefill,
    "first token": first_token,
    "registered": registered,
}


def main() -> None:
    """Build the engine that most cases share, then measure them."""
    parser = make_parser(__doc__, ",".join(CASES))
    parser.add_argument("--rows", type=int, default=64, help="requests at once; four times as many for the host's work")
    parser.add_argument("--live", type=int, default=64, help="distinct adapters")
    parser.add_argument("--registered", type=int, default=1000)
    args = parser.parse_args()
    cases = [CASES[name] for name in args.cases.split(",")]
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        bench = Bench(Path(name), args)
        for case in cases:
            case(bench)
            free_device()
        bench.engine.close()


if __name__ == "__main__":
    main()
