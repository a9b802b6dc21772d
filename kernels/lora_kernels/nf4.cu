// NF4 products for a few rows of x: y = x W^T, W in tiles of 64 rows by 64 columns (one block of the quantization).
//
// Compiled by NVRTC for the card at hand (lora_kernels/cuda_nf4.py), with
//   BF16    1: x and y are bf16, 0: fp16
//   TOKENS  the most rows of x: 8, 16 or 32
//   WARPS   warps of a thread block: they share a tile's rows, and each has its own columns
//   DEPTH   tiles of W that a warp has on their way from memory
//   BLOCKS  thread blocks a multiprocessor
//   AHEAD   stages of W that a thread block has on their way from memory to the second cache
//   ADAPTED 1: with the adapters of the step, y = x W^T + B (A x); 2: the same with pages in 8 bits; 0: x W^T
//
// A byte of W holds two codes. A table in shared memory turns it into a pair of 16-bit numbers at once; each lane of a
// warp has a copy of its own, in its own bank, so that 32 look-ups are one access. The bytes of a tile lie in memory in
// the order of the matrix unit's fragments: what a lane loads, 16 bytes at a time, is what it multiplies, and its part
// of x is 16 bytes in a row too, once four lanes have exchanged theirs. Neither passes through shared memory, whose
// bandwidth the table takes. The scale of a block of 64 weights multiplies the block's fp32 sum and not each weight.
//
// The work, (tile of 64 rows, stage of 64 WARPS columns) in this order, is cut into as many equal ranges as there are
// thread blocks (stream-K, arXiv 2301.03598). A block walks its range backwards: the first tile that it finishes may
// continue in the next block, to which it leaves its sum, and the last may have begun in earlier ones, whose sums it
// adds, in a fixed order: equal inputs give equal bits. It waits for blocks of lower number only, so it never waits for
// one that has not started. A sum that is not there yet is told by a bit pattern that no sum has.

#include "nf4.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int NT = TOKENS / 8;                // tiles of 8 tokens, the matrix unit's n
constexpr int SHARE = 64 * TOKENS / THREADS;  // of a tile of y, a thread's part
constexpr int BATCH = SHARE >= 16 ? 2 : 4;    // blocks whose sums are read at a time
static_assert(WARPS * TOKENS * 64 <= 8192, "the table's gaps hold 32 KB of partial sums");

