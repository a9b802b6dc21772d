// What nf4.cu adds for the adapters of up to eight rows of x, each with its own: y = x W^T + B (A x).
//
// h = A x is computed by one more warp of every thread block, while the others multiply the base. A piece of it is a
// row of the routing table (lora_kernels/segments.py, Routing), a page of 16 ranks for one adapter's tokens; a slice of
// W; and one of `parts` of the inputs. Who finishes a tile of y takes the parts of h that the tile needs, adds them in
// order, and adds B h to the tile. A number of h lies in memory beside the number of the launch that it belongs to,
// which tells whether it is there yet: nobody waits for another's sum but once, and nothing is tidied up.
// That takes all thread blocks running at once: there are no more than multiprocessors hold.
#pragma once

#include "nf4_shrink.cuh"

constexpr int MOST_PAGES = 4;   // of a step
constexpr int MOST_PARTS = 32;  // of the inputs
constexpr int STEPS = 4;        // times INPUTS on their way
constexpr int READERS = 4;      // lanes that add the parts of a number of h
constexpr int B_SIZE = A_SIZE;  // bytes of a number of B
constexpr int NONE = -1;
// In the table's gaps, behind the sums of a tile: h [TOKENS][MOST_PAGES][16], page ids [TOKENS][MOST_PAGES],
// ranks [TOKENS], the pages of the highest rank, and the number of the launch.
constexpr int H = 4096, PAGE_IDS = H + TOKENS * MOST_PAGES * TILE, RANKS = PAGE_IDS + TOKENS * MOST_PAGES;
constexpr int PAGES = RANKS + TOKENS, LAUNCH = PAGES + 1;
static_assert(TOKENS == 8 && WARPS * TOKENS * 64 <= H, "a chunk is half a tile of the matrix unit");

// a: [num_pages, slices, 16, in]; b: [num_pages, 16, out], both 16 or 8 bits a number; their scales: of the latter, fp32
// [num_pages, slices, 16]. order, table: Routing's. sums: [TOKENS, MOST_PAGES, slices, 16, parts] of an fp32 number
// below the number of its launch. launches: the number of the launch at hand, of which none is 0, and the thread blocks
// that know it, 0 before and after. second, third: where these slices of W begin, multiples of 64.
struct Adapters {
    const u8 *a, *b;
    const float *a_scales, *b_scales;
    const int *order, *table;
    unsigned long long* sums;
    int* launches;
    int slices, second, third, parts;

    __device__ __forceinline__ int slice(int row_tile) const {
        return (row_tile * 64 >= second) + (row_tile * 64 >= third);
    }
    __device__ __forceinline__ unsigned long long* sum(int token, int page, int slice, int rank) const {
        return sums + (((token * MOST_PAGES + page) * slices + slice) * TILE + rank) * parts;
    }
};

__device__ __forceinline__ int& number(int i) { return reinterpret_cast<int&>(partial_sum(i)); }

// The warp beside those that multiply: tells them who has which pages, and computes its pieces of h. own_tiles: the tiles
// of y from the first to before the second are finished by this thread block.
__device__ __forceinline__ void shrink(const Adapters& adapters, const u16* x, int stride_x, int inputs, int out,
                                       int2 own_tiles, int lane) {
    const int num_rows = adapters.table[NUM_ROWS], slices = adapters.slices, parts = adapters.parts;
    const int pieces = num_rows * slices * parts, group = lane / 4;
    auto first_input = [&](int part) { return inputs / INPUTS * part / parts * INPUTS; };
    if (blockIdx.x < pieces && lane < TILE) {  // the first piece's part of A
        const int part = blockIdx.x % parts, slice = blockIdx.x / parts % slices, row = blockIdx.x / parts / slices;
        const int page = adapters.table[(1 + row) * FIELDS + 4], begin = first_input(part);
        const long long rank = (long long)(page * slices + slice) * TILE + lane;
        fetch_to_cache(adapters.a + (rank * inputs + begin) * A_SIZE, (first_input(part + 1) - begin) * A_SIZE);
    }
    if (lane < TOKENS) number(RANKS + lane) = 0;
    __syncwarp();
    int highest = 0;
    for (int row = lane; row < num_rows; row += 32) {
        const int4 head = *reinterpret_cast<const int4*>(adapters.table + (1 + row) * FIELDS);
        const int4 tail = *reinterpret_cast<const int4*>(adapters.table + (1 + row) * FIELDS + 4);
        highest = max(highest, head.z);
        for (int i = 0; i < head.y; ++i) {
            const int token = adapters.order[head.x + i];
            number(RANKS + token) = head.z;
            number(PAGE_IDS + token * MOST_PAGES + tail.y) = tail.x;
        }
    }
    for (int i = 16; i >= 1; i /= 2) highest = max(highest, __shfl_xor_sync(~0u, highest, i));
    if (lane == 0) number(PAGES) = (highest + TILE - 1) / TILE;
    for (int tile = own_tiles.x; tile < own_tiles.y; ++tile)
        for (int i = lane; i < num_rows * TILE; i += 32) {
            const long long rank = (long long)adapters.table[(1 + i / TILE) * FIELDS + 4] * TILE + i % TILE;
            asm volatile("prefetch.global.L2 [%0];" ::"l"(adapters.b + (rank * out + tile * 64) * B_SIZE));
        }

    wait_for_kernel_before();  // x is its result
    int launch;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(launch) : "l"(adapters.launches) : "memory");
    for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        const int part = piece % parts, slice = piece / parts % slices, row = piece / parts / slices;
        const int4 head = *reinterpret_cast<const int4*>(adapters.table + (1 + row) * FIELDS);
        const int4 tail = *reinterpret_cast<const int4*>(adapters.table + (1 + row) * FIELDS + 4);
        const int ranks = head.z - tail.y * TILE;
        const long long first_rank = (long long)(tail.x * slices + slice) * TILE;
        const u8* a = adapters.a + (first_rank + group) * inputs * A_SIZE + lane % 4 * 16;
        const u8* const from_a[2] = {group < ranks ? a : nullptr,
                                     group + 8 < ranks ? a + 8 * inputs * A_SIZE : nullptr};
        const int token = group < head.y ? adapters.order[head.x + group] : -1;
        const u16* const from_x[2] = {token >= 0 ? x + token * stride_x + lane % 4 * (16 / A_SIZE) : nullptr, nullptr};
        float sum[2][4] = {};
        multiply_inputs<1, 1, STEPS>(sum, from_x, from_a, first_input(part), first_input(part + 1));
        if (token < 0) continue;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int rank = n * 8 + lane % 4 * 2 + i;
                const float value = ADAPTED == 2 ? sum[n][i] * adapters.a_scales[first_rank + rank] : sum[n][i];
                const unsigned long long told = (unsigned long long)(u32)launch << 32 | __float_as_uint(value);
                asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(
                                 adapters.sum(token, tail.y, slice, rank) + part),
                             "l"(told)
                             : "memory");
            }
    }
    if (lane == 0) number(LAUNCH) = launch;
    __threadfence_block();
    asm volatile("bar.arrive 1, %0;" ::"n"(THREADS + 32) : "memory");
    if (lane != 0) return;
    int known;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(known) : "l"(adapters.launches + 1) : "memory");
    if (known == gridDim.x - 1) adapters.launches[0] = max(launch + 1, 1), adapters.launches[1] = 0;
}

