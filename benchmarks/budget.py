"""One budget of adapters' pages and KV cache: shared documents and adapters in turn, with lending and without.

    python -m benchmarks.budget [--documents 48] [--requests 200] [--adapters 16] [--layers 32] [--scratch /dev/shm]
        [--kv-host-bytes 0]

On one GPU a base of Llama-3.1-8B's shape, elsewhere the embedded one. The cache has of its own what runs and half of
the documents take, the adapters (rank 16) pages for all. Turns of `--requests` requests, eight at a time: of the bare
base, each over a document drawn at random; of adapters, each drawn at random; of the base again. Both engines have the
same memory and answer the same requests. Of each turn are recorded the share of the prompts' tokens that the prefix
cache had, the time to the first token, and preemptions.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import bench_config, free_device, write_adapters, write_base
from benchmarks.record import record
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams

DOCUMENT, QUESTION, OUTPUT, AT_ONCE = 512, 16, 16, 8


def main() -> None:
    """Serve the turns with both engines, and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-host-bytes", type=int, default=0, help="of the cache's second tier")
    parser.add_argument("--scratch", type=Path, help="where the base and the adapters are written")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        blobs = BlobStore(f"file://{folder / 'blobs'}")
        base = write_base(folder / "base", args.layers) if on_gpu else Path("embedded")
        running = AT_ONCE * (DOCUMENT + QUESTION + OUTPUT)
        config = replace(
            bench_config(base),
            kv_cache_tokens=running + args.documents * DOCUMENT // 2,
            kv_host_bytes=args.kv_host_bytes,
            enable_prefix_caching=True,
            num_adapter_slots=args.adapters,
        )
        refs: list[AdapterRef] = []
        for lends in (False, True):
            engine = LLMEngine(replace(config, lend_adapter_pages=lends), blobs, lambda: None)
            refs = refs or write_adapters(blobs, folder, engine.model.spec, [16] * args.adapters)
            case = f"{'lent' if lends else 'apart'}, {'8B' if on_gpu else 'embedded'}"
            case += ", host tier" if args.kv_host_bytes else ""
            note = f"{args.documents} documents of {DOCUMENT} tokens, {args.adapters} adapters"
            Bench(engine, args.documents, args.requests).measure(case, refs, note)
            engine.close()
            del engine
            free_device()


class Bench:
    """An engine, and the same random requests for each that is made."""

    def __init__(self, engine: LLMEngine, num_documents: int, num_requests: int) -> None:
        self._engine = engine
        self._random = np.random.default_rng(0)
        self._num_requests = num_requests
        self._documents = self._random.integers(10, 1000, (num_documents, DOCUMENT)).tolist()

    def measure(self, case: str, refs: Sequence[AdapterRef], note: str) -> None:
        """Record each turn; the first of all is not counted, as kernels are compiled in it and all is loaded."""
        for turn, adapters in (("", ()), ("base", ()), ("adapters", refs), ("base again", ())):
            before = self._engine.stats()
            waits = self._serve(adapters)
            after = self._engine.stats()
            if not turn:
                continue
            queries = after.prefix_queries - before.prefix_queries
            hits = (after.prefix_hits - before.prefix_hits) / queries
            named = f"{case}, {turn}"
            record("budget", named, "prefix_hits", hits, "share", note=note)
            for percent in (50, 99):
                record("budget", named, f"ttft_p{percent}", float(np.percentile(waits, percent)) * 1e3, "ms", note=note)
            preemptions = after.num_preemptions - before.num_preemptions
            record("budget", named, "preemptions", float(preemptions), "", note=note)
            record("budget", named, "lent_pages", float(after.lent_pages), f"of {after.adapter_pages}", note=note)

    def _serve(self, adapters: Sequence[AdapterRef]) -> list[float]:
        """Seconds from each request's arrival to its first token; one comes as soon as another has ended."""
        params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
        came: dict[str, float] = {}
        waits: dict[str, float] = {}
        for _ in range(self._num_requests):
            self._run(AT_ONCE - 1, came, waits)
            document = self._documents[self._random.integers(len(self._documents))]
            prompt = [*document, *self._random.integers(10, 1000, QUESTION).tolist()]
            adapter = adapters[self._random.integers(len(adapters))] if adapters else None
            request = GenerateRequest(str(time.monotonic_ns()), params, prompt=prompt, adapter=adapter)
            came[request.request_id] = time.perf_counter()
            self._engine.add(request, prompt)
        self._run(0, came, waits)
        return list(waits.values())

    def _run(self, most: int, came: dict[str, float], waits: dict[str, float]) -> None:
        """Until no more than so many requests have not ended."""
        while self._engine.num_unfinished > most:
            output = self._engine.step()
            for delta in output.deltas:
                assert delta.error is None, delta.error
                waits.setdefault(delta.request_id, time.perf_counter() - came[delta.request_id])
            if output.num_tokens == 0:
                time.sleep(self._engine.poll_interval)


if __name__ == "__main__":
    main()
