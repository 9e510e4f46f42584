// Tensor-core products of 16 x 8 tiles, mma.m16n8k16 with float32 sums, and what feeds them.
//
// A lane has the numbers g = lane / 4 and t = lane % 4. Sums of a 16 x 8 tile: (g, 2t), (g, 2t + 1), (g + 8, 2t) and
// (g + 8, 2t + 1). Two neighbouring tiles of sums, packed in pairs, are the left operand of a next product.
#pragma once
#include "common.cuh"

template <typename T> __device__ __forceinline__ unsigned pack(float low, float high);
template <> __device__ __forceinline__ unsigned pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}
template <> __device__ __forceinline__ unsigned pack<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}

template <typename T> __device__ __forceinline__ unsigned multiply_pairs(unsigned a, unsigned b);
template <> __device__ __forceinline__ unsigned multiply_pairs<__nv_bfloat16>(unsigned a, unsigned b) {
    const __nv_bfloat162 c =
        __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const unsigned*>(&c);
}
template <> __device__ __forceinline__ unsigned multiply_pairs<__half>(unsigned a, unsigned b) {
    const __half2 c = __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const unsigned*>(&c);
}

// a b and c += a b: a 16 x 16 in rows, b 16 x 8 in columns.
#define MMA(TYPE) "mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
#define MMA_FUNCTIONS(NAME, TYPE)                                                                                      \
    template <> struct Tensor<NAME> {                                                                                  \
        static __device__ __forceinline__ void product(float* c, const unsigned* a, unsigned b0, unsigned b1) {        \
            asm(MMA(TYPE) "{%10,%10,%10,%10};" : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                        \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));                            \
        }                                                                                                              \
        static __device__ __forceinline__ void add(float* c, const unsigned* a, unsigned b0, unsigned b1) {            \
            asm(MMA(TYPE) "{%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                            \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                       \
        }                                                                                                              \
    };
template <typename T> struct Tensor;
MMA_FUNCTIONS(__nv_bfloat16, "bf16")
MMA_FUNCTIONS(__half, "f16")

// Two neighbouring tiles of sums as the left operand of a product.
template <typename T> __device__ __forceinline__ void pack_tiles(unsigned* a, const float (*c)[4]) {
    a[0] = pack<T>(c[0][0], c[0][1]), a[1] = pack<T>(c[0][2], c[0][3]);
    a[2] = pack<T>(c[1][0], c[1][1]), a[3] = pack<T>(c[1][2], c[1][3]);
}

// A 16 x 16 operand from shared memory, `stride` elements apart: LEFT or two right ones, (r[0], r[1]) and (r[2], r[3]).
// ALONG: the 16 elements that the product sums lie in a row of the memory, that is, in a row of a left operand or in a
// column of a right one.
template <bool LEFT, bool ALONG, typename T>
__device__ __forceinline__ void load_operand(unsigned* r, const T* corner, int stride) {
    // The quarters of the tile that r[1] and r[2] hold: the lower left and the upper right one, or the reverse.
    const int lane = threadIdx.x % 32, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    corner += LEFT == ALONG ? (lane % 8 + second) * stride + third : (lane % 8 + third) * stride + second;
    const unsigned address = (unsigned)__cvta_generic_to_shared(corner);
    if (ALONG)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

// Two neighbouring tiles of sums: a [b0 b1] and c += a [b0 b1].
template <typename T> __device__ __forceinline__ void multiply(float (*c)[4], const unsigned* a, const unsigned* b) {
    Tensor<T>::product(c[0], a, b[0], b[1]);
    Tensor<T>::product(c[1], a, b[2], b[3]);
}
template <typename T>
__device__ __forceinline__ void multiply_add(float (*c)[4], const unsigned* a, const unsigned* b) {
    Tensor<T>::add(c[0], a, b[0], b[1]);
    Tensor<T>::add(c[1], a, b[2], b[3]);
}

// Left operands of 16 rows of device memory, D columns; 0 beyond `rows` and `columns`, which is a multiple of 8.
template <int D, typename T>
__device__ __forceinline__ void load_rows(unsigned (*a)[4], const T* source, i64 stride, int rows, int columns) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = g + i % 2 * 8, column = k * 16 + i / 2 * 8 + 2 * t;
            const bool in = row < rows && column < columns;
            a[k][i] = in ? __ldg(reinterpret_cast<const unsigned*>(source + row * stride + column)) : 0;
        }
}

// Two neighbouring elements of each of two rows, g and g + 8, of a tile of sums.
template <typename T>
__device__ __forceinline__ void store_tile(T* target, i64 stride, const float* c, float scale, int rows) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (g < rows) *reinterpret_cast<unsigned*>(target + g * stride + 2 * t) = pack<T>(c[0] * scale, c[1] * scale);
    if (g + 8 < rows)
        *reinterpret_cast<unsigned*>(target + (g + 8) * stride + 2 * t) = pack<T>(c[2] * scale, c[3] * scale);
}

// Both tiles of 8 columns, as far as there are `columns`. A lane gets the numbers of a neighbour and stores 8 bytes.
template <typename T>
__device__ __forceinline__ void store_tiles(T* target, i64 stride, const float (*c)[4], float scale, int rows,
                                            int columns) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const bool odd = t % 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {  // rows g and g + 8
        const unsigned low = pack<T>(c[0][2 * i] * scale, c[0][2 * i + 1] * scale);
        const unsigned high = pack<T>(c[1][2 * i] * scale, c[1][2 * i + 1] * scale);
        // An even lane keeps its pair of the first tile and gets the next one, an odd lane likewise of the second tile.
        const unsigned other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
        const uint2 pairs = odd ? make_uint2(other, high) : make_uint2(low, other);
        const int column = (odd ? 8 : 0) + t / 2 * 4;
        if (g + 8 * i < rows && column < columns)
            *reinterpret_cast<uint2*>(target + (g + 8 * i) * stride + column) = pairs;
    }
}

// Starts copies of COLUMNS elements of each of `count` rows; 0 beyond `rows` and `columns` of the source. This is
// thread `thread` of the `threads` that take part.
template <int COLUMNS, typename T>
__device__ __forceinline__ void copy_rows(T* target, int target_stride, const T* source, i64 stride, int count,
                                          int rows, int columns, int thread, int threads) {
    constexpr int PIECES = COLUMNS <= 16 ? 2 : COLUMNS <= 32 ? 4 : 8;  // of 16 bytes
    const int column = thread % PIECES * 8, first = thread / PIECES, step = threads / PIECES;
    if (column >= COLUMNS) return;
    if (column >= columns) rows = 0;
    unsigned address = (unsigned)__cvta_generic_to_shared(target + first * target_stride + column);
    const T* from = source + first * stride + column;
    for (int row = first; row < count; row += step) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(row < rows ? from : source),
                     "r"(row < rows ? 16 : 0) : "memory");
        address += step * target_stride * sizeof(T), from += step * stride;
    }
}
