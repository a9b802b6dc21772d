// What nf4_wide.cu adds for the adapters of a step, each row of x with its own: h = A x, and how to read B.
//
// h is computed by the warps that the producer of a thread block leaves idle, while the others multiply the base. A
// piece of it is a row of the routing table (lora_kernels/segments.py, Routing), a page of 16 ranks for a chunk of one
// adapter's tokens; a slice of W; and one of `parts` of the inputs. A warp takes both matrices into registers as they
// are in memory, 16 bytes a lane: the order of inputs does not matter to a sum over them as long as it is the same in
// both. Who has the last part adds the others' in a fixed order; it waits for pieces of lower number only, told by a
// bit pattern that no sum has. Then it writes its tokens' columns of h and counts up; who reads h waits for the count.
// That takes all thread blocks running at once: there are no more than multiprocessors.
//
// Where there are many pages, or pages in 8 bits, h is for a kernel behind (sgmv_expand) instead: each part is a plane
// of it, and nobody waits.
#pragma once

#include "nf4_shrink.cuh"

constexpr int PAGE_BYTES = 2048, H_BYTES = TOKENS * 32;  // of B for 64 rows of W, and of h
// Of A and x on their way, times INPUTS; as many steps a set as registers hold, of many tokens and of few.
constexpr int SETS = FEW_REGISTERS > 64 ? 2 : 1;
constexpr int STEPS = SETS == 1 ? A_SIZE : A_SIZE == 2 ? 3 : 2;
constexpr int FEW_STEPS = STEPS + 1;
constexpr int PARTS_AT_ONCE = FEW_REGISTERS > 64 ? 5 : 3;
constexpr int SHRINKERS = 3;  // warps of a thread block

// Maps of h [num_tokens, slices * slice_columns] in boxes of TOKENS by 16, swizzled by 32 bytes, and of the pages of B
// [num_pages * 16, out] in boxes of 16 by 64, swizzled by 128 bytes. x: its rows are stride_x apart. a: [num_pages,
// slices, 16, in], 16 or 8 bits a number; scales: of the latter, fp32 [num_pages, slices, 16]. h: rows hold zeros for
// the pages of others' adapters, whose numbers are finite. order, table, page_ids: Routing's, of chunks of up to 16
// tokens. sums: float4 [pieces, 2, 32], ABSENT before and after. progress: the rows and slices of h that are there, and
// the blocks that will not ask any more; zeros before and after. second, third: where these slices of W begin,
// multiples of 64. parts: 0 where h is there already.
// planes: fp32 [parts, num_tokens, slices, ranks], as sgmv_shrink's, or null; plane_stride: numbers of a plane.
struct Adapters {
    TensorMap h_map, pages_map;
    const u16* x;
    const u8* a;
    u16* h;
    const int *order, *table, *page_ids;
    float4* sums;
    int* progress;
    float* planes;
    const float* scales;
    int stride_x, slice_columns, slices, second, third, parts, plane_stride, ranks;

    __device__ __forceinline__ int slice(int row_tile) const {
        return (row_tile * 64 >= second) + (row_tile * 64 >= third);
    }
    // Row groups from this tile on need one box of h when they lie in one slice.
    __device__ __forceinline__ int boxes(int row_tile) const {
        return slice(row_tile) == slice(row_tile + ROW_GROUPS - 1) ? 1 : ROW_GROUPS;
    }
    __device__ __forceinline__ void wait_for_h(bool* waited) const {
        if (*waited) return;
        *waited = true;
        const int wanted = parts ? table[NUM_ROWS] * slices : 0;
        int there;
        do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(progress) : "memory");
        while (there != wanted);
        asm volatile("fence.proxy.async.global;" ::: "memory");  // the copy engine reads what threads wrote
    }
    // The last block to leave makes everything ready for the next kernel.
    __device__ __forceinline__ void leave() const {
        if (atomicAdd(progress + 1, 1) == gridDim.x - 1) progress[0] = progress[1] = 0;
    }
};

// The fragment of B^T, 16 rows of W by 16 ranks, from a page's [16 ranks][64 rows of W], swizzled by 128 bytes.
__device__ __forceinline__ void load_transposed(u32 (&a)[4], u32 page, int strip, int lane) {
    const int rank = lane / 16 * 8 + lane % 8, chunk = strip * 2 + lane / 8 % 2;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(page + rank * 128 + (chunk ^ (rank & 7)) * 16)
                 : "memory");
}

