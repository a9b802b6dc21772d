"""What guessing ahead costs when no guess comes true, and what it gives where most do.

    python -m benchmarks.speculation [--layers 32] [--cost 1x0,1x4,64x0,64x3] [--copy 1x0,1x4,16x0,16x4]

Cost, on a GPU at Llama-3.1-8B's shape: a case RxK is R requests of `benchmarks.engine`, each of which has K tokens
guessed in every step, all of them wrong: the step beside that of Rx0 says how many must come true to be worth it.
Random weights repeat nothing that a look-up could find, so that the guesses are made up here, and the rule that stops
guessing is out.

Copying, on the embedded base and any device: R users at a time ask for phrases of eight words to be repeated, with up
to K tokens guessed ahead; tokens/s over all phrases, and the share of guesses that came true.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Final

import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import OUTPUT, SHORT, bench_config, drain, make_requests, write_base
from benchmarks.record import record
from gateway.embedded.vocabulary import ADJECTIVES, ANIMALS, THINGS
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.prompt_lookup import PromptLookup
from gateway.engine.sampling_params import SamplingParams
from gateway.llm import LLM

NUM_PHRASES, NUM_WORDS, REPEATS = 64, 8, 3
NEVER: Final = 3  # a token that random weights pick one time in 128,256


class WrongGuesses(PromptLookup):
    """Guesses in every step, and never right."""

    def guess(self) -> list[int]:
        """As many tokens as were asked for."""
        return [NEVER] * self._most


def main() -> None:
    """Run the cases and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--cost", default="1x0,1x1,1x4,1x8,16x0,16x4,16x8,64x0,64x1,64x3")
    parser.add_argument("--copy", default="1x0,1x4,1x8,16x0,16x4,16x8")
    args = parser.parse_args()
    measure_copying(_cases(args.copy))
    if torch.cuda.is_available():
        measure_cost(_cases(args.cost), args.layers)


def _cases(text: str) -> list[tuple[int, int]]:
    return [(int(left), int(right)) for left, right in (case.split("x") for case in text.split(",") if case)]


def measure_cost(cases: list[tuple[int, int]], layers: int) -> None:
    """The decode step of each case, guesses all wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        blobs = BlobStore(f"file://{folder / 'blobs'}")
        engine = LLMEngine(bench_config(write_base(folder / "base", layers)), blobs, lambda: None)
        for num_requests, guessed in cases:
            _run(engine, num_requests, guessed, SHORT)
            short, long = (
                min(_run(engine, num_requests, guessed, output) for _ in range(2)) for output in (SHORT, OUTPUT)
            )
            step = (long - short) / (OUTPUT - SHORT) * 1e3
            note = "128 in, 256 out, every guess wrong, best of 2"
            record("speculation", f"{num_requests}x{guessed} nf4 wrong", "decode_step_ms", step, "ms", note=note)
        engine.close()


def _run(engine: LLMEngine, num_requests: int, guessed: int, output: int) -> float:
    """Serve one case to its end. Returns seconds."""
    for request, prompt in make_requests([None], num_requests, output, num_speculative_tokens=guessed):
        engine.add(request, prompt)
    for sequence in engine.scheduler.waiting if guessed else ():
        sequence.lookup = WrongGuesses(sequence.token_ids, guessed)
    torch.cuda.synchronize()
    start = time.perf_counter()
    drain(engine)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_copying(cases: list[tuple[int, int]]) -> None:
    """tokens/s of each case, the best of some runs in turn, and how many guesses came true."""
    random = Random(0)
    words = [*THINGS, *ADJECTIVES, *ANIMALS]
    tasks = [f"Repeat: {' '.join(random.choices(words, k=NUM_WORDS))}" for _ in range(NUM_PHRASES)]
    with LLM("embedded", enable_prefix_caching=False) as llm:
        for case in cases:
            _copy(llm, tasks, *case)
        runs = [{case: _copy(llm, tasks, *case) for case in cases} for _ in range(REPEATS)]
    note = f"{NUM_PHRASES} phrases of {NUM_WORDS} words, greedy, best of {REPEATS}"
    for case in cases:
        rate, share = max(run[case] for run in runs)
        name = f"{case[0]}x{case[1]} embedded copy"
        record("speculation", name, "tokens_per_s", rate, "1/s", note=note)
        if case[1]:
            record("speculation", name, "accepted_share", share, "", note=note)


def _copy(llm: LLM, tasks: list[str], at_once: int, guessed: int) -> tuple[float, float]:
    """(tokens/s, share of the guesses that came true) over all tasks."""
    params = SamplingParams(temperature=0, max_tokens=64, num_speculative_tokens=guessed)
    chats = [[{"role": "user", "content": task}] for task in tasks]
    start = time.perf_counter()
    outputs = [output for i in range(0, len(chats), at_once) for output in llm.chat(chats[i : i + at_once], params)]
    seconds = time.perf_counter() - start
    usages = [output.usage for output in outputs if output.usage is not None]
    accepted = sum(usage.accepted_tokens for usage in usages)
    tried = accepted + sum(usage.rejected_tokens for usage in usages)
    return sum(usage.completion_tokens for usage in usages) / seconds, accepted / max(1, tried)


if __name__ == "__main__":
    main()