__device__ __forceinline__ void fetch_to_cache(const void* p, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}
__device__ __forceinline__ void meet(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Transposes the words of four neighbouring lanes: word j of lane t goes to word t of lane j.
__device__ __forceinline__ uint4 transpose(uint4 v, int lane) {
    const bool odd = lane & 1, upper = lane & 2;
    const u32 a = __shfl_xor_sync(~0u, odd ? v.x : v.y, 1), b = __shfl_xor_sync(~0u, odd ? v.z : v.w, 1);
    (odd ? v.x : v.y) = a;
    (odd ? v.z : v.w) = b;
    const u32 c = __shfl_xor_sync(~0u, upper ? v.x : v.z, 2), d = __shfl_xor_sync(~0u, upper ? v.y : v.w, 2);
    (upper ? v.x : v.z) = c;
    (upper ? v.y : v.w) = d;
    return v;
}

#if ADAPTED
#include "nf4_few_adapters.cuh"
#endif

__device__ __forceinline__ int range_begin(int total, int block) { return (int)((long long)total * block / gridDim.x); }

// x [num_tokens, in]; tiles u8 [row tiles of 64, num_blocks, 2048]; scales [row tiles of 64, num_blocks, 64];
// bias [out] or null; y [num_tokens, out]. sums: fp32 [gridDim.x, TOKENS * 64], ABSENT before and after. num_blocks is
// a multiple of WARPS.
extern "C" __global__ void __launch_bounds__(THREADS + (ADAPTED ? 32 : 0), BLOCKS)
    nf4_matmul(const u16* __restrict__ x, const u8* __restrict__ tiles, const float* __restrict__ scales,
               const u16* __restrict__ bias, u16* __restrict__ y, float* __restrict__ sums,
               const __grid_constant__ Codes codes, int num_tokens, int out_features, int num_blocks, int stride_x
#if ADAPTED
               ,
               const __grid_constant__ Adapters adapters
#endif
    ) {
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int tile_stages = num_blocks / WARPS, total = (out_features + 63) / 64 * tile_stages;
    const int begin = range_begin(total, blockIdx.x), end = range_begin(total, blockIdx.x + 1);
    int tile = (end - 1) / tile_stages, stage = (end - 1) % tile_stages;
    start_dependents();
#if ADAPTED
    if (warp == WARPS) {
        const int2 own_tiles = make_int2(begin / tile_stages, end / tile_stages);  // those whose last stage is here
        shrink(adapters, x, stride_x, num_blocks * 64, out_features, own_tiles, lane);
        return;
    }
    int slice = NONE;  // whose h is in shared memory
#endif

    uint4 strips[DEPTH][4];    // of 16 rows
    float2 own_scales[DEPTH];  // of strip lane % 4
    uint4 columns[DEPTH][NT][2];
    const long long last = (long long)(end - 1) * WARPS + warp;
    const u8* tile_at = tiles + last * 2048 + lane * 16;
    const float* scale_at = scales + last * 64 + lane * 2;
    auto load_weights = [&](int slot) {
#pragma unroll
        for (int r = 0; r < 4; ++r) strips[slot][r] = load_once(tile_at + r * 512);
        own_scales[slot] = load_once2(scale_at);
        tile_at -= WARPS * 2048;
        scale_at -= WARPS * 64;
    };
    int stage_ahead = stage, token_at[NT];
#pragma unroll
    for (int j = 0; j < NT; ++j)
        token_at[j] = min(j * 8 + lane / 4, num_tokens - 1) * stride_x + warp * 64 + lane % 4 * 8;
    auto load_x = [&](int slot) {
#pragma unroll
        for (int j = 0; j < NT; ++j) {
            const uint4* from = reinterpret_cast<const uint4*>(x + token_at[j] + stage_ahead * (WARPS * 64));
            columns[slot][j][0] = from[0];
            columns[slot][j][1] = from[4];
        }
        stage_ahead = stage_ahead == 0 ? tile_stages - 1 : stage_ahead - 1;
    };

    int left = end - begin, fetched = end;  // the stage before which W is on its way
    auto fetch = [&]() {
        if (thread != 0 || fetched == begin) return;
        --fetched;
        fetch_to_cache(tiles + (long long)fetched * WARPS * 2048, WARPS * 2048);
        fetch_to_cache(scales + (long long)fetched * WARPS * 64, WARPS * 256);
    };
    for (int i = 0; i < AHEAD; ++i) fetch();
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (i < left) load_weights(i);
    fill_table(codes, thread, THREADS);
    wait_for_kernel_before();  // x is its result
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (i < left) load_x(i);
    meet(2, THREADS);

    float sum[4][NT][4] = {};
    const u32 lane4 = lane * 4;
    auto multiply_tile = [&](int slot) {
#pragma unroll
        for (int j = 0; j < NT; ++j) {
            columns[slot][j][0] = transpose(columns[slot][j][0], lane);
            columns[slot][j][1] = transpose(columns[slot][j][1], lane);
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const uint4 q = strips[slot][r];
            u32 weight[4][4];  // 16 columns, registers of a fragment
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                const u32 upper = s < 2 ? q.x : q.y, lower = s < 2 ? q.z : q.w;
                weight[s][0] = look_up(upper, s % 2 * 2, lane4);
                weight[s][1] = look_up(lower, s % 2 * 2, lane4);
                weight[s][2] = look_up(upper, s % 2 * 2 + 1, lane4);
                weight[s][3] = look_up(lower, s % 2 * 2 + 1, lane4);
            }
            const float scale0 = __shfl_sync(~0u, own_scales[slot].x, (lane & 28) + r);
            const float scale1 = __shfl_sync(~0u, own_scales[slot].y, (lane & 28) + r);
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                const uint4 near = columns[slot][j][0], far = columns[slot][j][1];
                float part[4] = {};
                multiply(part, weight[0], near.x, near.y);
                multiply(part, weight[1], near.z, near.w);
                multiply(part, weight[2], far.x, far.y);
                multiply(part, weight[3], far.z, far.w);
#pragma unroll
                for (int c = 0; c < 4; ++c) sum[r][j][c] += part[c] * (c < 2 ? scale0 : scale1);
            }
        }
    };

    for (int slot = 0; left > 0; --tile, stage = tile_stages - 1) {
        const int segment = min(stage + 1, left);  // stages of this tile
        const bool is_first = segment == stage + 1, is_last = stage == tile_stages - 1;
        for (int n = segment; n > 0;) {
#pragma unroll
            for (int s = 0; s < DEPTH; ++s) {  // a register's number must be known to the compiler
                if (s != slot || n == 0) continue;
                multiply_tile(s);
                fetch();
                if (left > DEPTH) {
                    load_weights(s);
                    load_x(s);
                }
                --left, --n;
                slot = (s + 1) % DEPTH;
            }
        }

        meet(2, THREADS);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int token = j * 8 + lane % 4 * 2 + c % 2, row = r * 16 + c / 2 * 8 + lane / 4;
                    partial_sum((warp * TOKENS + token) * 64 + (row ^ (token / 2 % 4 * 8))) = sum[r][j][c];
                    sum[r][j][c] = 0.0f;
                }
        meet(2, THREADS);
        float value[SHARE];
        float* mine = sums + blockIdx.x * (TOKENS * 64) + thread;
