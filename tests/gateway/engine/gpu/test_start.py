"""What an engine on a GPU has done by the time that it is ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters_store.blobs import BlobStore
from benchmarks.engine import write_adapter
from lora_kernels import nvrtc
from tests.gateway.engine.gpu.serving import engine_with, random_prompts, serve

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("settings", [{}, {"adapter_dtype": "int8"}, {"batch_invariant": True}], ids=str)
def test_serving_compiles_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    import triton

    compiled: list[str] = []
    make = nvrtc.compile_cubin

    def make_noted(source: str, *how: Any) -> bytes:
        compiled.append(source)
        return make(source, *how)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_cubin", make_noted)
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "triton"))
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **what: compiled.append(what["src"].name))
    engine = engine_with(blobs, "embedded", device="cuda", dtype="bfloat16", quantization="nf4", **settings)
    refs = [write_adapter(blobs, tmp_path, engine.model.spec, 16, i) for i in range(12)]
    assert compiled
    compiled.clear()
    for length in (1, 40, 700, 1000):
        serve(engine, random_prompts(3, length), 4)
        serve(engine, random_prompts(3, length), 4, refs[:1])
        serve(engine, random_prompts(12, length), 4, refs)
    engine.close()
    assert compiled == []
