"""What all rounds of a run are held against: no memory and no request is left behind, and tokens are those of alone."""

from __future__ import annotations

import gc
import os
import resource
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from random import Random

from gateway.config import EngineConfig
from gateway.engine.llm_engine import LLMEngine
from tests.soak.alone import Alone, is_reproducible
from tests.soak.ledger import Ledger
from tests.soak.traffic import World

WARM_ROUNDS = 3  # by then whatever is made once has been made
SHARE_CHECKED = 0.25
OURS = ("gateway.", "adapters_store.", "lora_kernels.", "torch.", "threading.Thread")


class Run:
    """Rounds until the time is over, and what is held against them all."""

    def __init__(self, world: World, device: str, seconds: float) -> None:
        self.world = world
        self.device = device
        self.reasons: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self._seconds = seconds
        self._alone = {dtype: Alone(world, device, dtype) for dtype in ("auto", "int8")}
        self._baseline: Counter[str] | None = None
        self._memory = 0

    def rounds(self) -> Iterator[tuple[Random, str]]:
        """A random source for each round, and what its requests are called. Checks memory after each."""
        first = os.environ.get("PATCHBAY_SOAK_SEED")
        seed = int(first) if first else secrets.randbits(32) if self._seconds > 60 else 0
        end = time.monotonic() + self._seconds
        for i in count():
            print(f"round {i}: PATCHBAY_SOAK_SEED={seed + i}", flush=True)
            yield Random(seed + i), str(i)
            self.check_memory(i)
            if time.monotonic() > end:
                break
        self._report(i + 1)

    def finish_life(self, engine: LLMEngine, ledger: Ledger) -> None:
        """Count what an engine did that is over, after its ledger was checked."""
        stats = engine.stats()
        self.seen.update(
            lives=1,
            tokens=stats.generation_tokens,
            preemptions=stats.num_preemptions,
            evictions=stats.adapter_evictions,
            loaded_blocks=stats.kv_host_loaded,
            cached_tokens=stats.prefix_hits,
        )
        self.reasons.update(ledger.reasons)

    def check_sample(self, rng: Random, config: EngineConfig, ledger: Ledger) -> None:
        """Hold some of the requests that give the same each time against what they give alone."""
        for story in ledger.ended.values():
            has_adapter = story.request.adapter in (None, *self.world.sound)
            if has_adapter and is_reproducible(story.request) and rng.random() < SHARE_CHECKED:
                self.seen["compared"] += self._alone[config.adapter_dtype].check(story)

    def check_memory(self, number: int) -> None:
        """Assert that rounds leave no objects and no threads behind."""
        census = take_census()
        if number == WARM_ROUNDS:
            self._baseline, self._memory = census, peak_memory()
        if self._baseline is not None:
            grown = census - self._baseline
            assert grown.total() < 100, f"left behind: {grown.most_common(8)}"

    def close(self) -> None:
        """Stop the engines that served requests alone."""
        for alone in self._alone.values():
            alone.close()

    def _report(self, num_rounds: int) -> None:
        grown = (peak_memory() - self._memory) >> 20 if self._memory else 0
        print(f"{num_rounds} rounds, {dict(self.seen)}, ends {dict(self.reasons)}, peak memory grew by {grown} MiB")


@contextmanager
def run_of(world: World, device: str, seconds: float) -> Iterator[Run]:
    """A run, whose engines are stopped at its end. What was there before it is not collected, nor counted."""
    run = Run(world, device, seconds)
    gc.collect()
    gc.freeze()
    try:
        yield run
    finally:
        gc.unfreeze()
        run.close()


def take_census() -> Counter[str]:
    """How many objects of our own classes are alive, and tensors and threads."""
    gc.collect()
    kinds = Counter(type(thing) for thing in gc.get_objects())
    names = ((f"{kind.__module__}.{kind.__name__}", n) for kind, n in kinds.items())
    return Counter({name: n for name, n in names if name.startswith(OURS)})


def peak_memory() -> int:
    """Of the process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def check_idle(engine: LLMEngine) -> None:
    """Assert that an engine without requests holds no block, page, pin, host memory or request."""
    residency, cache = engine.residency, engine.host_cache
    while cache._loading:
        time.sleep(0.001)
    residency.poll()  # lets go what was loaded for those who are gone,
    residency.poll()  # and what had been asked for since the poll before
    while residency.is_copying:
        residency.poll()
    engine.check_integrity()
    assert not residency._loading
    assert residency._host_pages == 0
    gc.collect()
    kept = sum(len(image.pages) for image in cache._kept.values())
    assert cache._memory.num_free + kept == cache.num_pages
