"""The kernels of the GPU path compile with the installed Triton, also on a machine without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

COMPILE = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lora_kernels import triton_nf4, triton_sgmv

def build(kernel, pointers, constants, num_warps):
    kind = lambda name: "constexpr" if name in constants else pointers.get(name, "i32")
    signature = {name: kind(name) for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": num_warps})

nf4 = {"x_ptr": "*i32", "packed_ptr": "*u8", "absmax_ptr": "*fp32", "code_ptr": "*fp32", "out_ptr": "*bf16"}
for tokens, config in triton_nf4._CONFIGS.items():
    tile = {"TOKENS": max(16, tokens), "BLOCK_OUT": config.block_out, "STAGES": config.num_stages}
    for dtype, kind in ((torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)):
        asm = {"ASM": triton_nf4._decode_asm(dtype), "DTYPE": kind}
        build(triton_nf4._matmul_kernel, nf4, tile | asm, config.num_warps)
routing = {"order_ptr": "*i32", "chunks_ptr": "*i32", "slices_ptr": "*i32", "h_ptr": "*fp32"}
pools = {"x_ptr": "*bf16", "a_ptr": "*bf16", "b_ptr": "*bf16", "y_ptr": "*bf16"}
build(triton_sgmv._shrink_kernel, routing | pools, {"CHUNK": 16, "RANK": 16, "BLOCK_IN": 512}, 4)
build(triton_sgmv._expand_kernel, routing | pools, {"CHUNK": 16, "RANK": 16, "BLOCK_OUT": 256}, 4)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU every other test compiles them")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
@pytest.mark.parametrize("capability", [80, 90], ids=["A100", "H100 and H200"])
def test_kernels_compile_for(capability: int) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = COMPILE.replace("CAPABILITY", str(capability))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
