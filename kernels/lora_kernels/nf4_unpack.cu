// NF4 tiles (lora_kernels/nf4.py, NF4Tiles) to a matrix of 16-bit numbers, each fp32 code times fp32 scale, rounded
// once.
//
// Compiled by NVRTC with BF16 1 or 0 (fp16). Every lane has its own copy of the sixteen codes, in its own bank.

#include "device.cuh"

constexpr int WARPS = 4;
constexpr int ROW_WORDS = 36;  // 32 of a row's block, and a gap that spreads rows over the banks

// tiles u8 [row tiles of 64, num_blocks, 2048]; scales [row tiles of 64, num_blocks, 64]; code fp32 [16];
// out [out_features, num_blocks * 64]. One warp a tile.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    nf4_unpack(const uint4* __restrict__ tiles, const float* __restrict__ scales, const float* __restrict__ code,
               uint4* __restrict__ out, int out_features, int num_blocks, int num_tiles) {
    __shared__ float codes[16][32];
    __shared__ __align__(16) u32 words[WARPS][16 * ROW_WORDS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tile = blockIdx.x * WARPS + warp;
    for (int i = threadIdx.x; i < 16 * 32; i += 32 * WARPS) codes[i / 32][i % 32] = code[i / 32];
    __syncthreads();
    if (tile >= num_tiles) return;
    uint4 strips[4];
    for (int r = 0; r < 4; ++r) strips[r] = __ldcs(tiles + (long long)tile * 128 + r * 32 + lane);
    const float4* scale4 = reinterpret_cast<const float4*>(scales + (long long)tile * 64 + lane / 4 * 8);
    const float4 a = scale4[0], b = scale4[1];
    const float scale[4][2] = {{a.x, a.y}, {a.z, a.w}, {b.x, b.y}, {b.z, b.w}};
    const long long row = (long long)(tile / num_blocks) * 64;
    const int block = tile % num_blocks;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const u32 q[4] = {strips[r].x, strips[r].y, strips[r].z, strips[r].w};
#pragma unroll
        for (int n = 0; n < 16; ++n) {  // half of the strip, 16 columns, 8 columns
            const u32 byte = q[n / 4] >> (n % 4 * 8);
            const float first = codes[byte >> 4 & 15][lane] * scale[r][n / 8];
            const float second = codes[byte & 15][lane] * scale[r][n / 8];
            words[warp][(lane / 4 + n / 8 * 8) * ROW_WORDS + n % 8 * 4 + lane % 4] = round_pair(first, second);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int place = i * 4 + lane / 8;
            if (row + r * 16 + place < out_features)
                out[((row + r * 16 + place) * num_blocks + block) * 8 + lane % 8] =
                    *reinterpret_cast<const uint4*>(&words[warp][place * ROW_WORDS + lane % 8 * 4]);
        }
        __syncwarp();
    }
}
