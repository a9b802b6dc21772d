// A x of a chunk of one adapter's tokens and a page of its ranks, by one warp, for the NF4 products (nf4.cu, nf4_wide.cu).
//
// Both matrices go to registers as they are in memory, 16 bytes a lane: the order of inputs does not matter to a sum over
// them as long as it is the same in both.
#pragma once

#include "nf4.cuh"

constexpr int FIELDS = 8, NUM_ROWS = 1, NUM_PAGES = 4;  // of the routing table
constexpr int TILE = 16;                                // tokens and ranks of the matrix unit
constexpr int A_SIZE = ADAPTED == 2 ? 1 : 2;            // bytes of a number of A
constexpr int INPUTS = 64 / A_SIZE;                     // that a warp multiplies at a time: 16 bytes of A a lane
constexpr int X_LOADS = 2 / A_SIZE;                     // of 16 bytes, for those of A

// Numbers 2n and 2n + 1 of a word of four, of 8 bits, as 16-bit numbers.
__device__ __forceinline__ u32 widen_pair(u32 word, int n) {
    const u32 pair = __byte_perm(word, 0, n ? 0x4342 : 0x4140);
    u32 widened;
#if BF16
    const u32 low = pair & 0x007F007F | 0x43004300, sign = pair & 0x00800080 | 0x43004300;  // 128 + x, and 128 or 256
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(widened) : "r"(low), "r"(sign));
#else
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(widened) : "r"(pair ^ 0x64806480), "r"(0x64806480));  // 1152 + x, less 1152
#endif
    return widened;
}
// Eight numbers of A, the first or the second of those in 16 bytes, as four fragments of the matrix unit.
__device__ __forceinline__ void fragments(u32 (&pairs)[4], const uint4& a, int half) {
    const u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = A_SIZE == 2 ? words[i] : widen_pair(words[half * 2 + i / 2], i % 2);
}

// Adds to sum[2][4], 16 tokens by 16 ranks, the products of inputs [begin, end), multiples of INPUTS. SETS of STEPS times
// INPUTS are on their way: a single one is awaited and multiplied; of several, one comes while another is multiplied, and
// the first numbers of A while the kernel before runs, whose result x is. from_x: of the first HALVES times 8 tokens,
// lane / 4 and that + 8, null for none; from_a: of these ranks; each at the lane's inputs.
template <int HALVES, int SETS, int STEPS>
__device__ __forceinline__ void multiply_inputs(float (&sum)[2][4], const u16* const (&from_x)[2],
                                                const u8* const (&from_a)[2], int begin, int end) {
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4 x[SETS][STEPS][X_LOADS][HALVES], a[SETS][STEPS][2];
    auto load_a = [&](uint4(&set)[STEPS][2], int at) {
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int input = at + s * INPUTS;
                set[s][n] = from_a[n] && input < end ? load_once(from_a[n] + input * A_SIZE) : zero;
            }
    };
    auto load_x = [&](uint4(&set)[STEPS][X_LOADS][HALVES], int at) {
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int half = 0; half < X_LOADS; ++half)
#pragma unroll
                for (int m = 0; m < HALVES; ++m) {
                    const int input = at + s * INPUTS;
                    set[s][half][m] = from_x[m] && input < end
                                          ? __ldcg(reinterpret_cast<const uint4*>(from_x[m] + input) + half)
                                          : zero;
                }
    };
    constexpr bool is_ahead = SETS > 1;
#pragma unroll
    for (int set = 0; is_ahead && set < SETS; ++set) load_a(a[set], begin + set * STEPS * INPUTS);
    wait_for_kernel_before();
#pragma unroll
    for (int set = 0; is_ahead && set < SETS; ++set) load_x(x[set], begin + set * STEPS * INPUTS);
    for (int at = begin; at < end; at += SETS * STEPS * INPUTS) {
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            if (!is_ahead) load_a(a[set], at), load_x(x[set], at);
#pragma unroll
            for (int s = 0; s < STEPS; ++s)
#pragma unroll
                for (int half = 0; half < X_LOADS; ++half) {
                    const uint4 x0 = x[set][s][half][0], x1 = HALVES > 1 ? x[set][s][half][HALVES - 1] : zero;
                    const u32 near[4] = {x0.x, x1.x, x0.y, x1.y}, far[4] = {x0.z, x1.z, x0.w, x1.w};
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        u32 pairs[4];
                        fragments(pairs, a[set][s][n], half);
                        multiply(sum[n], near, pairs[0], pairs[1]);
                        multiply(sum[n], far, pairs[2], pairs[3]);
                    }
                }
            const int next = at + (SETS + set) * STEPS * INPUTS;
            if (is_ahead) load_a(a[set], next), load_x(x[set], next);
        }
    }
}
