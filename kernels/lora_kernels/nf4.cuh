// What the NF4 kernels share: 16-bit numbers, bf16 or fp16 by the macro BF16, and the table of codes in shared memory.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

// A partial sum that is not there yet: a NaN, but not the one that arithmetic makes.
constexpr u32 ABSENT = 0xFFFFFFFF;
// The table first: an entry takes 128 bytes of 256, and partial sums lie in the gaps.
extern __shared__ __align__(1024) u8 shared[];

struct Codes {
    u16 value[16];
};

__device__ __forceinline__ u16 round16(float value) {
    u16 bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}
__device__ __forceinline__ u32 round_pair(float first, float second) {
    u32 pair;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#endif
    return pair;
}
__device__ __forceinline__ float widen16(u16 bits) {
#if BF16
    return __uint_as_float((u32)bits << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

// Every thread of the block writes its part of the table.
__device__ __forceinline__ void fill_table(const Codes& codes, int thread, int threads) {
    for (int i = thread; i < 256 * 8; i += threads) {
        const u32 pair = codes.value[i >> 7] | codes.value[i >> 3 & 15] << 16;
        *reinterpret_cast<uint4*>(shared + (i >> 3) * 256 + (i & 7) * 16) = make_uint4(pair, pair, pair, pair);
    }
}
// The pair of codes of byte `n` of `word`: the table's entry byte * 256 + lane * 4.
__device__ __forceinline__ u32 look_up(u32 word, int n, u32 lane4) {
    return *reinterpret_cast<const u32*>(shared + __byte_perm(word, lane4, 0x5504 | n << 4));
}
__device__ __forceinline__ float& partial_sum(int i) {
    return *reinterpret_cast<float*>(shared + (i >> 5) * 256 + 128 + (i & 31) * 4);
}
