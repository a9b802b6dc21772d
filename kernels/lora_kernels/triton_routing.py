"""What the Triton kernels of `lora_kernels.sgmv` share: the routing table's columns, launches after another, 8 bits.

Both walk `Routing.table` with a number of programs that does not depend on the routing, so that a CUDA graph can replay
them. They begin before the kernel in front ends (programmatic dependent launch) and read routing and weights before
they wait for it: so the kernel in front may write neither.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache

import torch
import triton
import triton.language as tl

from lora_kernels.segments import FIELDS, PAGE_RANK

NUM_WARPS = 4
RANK = tl.constexpr(PAGE_RANK)
ROW_FIELDS = tl.constexpr(FIELDS)
# Triton's interpreter runs no assembly.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Columns of the table: of row 0, and of the rows after it.
NUM_CHUNKS, NUM_ROWS, NUM_VECTORS, NUM_VECTOR_ROWS = (tl.constexpr(column) for column in range(4))
FIRST, LENGTH, OWN_RANK, TOKEN, PAGE, NTH_PAGE, MORE, COLUMN = (tl.constexpr(column) for column in range(8))


@triton.jit
def pass_on(PDL: tl.constexpr):
    """Let the kernel behind start; it waits for this one before it reads what this one writes."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the kernel in front has ended."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def wait_and_pass(PDL: tl.constexpr):
    """Both: the kernel behind may read what the one in front wrote as soon as it starts."""
    wait(PDL)
    pass_on(PDL)


@triton.jit
def load_tokens(order_ptr, row_ptr, place, length):
    """The tokens of a chunk, int64; places beyond its length repeat its first token, so that loads need no mask."""
    tokens = tl.load(order_ptr + tl.load(row_ptr + FIRST) + place, mask=place < length, other=0)
    return tl.where(place < length, tokens, tl.load(row_ptr + TOKEN)).to(tl.int64)


@triton.jit
def widen(weights):
    """To fp32. A byte becomes the end of 2^23 + 128 + weight: the conversion takes 16 cycles of a multiprocessor."""
    if weights.dtype != tl.int8 or _INTERPRETED:
        return weights.to(tl.float32)
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b32 bytes;
            xor.b32 bytes, $4, 0x80808080;
            prmt.b32 $0, bytes, 0x4B000000, 0x7440;
            prmt.b32 $1, bytes, 0x4B000000, 0x7441;
            prmt.b32 $2, bytes, 0x4B000000, 0x7442;
            prmt.b32 $3, bytes, 0x4B000000, 0x7443;
            add.f32 $0, $0, 0fCB000080;
            add.f32 $1, $1, 0fCB000080;
            add.f32 $2, $2, 0fCB000080;
            add.f32 $3, $3, 0fCB000080;
        }
        """,
        "=r,=r,=r,=r,r",
        [weights],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )


@cache
def card(device: torch.device) -> tuple[bool, int]:
    """Whether a kernel may begin before the one in front ends (Hopper and later), and the multiprocessors."""
    if device.type == "cpu":  # the interpreter
        return False, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 9, properties.multi_processor_count