// One number of B, of a page's rank.
__device__ __forceinline__ float load_b(const u8* at) {
#if ADAPTED == 2
    return (float)*reinterpret_cast<const signed char*>(at);
#else
    return widen16(*reinterpret_cast<const u16*>(at));
#endif
}

// h of a slice of W, for all tokens, from its parts in memory to shared memory.
__device__ __forceinline__ void gather(const Adapters& adapters, int slice, int num_tokens, int thread) {
    const int lane = thread & 31, places = number(PAGES) * TILE, parts = adapters.parts;
    const u32 launch = number(LAUNCH);
    for (int first = thread / 32 * (32 / READERS); first < num_tokens * places; first += THREADS / READERS) {
        const int at = min(first + lane / READERS, num_tokens * places - 1), token = at / places, place = at % places;
        const bool is_own = place < number(RANKS + token);
        const unsigned long long* from = adapters.sum(token, place / TILE, slice, place % TILE);
        unsigned long long told[MOST_PARTS / READERS];
        bool absent;
        do {
#pragma unroll
            for (int i = 0; i < MOST_PARTS / READERS; ++i)
                asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
                             : "=l"(told[i])
                             : "l"(from + min(i * READERS + lane % READERS, parts - 1))
                             : "memory");
            absent = false;
#pragma unroll
            for (int i = 0; i < MOST_PARTS / READERS; ++i) absent |= (u32)(told[i] >> 32) != launch;
        } while (absent && is_own);
        float h = 0.0f;
#pragma unroll
        for (int i = 0; i < MOST_PARTS / READERS; ++i)
            if (is_own && i * READERS + lane % READERS < parts) h += __uint_as_float((u32)told[i]);
        __syncwarp();
#pragma unroll
        for (int i = 1; i < READERS; i *= 2) h += __shfl_xor_sync(~0u, h, i);
#if ADAPTED == 2
        const int page = number(PAGE_IDS + token * MOST_PAGES + place / TILE);
        if (is_own) h *= adapters.b_scales[(page * adapters.slices + slice) * TILE + place % TILE];
#endif
        if (lane % READERS == 0) partial_sum(H + token * (MOST_PAGES * TILE) + place) = widen16(round16(h));
    }
    meet(2, THREADS);
}

// Adds B h to a thread's part of a tile: value[k] is of row `place` % 64 and token `place` / 64, where `place` is thread +
// k THREADS. h is in shared memory. B's ranks beyond an adapter's own are zeros.
template <int SHARE>
__device__ __forceinline__ void add_adapters(const Adapters& adapters, float (&value)[SHARE], int tile, int num_tokens,
                                             int out, int thread) {
#pragma unroll
    for (int k = 0; k < SHARE; ++k) {
        const int token = (thread + k * THREADS) / 64, row = min(tile * 64 + (thread + k * THREADS) % 64, out - 1);
        if (token >= num_tokens) continue;
        const int ranks = number(RANKS + token);
        for (int first = 0; first < ranks; first += TILE) {
            const long long page = number(PAGE_IDS + token * MOST_PAGES + first / TILE);
            const u8* b = adapters.b + (page * TILE * out + row) * B_SIZE;
            float numbers[TILE];
#pragma unroll
            for (int r = 0; r < TILE; ++r) numbers[r] = load_b(b + (long long)r * out * B_SIZE);
#pragma unroll
            for (int r = 0; r < TILE; ++r)
                value[k] += partial_sum(H + token * (MOST_PAGES * TILE) + first + r) * numbers[r];
        }
    }
}
