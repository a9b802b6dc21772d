// NF4 products for many rows of x on Hopper: y = x W^T, with W decoded into the registers that wgmma multiplies from.
//
// Compiled by NVRTC for sm_90a (lora_kernels/cuda_nf4.py), with
//   BF16        1: x and y are bf16, 0: fp16
//   TOKENS      rows of x a tile: 16, 32, 64, 128 or 256
//   ROW_GROUPS  warpgroups side by side, of 64 rows of W each
//   IN_GROUPS   warpgroups that share rows, each with its own columns
//   SPAN        blocks of 64 columns that a warpgroup decodes at a time
//   STAGES      depth of the pipeline from memory to shared memory
//   ADAPTED     1: with the adapters of the step, y = x W^T + B (A x); 2: the same with A in 8 bits; 0: x W^T
//
// A thread block goes through tiles of 64 ROW_GROUPS rows of W by TOKENS rows of x, in stages of 64 IN_GROUPS SPAN
// columns. One thread has the copy engine fetch x and the packed weights; each warpgroup decodes 64 rows by 64 SPAN
// columns a stage and multiplies. While the matrix unit works on one stage a warpgroup decodes the next. A byte's two
// codes come from a table in shared memory, as in nf4.cu; a weight is a 16-bit code times a 16-bit scale.
//
// Where tiles do not come out even, the first ones are cut into equal ranges of stages, one for each of some
// thread blocks (stream-K, as in nf4.cu): a block begins with the end of its range, whose tile the next block
// finishes, and ends with the tile that the blocks before have begun, whose sums it adds in a fixed order. It waits for
// blocks of lower number only, so it never waits for one that has not started. A sum that is not there yet is told by a
// bit pattern that no sum has. The other tiles follow, one after the other.
//
// ADAPTED, few pages of adapters are columns behind those of W, y = [x | h] [W | B]^T: 16 a page, in the dense 16-bit
// numbers of the pool, where a stage is IN_GROUPS SPAN pages. h = A x is computed on the way (nf4_adapters.cuh).

#include "nf4.cuh"

typedef unsigned long long u64;

constexpr int GROUPS = ROW_GROUPS * IN_GROUPS;
constexpr int CONSUMERS = GROUPS * 128;
constexpr int MMA_TOKENS = TOKENS < 128 ? TOKENS : 128;
constexpr int MMAS = TOKENS / MMA_TOKENS;
constexpr int PENDING = GROUPS > 2 ? 0 : 1;  // stages whose products are awaited one stage later
// Of a consumer and of the producer's warps, together no more than the launch has: 640 times 96, or 384 times 168.
constexpr int REGISTERS = GROUPS > 2 ? 104 : !ADAPTED ? 232 : MMAS > 1 ? 224 : 176;
constexpr int FEW_REGISTERS = !ADAPTED ? 40 : GROUPS > 2 ? 64 : MMAS > 1 ? 56 : 152;
constexpr int STAGE_BLOCKS = IN_GROUPS * SPAN;
constexpr int X_BYTES = STAGE_BLOCKS * TOKENS * 128, W_BYTES = ROW_GROUPS * STAGE_BLOCKS * 2048;
constexpr int SCALE_BYTES = ROW_GROUPS * STAGE_BLOCKS * 256;
constexpr int X_RING = 65536;  // behind the table, whose entries take 128 bytes of 256
constexpr int W_RING = X_RING + STAGES * X_BYTES, SCALE_RING = W_RING + STAGES * W_BYTES;
constexpr int OUT = SCALE_RING + STAGES * SCALE_BYTES;  // [row group][up to 64 tokens][64 rows], 16 bits each
constexpr int OUT_TOKENS = TOKENS < 64 ? TOKENS : 64;
constexpr int BARRIERS = OUT + ROW_GROUPS * OUT_TOKENS * 128;  // full, then empty
constexpr int PAGES = BARRIERS + STAGES * 16;                  // their ids
constexpr int BATCH = TOKENS < 32 ? 8 : 16;                    // numbers of another block that are read at a time
static_assert(GROUPS > 1, "a launch of one warpgroup has more registers than setmaxnreg gives");
static_assert(IN_GROUPS == 1 || GROUPS / 2 * TOKENS * 64 <= 8192, "partial sums lie in the table's gaps");

