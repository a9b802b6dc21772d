"""The host's part of a step in the scheduler: what it costs while many wait, on the CPU and without a model's work.

    python -m benchmarks.scheduler [--waiting 4000] [--steps 300]

`schedule` is the time of one `Scheduler.schedule()` with all of 256 sequences decoding (full), or with a place free
while all that wait need an adapter's slot that others hold (blocked). `admit` is the time for each sequence that a step
takes out of the queue, `cancel` for each that goes away while it waits. Of an engine of several ranks, `announce` is
what rank 0 takes to tell the others of a step of 256 rows whose tokens are on their way, `hear` what they take to read
it and lay out its tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import write_adapter
from benchmarks.record import record
from gateway.config import EngineConfig
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.mirror import Announcer, Mirror
from gateway.engine.pending import PendingTokens
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.scheduler_output import SchedulerOutput
from gateway.engine.stats import StepOutput
from gateway.engine.step_tokens import StepTokens

NUM_SEQS, PROMPT = 256, 8
MAX_TOKENS = 1000  # none ends while it is timed


def main() -> None:
    """Time each case and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), args.steps)
        bench.full(0, 1)
        bench.full(args.waiting, 1)
        bench.full(args.waiting, args.waiting // 4)
        bench.announce()
        bench.blocked(args.waiting)
        bench.admit(args.waiting, 1)
        bench.admit(args.waiting, args.waiting // 4)
        bench.cancel(args.waiting)


class Bench:
    """An engine on the embedded base, of which only the scheduler runs."""

    def __init__(self, folder: Path, steps: int) -> None:
        blobs = BlobStore(f"file://{folder / 'blobs'}")
        config = EngineConfig(device="cpu", max_num_seqs=NUM_SEQS, kv_cache_tokens=NUM_SEQS * 512, num_adapter_slots=1)
        self.engine = LLMEngine(config, blobs, lambda: None)
        self.refs = [write_adapter(blobs, folder, self.engine.model.spec, 8, i) for i in range(2)]
        self.steps = steps
        self.num_added = 0

    def full(self, waiting: int, tenants: int) -> None:
        """All places are taken, by one tenant."""
        self.add(NUM_SEQS)
        self.turn()
        self.add(waiting, tenants)
        self.record_schedule(f"full, {waiting} waiting of {tenants} tenants")

    def announce(self) -> None:
        """All places are taken, and another rank hears of the steps."""
        self.add(NUM_SEQS)
        announcer, mirror, slots = Announcer(), Mirror(), self.engine.runner.slots
        times, num_bytes, in_flight = [], 0, torch.zeros(NUM_SEQS, dtype=torch.int64)
        for _ in range(self.steps):
            output = self.turn()[1]
            is_decode = len(output.rows) == NUM_SEQS
            pending = PendingTokens(in_flight, np.arange(NUM_SEQS)) if is_decode else None
            start = time.perf_counter()
            data = ForkingPickler.dumps(announcer.news(output, pending, slots))
            told = time.perf_counter()
            heard = mirror.output(ForkingPickler.loads(data))
            StepTokens.of(heard, pending, self.engine.blocks.block_size)
            if is_decode:
                times.append((told - start, time.perf_counter() - told))
                num_bytes += len(data)
        for metric, seconds in zip(("announce", "hear"), zip(*times, strict=True), strict=True):
            note = f"median of {len(times)} steps of {num_bytes // len(times):,} bytes"
            record("scheduler", f"{NUM_SEQS} rows", metric, statistics.median(seconds) * 1e6, "us", note=note)
        self.clear()

    def blocked(self, waiting: int) -> None:
        """One place is free, and all that wait need the slot of an adapter that runs."""
        for ref in self.refs:
            self.engine.host_cache.get(ref.digest).result()
        self.add(NUM_SEQS - 1, adapter=self.refs[0])
        while len(self.engine.scheduler.running) < NUM_SEQS - 1:
            self.turn()
        self.add(waiting, adapter=self.refs[1])
        self.record_schedule(f"blocked, {waiting} waiting for a slot")

    def admit(self, waiting: int, tenants: int) -> None:
        """Steps that fill all places."""
        self.add(waiting, tenants)
        times = []
        while len(self.engine.scheduler.waiting) >= NUM_SEQS:
            seconds, output = self.turn()
            times.append(seconds / len(output.scheduled) * 1e6)
            for chunk in output.scheduled:
                self.engine.cancel(chunk.sequence.request.request.request_id, StepOutput())
        record("scheduler", f"{waiting} waiting of {tenants} tenants", "admit", statistics.median(times), "us")
        self.clear()

    def cancel(self, waiting: int) -> None:
        """Callers that go away, the last first."""
        self.add(waiting)
        names = [running.request.request_id for running in self.engine._requests.values()]
        start = time.perf_counter()
        for name in reversed(names):
            self.engine.cancel(name, StepOutput())
        seconds = (time.perf_counter() - start) / waiting
        record("scheduler", f"{waiting} waiting of 1 tenants", "cancel", seconds * 1e6, "us", note="mean of all")

    def record_schedule(self, case: str) -> None:
        times = [self.turn()[0] * 1e6 for _ in range(self.steps)]
        note = f"median of {self.steps} steps, 95th percentile {statistics.quantiles(times, n=20)[-1]:.0f}"
        record("scheduler", case, "schedule", statistics.median(times), "us", note=note)
        self.clear()

    def turn(self) -> tuple[float, SchedulerOutput]:
        """A step of which only the schedule is timed (seconds); each row's token is made up."""
        scheduler = self.engine.scheduler
        start = time.perf_counter()
        output = scheduler.schedule()
        seconds = time.perf_counter() - start
        scheduler.update(output)
        for sequence in output.sampled:
            sequence.token_ids.append(7)
        return seconds, output

    def add(self, number: int, tenants: int = 1, adapter: AdapterRef | None = None) -> None:
        params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
        for i in range(number):
            self.num_added += 1
            prompt = [10 + self.num_added // 500**j % 500 for j in range(PROMPT)]
            request = GenerateRequest(
                str(self.num_added), params, prompt=prompt, adapter=adapter, tenant=f"tenant{i % tenants}"
            )
            self.engine.add(request, prompt)

    def clear(self) -> None:
        self.engine.abort_all("cancelled", None)
        self.engine.check_integrity()


if __name__ == "__main__":
    main()
