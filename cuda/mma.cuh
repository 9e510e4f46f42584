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

template <typename T> struct Tensor;  // c += a b: a 16 x 16 in rows, b 16 x 8 in columns
template <> struct Tensor<__nv_bfloat16> {
    static __device__ __forceinline__ void multiply(float* c, const unsigned* a, unsigned b0, unsigned b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};
template <> struct Tensor<__half> {
    static __device__ __forceinline__ void multiply(float* c, const unsigned* a, unsigned b0, unsigned b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

// Two neighbouring tiles of sums as the left operand of a product.
template <typename T> __device__ __forceinline__ void pack_tiles(unsigned* a, const float (*c)[4]) {
    a[0] = pack<T>(c[0][0], c[0][1]), a[1] = pack<T>(c[0][2], c[0][3]);
    a[2] = pack<T>(c[1][0], c[1][1]), a[3] = pack<T>(c[1][2], c[1][3]);
}

// 16 x 16 elements of shared memory from `corner`, rows `stride` apart: quarters (rows 0-7, columns 0-7), (8-15, 0-7),
// (0-7, 8-15), (8-15, 8-15). A lane gets row g, columns 2t and 2t + 1 of each; TRANSPOSED, rows 2t and 2t + 1, column g.
//   left operand from rows: r; from columns, TRANSPOSED: r[0], r[2], r[1], r[3]
//   right operand, two tiles: of a matrix that is stored by columns: (r[0], r[2]), (r[1], r[3]); by rows, TRANSPOSED:
//   (r[0], r[1]), (r[2], r[3])
template <bool TRANSPOSED, typename T>
__device__ __forceinline__ void load_tile(unsigned* r, const T* corner, int stride) {
    const int lane = threadIdx.x % 32;
    const unsigned address = (unsigned)__cvta_generic_to_shared(corner + lane % 16 * stride + lane / 16 * 8);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
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

// All threads: starts copies of COLUMNS elements of each of `count` rows; 0 beyond `rows` and `columns` of the source.
template <int COLUMNS, typename T>
__device__ __forceinline__ void copy_rows(T* target, int target_stride, const T* source, i64 stride, int count, int rows,
                                          int columns) {
    for (int i = threadIdx.x; i < count * (COLUMNS / 8); i += blockDim.x) {
        const int row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
        const bool in = row < rows && column < columns;
        const T* from = in ? source + row * stride + column : source;
        const unsigned address = (unsigned)__cvta_generic_to_shared(target + row * target_stride + column);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(in ? 16 : 0)
                     : "memory");
    }
}
