"""The kernels of the GPU path compile, also on a machine without a GPU."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

needs_nvrtc = pytest.mark.skipif(
    not (find_spec("cuda") and find_spec("nvidia")), reason="needs NVRTC, which is there on Linux only"
)

COMPILE = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lora_kernels import triton_decode, triton_expand, triton_nf4, triton_prefill, triton_shrink

def build(kernel, pointers, constants, num_warps, num_stages=3):
    kind = lambda name: "constexpr" if name in constants else pointers.get(name, "i32")
    signature = {name: kind(name) for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): constants[name] for name in kernel.arg_names if name in constants}
    source = ASTSource(kernel, signature, constexprs=values)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)

nf4 = {"packed_ptr": "*u8", "absmax_ptr": "*fp32", "code_ptr": "*fp32", "out_ptr": "*bf16"}
build(triton_nf4._unpack_kernel, nf4, {"BLOCKS": 32}, 4)
sgmv = {"order_ptr": "*i32", "table_ptr": "*i32", "h_ptr": "*fp32"}
sgmv |= {"x_ptr": "*bf16", "a_ptr": "*bf16", "b_ptr": "*bf16", "y_ptr": "*bf16"}
flags = {"PDL": CAPABILITY >= 90, "HAS_SCALES": False, "HAS_BIAS": False, "ACTIVATION": "none"}
flags |= {"scale_ptr": None, "bias_ptr": None}
for chunk, shrink, expand in (
    (16, triton_shrink._SHRINK_FEW, triton_expand._EXPAND_SHORT),
    (16, triton_shrink._SHRINK_MANY, triton_expand._EXPAND_SHORT),
    (64, triton_shrink._SHRINK_LONG, triton_expand._EXPAND_LONG),
):
    sizes = flags | {"IN": 4096, "NUM_SLICES": 3, "SLICES": 4 if shrink.fuse_slices else 1, "PARTS": 4, "CHUNK": chunk}
    sizes |= {"SPLIT_IN": shrink.split_in, "VECTOR_IN": shrink.vector_in, "TILE_IN": shrink.tile_in}
    sizes |= {"STREAMED": shrink.streamed}
    build(triton_shrink._shrink_kernel, sgmv, sizes, 4)
    sizes = flags | {"WIDTH_0": 4096, "WIDTH_1": 1024, "WIDTH_2": 1024, "CHUNK": chunk, "ROWS": min(chunk, 32)}
    sizes |= {"VECTOR_OUT": expand.vector_out, "TILE_OUT": expand.tile_out, "TILES_OUT": expand.tiles_out, "PLANES": 8}
    sizes |= {"PAGES": triton_expand._PAGES}
    build(triton_expand._expand_kernel, sgmv, sizes, 4)
sizes = flags | {"NUM_SLICES": 3, "PLANES": 2, "CHUNK": 64}
build(triton_shrink._columns_kernel, sgmv | {"out_ptr": "*bf16"}, sizes, 4)

from lora_kernels import triton_activation, triton_norm, triton_rotary, triton_vectors
norm, gate = triton_norm._rms_norm_kernel, triton_activation._silu_mul_kernel
rotary, affine = triton_rotary._rotary_store_kernel, triton_vectors._apply_vectors_kernel
rows = {name: "*bf16" for kernel in (norm, gate, rotary) for name in kernel.arg_names if name.endswith("_ptr")}
rows |= {"slot_ptr": "*i32", "place_ptr": "*i64", "eps": "fp32"}
for vectors in ({}, {"slot_ptr": None, "scale_ptr": None, "bias_ptr": None}):
    for delta in ({}, {"delta_ptr": None}):
        build(norm, rows, vectors | delta | {"BLOCK": 4096}, 4)
    for head_norm in ({}, {"weight_ptr": None}):
        sizes = vectors | head_norm | {"BLOCK_SIZE": 16, "HEADS": triton_rotary._HEADS, "HALF": 64}
        build(rotary, rows, sizes | {"scales_ptr": None}, 4)
        if CAPABILITY >= 89:
            build(rotary, rows | {"k_cache_ptr": "*fp8e4nv", "v_cache_ptr": "*fp8e4nv"}, sizes, 4)
    build(gate, rows, vectors | {"BLOCK": triton_activation._BLOCK}, 4)
build(affine, rows, {"BLOCK": triton_vectors._BLOCK}, 4)

from lora_kernels import triton_argmax
largest = {"logits_ptr": "*bf16", "highest_ptr": "*fp32", "index_ptr": "*i64"}
build(triton_argmax._argmax_kernel, largest, {"BLOCK": triton_argmax._BLOCK}, 16)

from lora_kernels import triton_blocks
for word in ("*i64", "*u8"):
    moved = {"table_ptr": "*i64", "block_ids_ptr": "*i64", "packed_ptr": word}
    for gather in (True, False):
        build(triton_blocks._move_kernel, moved, {"GATHER": gather, "BLOCK": triton_blocks._BLOCK}, 4)

cache = {"q_ptr": "*bf16", "k_cache_ptr": "*bf16", "v_cache_ptr": "*bf16", "out_ptr": "*bf16"}
lists = ["tiles", "pieces", "arrived", "block_table", "context_len", "query_start"]
cache |= {name + "_ptr": "*i32" for name in lists} | {"scale": "fp32"}
heads = {"NUM_KV_HEADS": 8, "GROUP_SIZE": 4, "HEAD_DIM": 128, "BLOCK_SIZE": 16, "GROUP": 4, "BLOCK_DIM": 128}
heads |= {"OFFSET": tl.int32, "HAS_WINDOW": False, "prefix_len_ptr": None}
partials = {"partial_ptr": "*fp32", "peak_ptr": "*fp32", "total_ptr": "*fp32"}
fp8 = {"k_cache_ptr": "*fp8e4nv", "v_cache_ptr": "*fp8e4nv", "scales_ptr": "*bf16"}
for config in (triton_decode._DECODE, triton_decode._DECODE_WIDE, triton_decode._DECODE_FP8):
    tile = heads | {"ROWS": 16, "BLOCK_KEYS": config.keys, "BLOCK_PIECES": 16}
    decode, options = triton_decode._decode_kernel, (config.num_warps, config.num_stages)
    if config != triton_decode._DECODE_FP8:
        build(decode, cache | partials, tile | {"scales_ptr": None}, *options)
    elif CAPABILITY >= 89:
        built = build(decode, cache | partials | fp8, tile, *options)
        assert built.asm["ptx"].count("cvt.rn.f16x2.e4m3x2") >= 64
for config in (triton_prefill._PREFILL, triton_prefill._PREFILL_HOPPER, triton_prefill._PREFILL_HOPPER_FP8):
    tile = heads | {"BLOCK_QUERIES": config.rows // 4, "BLOCK_KEYS": config.keys}
    prefill, options = triton_prefill._prefill_kernel, (config.num_warps, config.num_stages)
    build(prefill, cache, tile | {"scales_ptr": None}, *options)
    if CAPABILITY >= 89:
        build(prefill, cache | fp8, tile, *options)
build(triton_prefill._tiles_kernel, cache, {"QUERIES": 32, "SEQS": 512, "BLOCK": 8}, 4)
from lora_kernels import triton_invariant_attention, triton_invariant_matmul
own = triton_invariant_attention._CONFIG
tile = {"QUERIES": own.rows // 4, "KEYS": own.keys}
attend, items = triton_invariant_attention._attend_kernel, triton_invariant_attention._items_kernel
build(attend, cache | partials | {"items_ptr": "*i32"}, heads | tile, own.num_warps, own.num_stages)
sizes = tile | {"NUM_KV_HEADS": 8, "SEQS": 64, "HEADS": 8, "BLOCK": 64, "HAS_WINDOW": False, "prefix_len_ptr": None}
build(items, cache | {"items_ptr": "*i32"}, sizes, 4)
own = triton_invariant_matmul._CONFIG
product = {name + "_ptr": "*bf16" for name in ("x", "weight", "bias", "y")}
tile = {"TOKENS": own.tokens, "BLOCK_OUT": own.block_out, "BLOCK_IN": own.block_in, "SPAN": own.span}
build(triton_invariant_matmul._matmul_kernel, product, tile, own.num_warps, own.num_stages)

plan = {"TILE": 64, "WAVE": 66, "MOST": 64, "NUM_KV_HEADS": 8, "ROWS": 64, "BLOCK_PIECES": 64, "BLOCK_HEADS": 8}
build(triton_decode._plan_kernel, cache, plan | {"HAS_WINDOW": False, "prefix_len_ptr": None}, 4)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU every other test compiles them")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
@pytest.mark.parametrize("capability", [80, 90], ids=["A100", "H100 and H200"])
def test_kernels_compile_for(capability: int) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = COMPILE.replace("CAPABILITY", str(capability))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-4000:]


def _nf4_kernels() -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, source, macros) of every plan in the table, as it is and as narrow as it becomes, each once.

    In turn one of these two with adapters, of one kind or the other, and one without.
    """
    from lora_kernels.nf4_plans import NarrowPlan, WidePlan, invariant_plans

    architectures = {(8, 0): "sm_80", (8, 6): "sm_89", (9, 0): "sm_90a"}
    cases: list[tuple[str, str, dict[str, int]]] = []
    for at, entry in enumerate(json.loads((files("lora_kernels") / "nf4_plans.json").read_text())):
        if not entry.keys() & {"narrow", "wide"}:
            continue  # unpacked first
        plan = NarrowPlan(**entry["narrow"]) if "narrow" in entry else WidePlan(**entry["wide"])
        source = "nf4.cu" if "narrow" in entry else "nf4_wide.cu"
        for num_blocks, adapted in ((64, at % 2), (3, 2 * ((at + 1) % 2))):
            fields = asdict(plan.fitted(num_blocks))
            macros = {name.upper(): value for name, value in fields.items() if name != "share"}
            if isinstance(plan, WidePlan):
                macros["ADAPTED"] = adapted
            elif entry["capability"] == [9, 0] and adapted:
                macros |= {"ADAPTED": adapted, "BLOCKS": 1}
            else:
                macros["ADAPTED"] = 0
            cases.append((architectures[tuple(entry["capability"])], source, macros))
    for architecture, source, capability in (("sm_90a", "nf4_wide.cu", (9, 0)), ("sm_80", "nf4.cu", (8, 0))):
        for plan in invariant_plans(4096, 4096, capability):
            macros = {name.upper(): value for name, value in asdict(plan).items() if name != "share"}
            cases.append((architecture, source, macros | {"ADAPTED": 0}))
    return [case for at, case in enumerate(cases) if case not in cases[:at]]