// Adds what the others have left of a piece in front of `mine`, PARTS_AT_ONCE at a time.
__device__ __forceinline__ void gather(float (&sum)[2][4], float4* mine, int parts) {
    const float absent = __uint_as_float(ABSENT);
    for (int first = 1; first < parts; first += PARTS_AT_ONCE) {
        u32 v[PARTS_AT_ONCE][2][4];
        bool is_absent;
        do {
            is_absent = false;
#pragma unroll
            for (int p = 0; p < PARTS_AT_ONCE; ++p)
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int part = min(first + p, parts - 1);
                    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                                 : "=r"(v[p][n][0]), "=r"(v[p][n][1]), "=r"(v[p][n][2]), "=r"(v[p][n][3])
                                 : "l"(mine - part * 64 + n * 32));
                }
#pragma unroll
            for (int i = 0; i < PARTS_AT_ONCE * 8; ++i) is_absent |= v[i / 8][i / 4 % 2][i % 4] == ABSENT;
        } while (is_absent);
#pragma unroll
        for (int p = 0; p < PARTS_AT_ONCE; ++p) {
            if (first + p >= parts) break;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                mine[n * 32 - (first + p) * 64] = make_float4(absent, absent, absent, absent);
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[n][i] += __uint_as_float(v[p][n][i]);
            }
        }
    }
}

// A warp's pieces of h: `warp` of all those that compute it.
__device__ __forceinline__ void shrink(const Adapters& adapters, int num_blocks, int warp, int lane) {
    const int group = lane / 4, inputs = num_blocks * 64, parts = adapters.parts, slices = adapters.slices;
    const int pieces = adapters.table[NUM_ROWS] * slices * parts;  // none where h is there already
    for (int piece = warp; piece < pieces; piece += gridDim.x * SHRINKERS) {
        const int part = piece % parts, slice = piece / parts % slices, row = piece / parts / slices;
        const int4 head = *reinterpret_cast<const int4*>(adapters.table + (1 + row) * FIELDS);
        const int4 tail = *reinterpret_cast<const int4*>(adapters.table + (1 + row) * FIELDS + 4);
        const int first = head.x, length = head.y, ranks = head.z - tail.y * TILE, page = tail.x;
        const int begin = inputs / INPUTS * part / parts * INPUTS, end = inputs / INPUTS * (part + 1) / parts * INPUTS;
        const long long first_rank = (long long)(page * slices + slice) * TILE;
        const u8* a = adapters.a + (first_rank + group) * inputs * A_SIZE + lane % 4 * 16;
        const u8* const from_a[2] = {group < ranks ? a : nullptr,
                                     group + 8 < ranks ? a + 8 * inputs * A_SIZE : nullptr};
        int token[2];
        const u16* from_x[2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int at = group + m * 8;
            token[m] = at < length ? adapters.order[first + at] : -1;
            const u16* row = adapters.x + (long long)token[m] * adapters.stride_x;
            from_x[m] = token[m] >= 0 ? row + lane % 4 * (16 / A_SIZE) : nullptr;
        }
        float sum[2][4] = {};
        if (length > 8)
            multiply_inputs<2, SETS, STEPS>(sum, from_x, from_a, begin, end);
        else
            multiply_inputs<1, SETS, FEW_STEPS>(sum, from_x, from_a, begin, end);
#if ADAPTED == 2
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float2 scale =
                *reinterpret_cast<const float2*>(adapters.scales + first_rank + n * 8 + lane % 4 * 2);
            sum[n][0] *= scale.x, sum[n][1] *= scale.y, sum[n][2] *= scale.x, sum[n][3] *= scale.y;
        }
#endif
        if (adapters.planes) {
            float* plane = adapters.planes + part * adapters.plane_stride + slice * adapters.ranks + tail.y * TILE;
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    if (token[m] >= 0)
                        *reinterpret_cast<float2*>(plane + token[m] * slices * adapters.ranks + n * 8 + lane % 4 * 2) =
                            make_float2(sum[n][m * 2], sum[n][m * 2 + 1]);
            continue;
        }
        float4* mine = adapters.sums + (long long)piece * 64 + lane;
        if (part != parts - 1) {
#pragma unroll
            for (int n = 0; n < 2; ++n)
                asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(mine + n * 32), "f"(sum[n][0]),
                             "f"(sum[n][1]), "f"(sum[n][2]), "f"(sum[n][3]));
            continue;
        }
        gather(sum, mine, parts);
        u16* columns = adapters.h + slice * adapters.slice_columns + tail.w * TILE + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int m = 0; m < 2; ++m)
                if (token[m] >= 0)
                    *reinterpret_cast<u32*>(columns + (long long)token[m] * slices * adapters.slice_columns + n * 8) =
                        round_pair(sum[n][m * 2], sum[n][m * 2 + 1]);
        __threadfence();
        asm volatile("fence.proxy.async.global;" ::: "memory");
        __syncwarp();
        if (lane == 0) asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(adapters.progress) : "memory");
    }
}
