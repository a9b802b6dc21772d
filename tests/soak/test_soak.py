"""Engines under random load, faults and kills: all that was accepted ends once, and nothing is lost or left behind.

    pytest tests/soak                  # the short version, part of every run
    pytest tests/soak -m soak -s       # the long one, half an hour: PATCHBAY_SOAK_SECONDS says otherwise

Each round is one seed: an engine of random settings serves random calls, is drained or killed, and a successor takes
what was lost. A failure prints its seed; PATCHBAY_SOAK_SEED=<seed> runs that round first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import fields
from random import Random

import pytest
import torch

from gateway.embedded import embedded_path
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from tests.soak.by_hand import ByHand
from tests.soak.run import Run, run_of
from tests.soak.threaded import Threaded
from tests.soak.traffic import PROMPT_FIELDS, REQUEST, SAMPLING, Call, World, again, random_calls
from tests.tiny import make_base

NUM_CALLS = 40
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
long = [pytest.mark.soak, pytest.mark.timeout(0)]
LONG_SECONDS = float(os.environ.get("PATCHBAY_SOAK_SECONDS", 1800)) / 2  # there are two tests
RUNS = [
    pytest.param("cpu", 8, id="short"),
    pytest.param("cpu", LONG_SECONDS, id="long", marks=long),
    pytest.param("cuda", 60, id="short-cuda", marks=on_gpu),
    pytest.param("cuda", LONG_SECONDS, id="long-cuda", marks=[*on_gpu, *long]),
]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    """The world of a device, made once: kernels want wider heads than the tiny base's."""
    made: dict[str, World] = {}

    def world_of(device: str) -> World:
        if device not in made:
            folder = tmp_path_factory.mktemp(device)
            base = make_base(folder / "base") if device == "cpu" else embedded_path()
            made[device] = World.make(base, folder)
        return made[device]

    return world_of


def live_and_die(run: Run, rng: Random, tag: str) -> None:
    """A few engines one after the other; what one's end has cut off the next one takes."""
    lost: list[Call] = []
    for life in range(rng.randint(1, 3)):
        engine = ByHand(run, rng)
        for burst in range(rng.randint(1, 3)):
            fresh = random_calls(rng, run.world, NUM_CALLS // 2, f"{tag}.{life}.{burst}")
            calls = [*(again(call, "'") for call in lost), *fresh]
            is_done = engine.serve(calls, rng.choice([None, rng.randint(0, 60)]))
            lost = [] if is_done else engine.kill()
            if lost and rng.random() < 0.5:
                break  # else the engine itself goes on, as `LLM`'s does
        engine.close()


@pytest.mark.parametrize(("device", "seconds"), RUNS)
def test_an_engine_stepped_by_hand(worlds: Callable[[str], World], device: str, seconds: float) -> None:
    with run_of(worlds(device), device, seconds) as run:
        for rng, tag in run.rounds():
            live_and_die(run, rng, tag)


@pytest.mark.parametrize(("device", "seconds"), RUNS)
async def test_an_engine_on_its_thread(
    worlds: Callable[[str], World], device: str, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "gateway.engine.async_engine")  # records of faults would keep their engines
    with run_of(worlds(device), device, seconds) as run:
        for rng, tag in run.rounds():
            calls = random_calls(rng, run.world, NUM_CALLS, tag)
            await Threaded(run, rng, calls).serve(rng.randint(0, 3))


def test_the_load_gives_every_parameter_that_there_is() -> None:
    assert set(SAMPLING) == {field.name for field in fields(SamplingParams)}
    assert set(REQUEST) | PROMPT_FIELDS == {field.name for field in fields(GenerateRequest)}
