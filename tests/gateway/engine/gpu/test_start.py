"""What an engine on a GPU has done by the time that it is ready."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from adapters_store.blobs import BlobStore
from benchmarks.engine import write_adapter
from tests.gateway.engine.gpu.serving import engine_with, random_prompts, serve

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("settings", [{}, {"adapter_dtype": "int8"}, {"batch_invariant": True}], ids=str)
def test_serving_compiles_no_kernel(tmp_path: Path, settings: dict[str, Any]) -> None:
    # In a process of its own, where no other test has compiled any.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        at_the_start, afterwards = process.submit(_compiled, tmp_path, settings).result()
    assert {"_rms_norm_kernel", "_expand_kernel"} <= at_the_start
    assert any(name.endswith(".cu") for name in at_the_start)
    assert afterwards == set()


def _compiled(folder: Path, settings: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The kernels that were compiled when an engine was ready, with empty caches, and those that serving compiled."""
    os.environ["XDG_CACHE_HOME"], os.environ["TRITON_CACHE_DIR"] = str(folder), str(folder / "triton")
    import triton

    from lora_kernels import nvrtc

    compiled: set[str] = set()
    make = nvrtc.compile_cubin

    def make_noted(source: str, *how: Any) -> bytes:
        compiled.add(source)
        return make(source, *how)

    nvrtc.compile_cubin = make_noted
    triton.knobs.compilation.listener = lambda **what: compiled.add(what["src"].name)
    blobs = BlobStore(f"file://{folder / 'blobs'}")
    engine = engine_with(blobs, "embedded", device="cuda", dtype="bfloat16", quantization="nf4", **settings)
    at_the_start = compiled.copy()
    compiled.clear()
    refs = [write_adapter(blobs, folder, engine.model.spec, 16, i) for i in range(12)]
    for length in (1, 40, 700, 1000):
        serve(engine, random_prompts(3, length), 4)
        serve(engine, random_prompts(3, length), 4, refs[:1])
        serve(engine, random_prompts(12, length), 4, refs)
    engine.close()
    return at_the_start, compiled