struct alignas(64) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void start_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void expect_bytes(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void copy_bytes(u32 to, const void* from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void copy_tile(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
// sum[64 rows, MMA_TOKENS] += a[64 rows, 16 columns] x[MMA_TOKENS, 16 columns]^T
#if BF16
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "
#else
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 "
#endif
#define S8(i)                                                                                                   \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
__device__ __forceinline__ void multiply(float* d, const u32 (&a)[4], u64 x) {
#if TOKENS == 16
    asm volatile(WGMMA(16) "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, 1, 1, 1, 0;"
                 : S8(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#elif TOKENS == 32
    asm volatile(
        WGMMA(32) "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, 1, 1, 1, 0;"
        : S8(0), S8(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#elif TOKENS == 64
    asm volatile(WGMMA(64)
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
        "%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
        : S8(0), S8(8), S8(16), S8(24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#else
    asm volatile(WGMMA(128)
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
        "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,"
        "%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
        : S8(0), S8(8), S8(16), S8(24), S8(32), S8(40), S8(48), S8(56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#endif
}
__device__ __forceinline__ void fence_operands() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ u32 scale_pair(u32 codes, u32 scales) {
    u32 product;
#if BF16
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(codes), "r"(scales));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(codes), "r"(scales));
#endif
    return product;
}

__device__ __forceinline__ void meet(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// How tiles are shared: the first `tiles`, among so many blocks, whose ranges have `stages` each, the first `more` one
// more.
struct Sharing {
    int tiles, blocks, stages, more;

    __device__ __forceinline__ int range_begin(int block) const { return block * stages + min(block, more); }
};

// The pieces of tiles, in stages, that this thread block multiplies. Without a division at run time, after which the
// compiler no longer knows that all lanes of a warp agree, and keeps the main loop's addresses in every lane.
struct Work {
    int tile, begin, end;  // the piece at hand
    int stages, from, to;  // of a tile; what is left of its range of shared tiles
    int whole, tiles;      // its next whole tile, of all
    Sharing sharing;

    __device__ __forceinline__ Work(int stages, int tiles, const Sharing& sharing)
        : stages(stages), tiles(tiles), sharing(sharing) {
        const int block = blockIdx.x;
        from = block < sharing.blocks ? sharing.range_begin(block) : 0;
        to = block < sharing.blocks ? sharing.range_begin(block + 1) : 0;
        whole = sharing.tiles + block;
    }
    __device__ __forceinline__ bool next() {
        int last = 0;  // the tile at the end of the range
#pragma unroll
        for (int bit = 256; bit >= 1; bit /= 2)
            if ((last + bit) * stages < to) last += bit;
        const bool is_shared = from < to;
        tile = is_shared ? last : whole;
        begin = is_shared ? max(from - last * stages, 0) : 0;
        end = is_shared ? to - last * stages : stages;
        if (is_shared)
            to = last * stages;
        else
            whole += gridDim.x;
        return tile < tiles;
    }
    __device__ __forceinline__ int length() const { return end - begin; }
    __device__ __forceinline__ bool is_last() const { return end == stages; }
    // The first of the blocks before this one that have parts of the tile at hand; this one where there are none.
    __device__ __forceinline__ int first_donor() const {
        int donor = blockIdx.x;
        if (begin > 0)
            while (sharing.range_begin(donor) > tile * stages) --donor;
        return donor;
    }
};

#if ADAPTED
#include "nf4_adapters.cuh"
#endif

// x: map of [num_tokens, in] in boxes of TOKENS by 64, swizzled by 128 bytes; tiles u8 [row tiles of 64,
// num_blocks, 2048]; scales [row tiles of 64, num_blocks, 64]; bias [out] or null; y [num_tokens, out]. sums: fp32
// [sharing.blocks, ROW_GROUPS * TOKENS * 64], ABSENT before and after. num_blocks is a multiple of IN_GROUPS * SPAN.
extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    nf4_matmul_wide(const __grid_constant__ TensorMap x, const u8* __restrict__ tiles, const float* __restrict__ scales,
                    const u16* __restrict__ bias, u16* __restrict__ y, float* __restrict__ sums,
                    const __grid_constant__ Codes codes, int num_tokens, int out_features, int num_blocks,
                    const __grid_constant__ Sharing sharing
#if ADAPTED
                    ,
                    const __grid_constant__ Adapters adapters
#endif
    ) {
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int row_tiles = (out_features + 63) / 64, token_tiles = (num_tokens + TOKENS - 1) / TOKENS;
    Work work(num_blocks / STAGE_BLOCKS, (row_tiles + ROW_GROUPS - 1) / ROW_GROUPS * token_tiles, sharing);
    const u32 ring = shared_address(shared);
    const u32 full = ring + BARRIERS, empty = full + STAGES * 8;
    if (thread == 0) {
        for (int s = 0; s < STAGES; ++s) {
            start_barrier(full + s * 8, 1);
            start_barrier(empty + s * 8, CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#if ADAPTED
    if (warp > CONSUMERS / 32) {
        asm volatile("bar.arrive 0, %0;" ::"n"(CONSUMERS + 128) : "memory");
        start_dependents();
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW_REGISTERS));
        shrink(adapters, num_blocks, blockIdx.x * SHRINKERS + warp - CONSUMERS / 32 - 1, lane);
        return;
    }
    fill_table(codes, thread, CONSUMERS + 32);
    const int num_pages = adapters.planes ? 0 : adapters.table[NUM_PAGES];
    const int page_stages = (num_pages + STAGE_BLOCKS - 1) / STAGE_BLOCKS;
    int* page_ids = reinterpret_cast<int*>(shared + PAGES);
    if (thread < page_stages * STAGE_BLOCKS) page_ids[thread] = adapters.page_ids[min(thread, num_pages - 1)];
#else
    fill_table(codes, thread, CONSUMERS + 128);
#endif
    meet(0, CONSUMERS + 128);
    start_dependents();

    if (warp >= CONSUMERS / 32) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW_REGISTERS));
        if (thread == CONSUMERS) {
            bool waited = false;  // for the kernel before, whose result x is
            bool waited_for_h = false;
            int slot = 0, parity = 1;
            while (work.next()) {
                const int first = work.tile / token_tiles * ROW_GROUPS, token = work.tile % token_tiles * TOKENS;
                for (int stage = work.begin; stage < work.end; ++stage) {
                    wait(empty + slot * 8, parity);
                    const u32 barrier = full + slot * 8;
                    expect_bytes(barrier, X_BYTES + W_BYTES + SCALE_BYTES);
#pragma unroll
                    for (int g = 0; g < ROW_GROUPS; ++g) {
                        const long long at =
                            (long long)min(first + g, row_tiles - 1) * num_blocks + stage * STAGE_BLOCKS;
                        copy_bytes(ring + W_RING + slot * W_BYTES + g * STAGE_BLOCKS * 2048, tiles + at * 2048,
                                   STAGE_BLOCKS * 2048, barrier);
                        copy_bytes(ring + SCALE_RING + slot * SCALE_BYTES + g * STAGE_BLOCKS * 256, scales + at * 64,
                                   STAGE_BLOCKS * 256, barrier);
                    }
                    if (!waited) wait_for_kernel_before();
                    waited = true;
#pragma unroll
                    for (int g = 0; g < STAGE_BLOCKS; ++g)
                        copy_tile(ring + X_RING + slot * X_BYTES + g * TOKENS * 128, &x,
                                  (stage * STAGE_BLOCKS + g) * 64, token, barrier);
                    if (++slot == STAGES) slot = 0, parity ^= 1;
                }
#if ADAPTED
                const int boxes = adapters.boxes(first);
                for (int stage = 0; work.is_last() && stage < page_stages; ++stage) {
                    wait(empty + slot * 8, parity);
                    const u32 barrier = full + slot * 8;
                    expect_bytes(barrier, STAGE_BLOCKS * (ROW_GROUPS * PAGE_BYTES + boxes * H_BYTES));
#pragma unroll
                    for (int b = 0; b < STAGE_BLOCKS; ++b)
#pragma unroll
                        for (int g = 0; g < ROW_GROUPS; ++g)
                            copy_tile(ring + W_RING + slot * W_BYTES + (g * STAGE_BLOCKS + b) * PAGE_BYTES,
                                      &adapters.pages_map, (first + g) * 64, page_ids[stage * STAGE_BLOCKS + b] * 16,
                                      barrier);
                    adapters.wait_for_h(&waited_for_h);
                    for (int b = 0; b < STAGE_BLOCKS; ++b)
                        for (int g = 0; g < boxes; ++g)
                            copy_tile(
                                ring + X_RING + slot * X_BYTES + (g * STAGE_BLOCKS + b) * H_BYTES, &adapters.h_map,
                                adapters.slice(first + g) * adapters.slice_columns + (stage * STAGE_BLOCKS + b) * 16,
                                token, barrier);
                    if (++slot == STAGES) slot = 0, parity ^= 1;
                }
#endif
            }
#if ADAPTED
            if (!waited) wait_for_kernel_before();
            adapters.leave();
#endif
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
        wait_for_kernel_before();  // y may be what the kernel before still reads
        const int group = warp / 4, strip = warp % 4, row_group = group / IN_GROUPS, in_group = group % IN_GROUPS;
        const u32 lane4 = lane * 4;
        int slot = 0, parity = 0;
        float sum[MMAS][MMA_TOKENS / 2];

        const int first_block = row_group * STAGE_BLOCKS + in_group * SPAN;
        auto decode_stage = [&](u32(&weight)[SPAN][4][4]) {
            wait(full + slot * 8, parity);
#pragma unroll
            for (int b = 0; b < SPAN; ++b) {
                const u8* w = shared + W_RING + slot * W_BYTES + (first_block + b) * 2048;
                const u8* scale_at = shared + SCALE_RING + slot * SCALE_BYTES + (first_block + b) * 256;
                const uint4 q = *reinterpret_cast<const uint4*>(w + strip * 512 + lane * 16);
                const float2 scale = *reinterpret_cast<const float2*>(scale_at + (lane / 4 * 4 + strip) * 8);
                const u32 words[4] = {q.x, q.y, q.z, q.w};
                const u32 scales[2] = {round_pair(scale.x, scale.x), round_pair(scale.y, scale.y)};
#pragma unroll
                for (int n = 0; n < 4; ++n) {  // half of the strip, half of the columns
                    u32 pairs[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) pairs[j] = look_up(words[n], j, lane4);
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        weight[b][n % 2 * 2 + j / 2][j % 2 * 2 + n / 2] = scale_pair(pairs[j], scales[n / 2]);
                }
            }
        };
        auto multiply_stage = [&](u32(&weight)[SPAN][4][4]) {
#pragma unroll
            for (int i = 0; i < SPAN * 16; ++i)
                asm volatile("" : "+r"(weight[i / 16][i / 4 % 4][i % 4])::"memory");  // decoded by here
            fence_operands();
#pragma unroll
            for (int b = 0; b < SPAN; ++b) {
                const u32 at = ring + X_RING + slot * X_BYTES + (in_group * SPAN + b) * TOKENS * 128;
                const u64 columns = (u64)(at >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
#pragma unroll
                for (int s = 0; s < 4; ++s)
#pragma unroll
                    for (int m = 0; m < MMAS; ++m)
                        multiply(sum[m], weight[b][s], columns + s * 2 + m * (MMA_TOKENS * 128 / 16));
            }
            commit_products();
        };

        while (work.next()) {
#pragma unroll
            for (int m = 0; m < MMAS; ++m)
#pragma unroll
                for (int i = 0; i < MMA_TOKENS / 2; ++i) sum[m][i] = 0.0f;
            // One set of weights is decoded while the other is multiplied; four warpgroups lack the registers for two,
            // and overlap each other instead.
            u32 weight[PENDING + 1][SPAN][4][4];
            int behind = -1;  // the slot that the products still pending read
            auto finish = [&]() {
                if (behind >= 0 && lane == 0) arrive(empty + behind * 8);
            };
            auto step = [&](u32(&set)[SPAN][4][4]) {
                decode_stage(set);
                multiply_stage(set);
                wait_products<PENDING>();
                if (PENDING) finish();
                behind = slot;
                if (!PENDING) finish();
                if (++slot == STAGES) slot = 0, parity ^= 1;
            };
#pragma unroll 1
            for (int stage = 0; stage < work.length() / 2; ++stage) {
                step(weight[0]);
                step(weight[PENDING]);
            }
            if (work.length() % 2) step(weight[0]);
            wait_products<0>();
            if (PENDING) finish();
#if ADAPTED
            behind = -1;
            const int left = work.is_last() ? page_stages : 0;
            const int first_tile = work.tile / token_tiles * ROW_GROUPS;
            const int box = adapters.boxes(first_tile) == 1 ? 0 : row_group;
            auto add_pages = [&](u32(&weight)[SPAN][4][4]) {
                wait(full + slot * 8, parity);
                const u32 pages = ring + W_RING + slot * W_BYTES + first_block * PAGE_BYTES;
                const u32 columns = ring + X_RING + slot * X_BYTES + (box * STAGE_BLOCKS + in_group * SPAN) * H_BYTES;
#pragma unroll
                for (int b = 0; b < SPAN; ++b) load_transposed(weight[b][0], pages + b * PAGE_BYTES, strip, lane);
                fence_operands();
#pragma unroll
                for (int b = 0; b < SPAN; ++b) {
                    const u64 at = (u64)(columns + b * H_BYTES >> 4 & 0x3FFF) | 1ull << 16 | 16ull << 32 | 3ull << 62;
#pragma unroll
                    for (int m = 0; m < MMAS; ++m) multiply(sum[m], weight[b][0], at + m * (MMA_TOKENS * 32 / 16));
                }
                commit_products();
                wait_products<PENDING>();
                if (PENDING) finish();
                behind = slot;
                if (!PENDING) finish();
                if (++slot == STAGES) slot = 0, parity ^= 1;
            };
#pragma unroll 1
            for (int stage = 0; stage < left / 2; ++stage) {
                add_pages(weight[0]);
                add_pages(weight[PENDING]);
            }
            if (left % 2) add_pages(weight[0]);
            wait_products<0>();
            if (PENDING) finish();
#endif

            // The sums of the warpgroups that share rows, halving their number each time.
#pragma unroll
            for (int half = IN_GROUPS / 2; half >= 1; half /= 2) {
                meet(1, CONSUMERS);
                const int first = (row_group * half + in_group % half) * (TOKENS * 64) + thread % 128;
                if (in_group >= half && in_group < 2 * half)
#pragma unroll
                    for (int i = 0; i < TOKENS / 2; ++i) partial_sum(first + i * 128) = sum[0][i];
                meet(1, CONSUMERS);
                if (in_group < half)
#pragma unroll
                    for (int i = 0; i < TOKENS / 2; ++i) sum[0][i] += partial_sum(first + i * 128);
            }
            if (in_group != 0) continue;

            float* mine = sums + ((long long)blockIdx.x * ROW_GROUPS + row_group) * (TOKENS * 64) + thread % 128;
            if (!work.is_last()) {
#pragma unroll
                for (int i = 0; i < MMAS * MMA_TOKENS / 2; ++i)
                    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(mine + i * 128),
                                 "f"(sum[i * 2 / MMA_TOKENS][i % (MMA_TOKENS / 2)]));
                continue;
            }
            for (int other = blockIdx.x - 1, donor = work.first_donor(); other >= donor; --other) {
                float* theirs = mine + (long long)(other - (int)blockIdx.x) * ROW_GROUPS * (TOKENS * 64);
#pragma unroll
                for (int first = 0; first < MMAS * MMA_TOKENS / 2; first += BATCH) {
                    u32 bits[BATCH];
                    bool absent;
                    do {
                        absent = false;
#pragma unroll
                        for (int i = 0; i < BATCH; ++i) {
                            bits[i] = load_from_gpu(theirs + (first + i) * 128);
                            absent |= bits[i] == ABSENT;
                        }
                    } while (absent);
#pragma unroll
                    for (int i = 0; i < BATCH; ++i) {
                        sum[(first + i) * 2 / MMA_TOKENS][(first + i) % (MMA_TOKENS / 2)] += __uint_as_float(bits[i]);
                        theirs[(first + i) * 128] = __uint_as_float(ABSENT);
                    }
                }
            }

            const int first_row = (work.tile / token_tiles * ROW_GROUPS + row_group) * 64,
                      first_token = work.tile % token_tiles * TOKENS;
            u8* out = shared + OUT + row_group * OUT_TOKENS * 128;
            const int row = first_row + strip * 16 + lane / 4;
            const float bias0 = bias && row < out_features ? widen16(bias[row]) : 0.0f;
            const float bias1 = bias && row + 8 < out_features ? widen16(bias[row + 8]) : 0.0f;
#pragma unroll
            for (int part = 0; part < TOKENS / OUT_TOKENS; ++part) {
                meet(2 + row_group, 128);
#pragma unroll
                for (int j = 0; j < OUT_TOKENS / 8; j += 2) {
                    const float* from = sum[part * 64 / MMA_TOKENS] + (part * 64 % MMA_TOKENS) / 2 + j * 4;
                    const int token = (j + lane / 16) * 8 + lane % 8, chunk = strip * 2 + lane / 8 % 2;
                    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                                     shared_address(out + token * 128 + (chunk ^ (token & 7)) * 16)),
                                 "r"(round_pair(from[0] + bias0, from[1] + bias0)),
                                 "r"(round_pair(from[2] + bias1, from[3] + bias1)),
                                 "r"(round_pair(from[4] + bias0, from[5] + bias0)),
                                 "r"(round_pair(from[6] + bias1, from[7] + bias1))
                                 : "memory");
                }
                meet(2 + row_group, 128);
#pragma unroll
                for (int i = 0; i < OUT_TOKENS / 16; ++i) {
                    const int at = i * 128 + thread % 128, token = at / 8, chunk = at % 8;
                    const uint4 value = *reinterpret_cast<const uint4*>(out + token * 128 + (chunk ^ (token & 7)) * 16);
                    const int to = first_token + part * 64 + token;
                    if (to < num_tokens && first_row + chunk * 8 < out_features)
                        *reinterpret_cast<uint4*>(y + (long long)to * out_features + first_row + chunk * 8) = value;
                }
            }
        }
    }
}
