"""How the attention kernels read fp8 pages: two elements at a time, as one 16-bit number."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

# Triton's interpreter runs no assembly.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def split_pairs(pairs):
    """int16 pairs of e4m3 -> the fp16 tiles of the even and of the odd elements.

    The matrix unit wants two keys' elements side by side, and the hardware turns two of them at once: swapping the
    middle bytes of two keys' pairs gives both. Written in Triton the same takes 2.5 instructions an element, not 0.75.
    """
    if _INTERPRETED:
        even = pairs.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = (pairs >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        even, odd = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 swapped;
                .reg .b16 low, high;
                prmt.b32 swapped, $2, 0, 0x3120;
                mov.b32 {low, high}, swapped;
                cvt.rn.f16x2.e4m3x2 $0, low;
                cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd


@triton.jit
def split_queries(q, scale, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """q [ROWS, 2 * PAIRS] -> its even and its odd elements over a power of two a row, and these powers times scale.

    fp16 holds what is left, at most 2, of bf16 to the bit; fp32 stays fp32.
    """
    dtype: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.float16
    q = q.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)
    bits = largest.to(tl.int32, bitcast=True) & 0x7F800000
    inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    even, odd = tl.split(tl.reshape((q * inverse[:, None]).to(dtype), (ROWS, PAIRS, 2)))
    return even, odd, bits.to(tl.float32, bitcast=True) * scale


@triton.jit
def in_pairs(k_cache_ptr, v_cache_ptr, scales_ptr):
    """Pages as int16, pairs of elements; scales as int32, a key's with a value's: 2 bytes cannot be copied ahead."""
    k_cache_ptr = k_cache_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    v_cache_ptr = v_cache_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    return k_cache_ptr, v_cache_ptr, scales_ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def split_scales(scales):
    """int32 pairs of bf16 -> the scales of keys and of values, fp32: bf16 is fp32's upper half."""
    k_scale = (scales << 16).to(tl.float32, bitcast=True)
    v_scale = (scales & -0x10000).to(tl.float32, bitcast=True)
    return k_scale, v_scale