@needs_nvrtc
@pytest.mark.parametrize("bf16", [1, 0], ids=["bf16", "fp16"])
def test_the_cuda_kernels_compile(bf16: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels.nvrtc import compile_cubin

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cases = _nf4_kernels()
    # Where one type differs, one plan of each kernel; so too where the tests on a GPU compile all, and for long.
    of_each_kernel = list({(case[0], case[1], case[2]["ADAPTED"]): case for case in cases}.values())
    cases = [case for case in cases if case in of_each_kernel or (bf16 and case[0] != "sm_90a")]
    with ThreadPoolExecutor(2) as threads:
        cubins = threads.map(lambda case: compile_cubin(case[1], case[2] | {"BF16": bf16}, case[0]), cases)
        assert all(cubin[:4] == b"\x7fELF" for cubin in cubins)
    assert compile_cubin("nf4_unpack.cu", {"BF16": bf16}, "sm_90a")


@needs_nvrtc
def test_machine_code_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels.nvrtc import compile_cubin

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = compile_cubin("nf4_unpack.cu", {"BF16": 1}, "sm_80")
    (kept,) = (tmp_path / "patchbay").iterdir()
    assert kept.read_bytes() == made
    kept.write_bytes(b"another")
    assert compile_cubin("nf4_unpack.cu", {"BF16": 1}, "sm_80") == b"another"
    assert compile_cubin("nf4_unpack.cu", {"BF16": 0}, "sm_80") != b"another"


@needs_nvrtc
def test_a_changed_header_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels import nvrtc

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nvrtc.compile_cubin("nf4_unpack.cu", {"BF16": 1}, "sm_80")
    changed = {name: text + b"\n#error changed\n" for name, text in nvrtc._headers().items()}
    monkeypatch.setattr(nvrtc, "_headers", lambda: changed)
    with pytest.raises(RuntimeError, match=r"device\.cuh.*changed"):
        nvrtc.compile_cubin("nf4_unpack.cu", {"BF16": 1}, "sm_80")


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels.nvrtc import compile_cubin

    (tmp_path / "patchbay").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cubin("nf4_unpack.cu", {"BF16": 1}, "sm_80")[:4] == b"\x7fELF"


@needs_nvrtc
def test_what_nvrtc_refuses_is_told_in_its_words() -> None:
    from lora_kernels.nvrtc import compile_cubin

    with pytest.raises(RuntimeError, match=r"NVRTC refuses nf4_unpack\.cu for sm_90a"):
        compile_cubin("nf4_unpack.cu", {"BF16": 1, "WARPS": 0}, "sm_90a")
