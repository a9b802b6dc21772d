// What the NF4 kernels share: the table of codes in shared memory.
#pragma once

#include "device.cuh"

// A partial sum that is not there yet: a NaN, but not the one that arithmetic makes.
constexpr u32 ABSENT = 0xFFFFFFFF;
// The table first: an entry takes 128 bytes of 256, and partial sums lie in the gaps.
extern __shared__ __align__(1024) u8 shared[];

struct Codes {
    u16 value[16];
};

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
__device__ __forceinline__ u32 load_from_gpu(const float* p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