#pragma unroll
        for (int k = 0; k < SHARE; ++k) {
            const int token = (thread + k * THREADS) / 64, place = (thread + k * THREADS) % 64;
            value[k] = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w)
                value[k] += partial_sum((w * TOKENS + token) * 64 + (place ^ (token / 2 % 4 * 8)));
            if (!is_last) asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(mine + k * THREADS), "f"(value[k]));
        }
        if (!is_last) continue;
#if ADAPTED
        if (slice == NONE) meet(1, THREADS + 32);
        if (slice != adapters.slice(tile)) gather(adapters, slice = adapters.slice(tile), num_tokens, thread);
        add_adapters(adapters, value, tile, num_tokens, out_features, thread);
#endif
        int donor = blockIdx.x;  // the sums of the blocks from here to this one are added
        if (!is_first)
            while (range_begin(total, donor) > tile * tile_stages) --donor;
        for (int other = blockIdx.x - 1; other >= donor; other -= BATCH) {
            u32 bits[BATCH][SHARE];
            float* theirs = mine + (other - (int)blockIdx.x) * (TOKENS * 64);
            bool absent;
            do {
                absent = false;
#pragma unroll
                for (int n = 0; n < BATCH; ++n)
#pragma unroll
                    for (int k = 0; k < SHARE; ++k) {
                        bits[n][k] = other - n >= donor ? load_from_gpu(theirs + k * THREADS - n * (TOKENS * 64)) : 0;
                        absent |= bits[n][k] == ABSENT;
                    }
            } while (absent);
#pragma unroll
            for (int n = 0; n < BATCH; ++n)
#pragma unroll
                for (int k = 0; k < SHARE; ++k) {
                    value[k] += __uint_as_float(bits[n][k]);
                    if (other - n >= donor) theirs[k * THREADS - n * (TOKENS * 64)] = __uint_as_float(ABSENT);
                }
        }
#pragma unroll
        for (int k = 0; k < SHARE; ++k) {
            const int token = (thread + k * THREADS) / 64, row = tile * 64 + (thread + k * THREADS) % 64;
            if (row >= out_features || token >= num_tokens) continue;
            if (bias) value[k] += widen16(bias[row]);
            y[token * out_features + row] = round16(value[k]);
        }
    }
#if ADAPTED
    if (slice == NONE) meet(1, THREADS + 32);
#endif
}
