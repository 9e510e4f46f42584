// Attention by functions that are linear in their coefficients (kan_basis/attention.py), for half precision, heads of
// up to 64 channels, ranks up to 16, up to 8 features and 272 tokens. attention_kernels.py has the formulas of the
// gradients and takes all other cases.
//
//   x = scale q k^T,   z[m, p] = sum_n sum_f F_f(x[m, n]) A[f, n, p],   out = z (W^T V)
//
// Layout   q, k, v, out and their gradients: (B, h, N, d) with any strides that are multiples of 8, 1 in d. packed:
//          (h, 2 F + 1, padded, 16), that is A, A with the factors of the derivatives, and W, and 0 in the padding.
//          z, dz: (B, h, N, 16). A warp has a tile of 16 x 16 elements of x in its registers.
// Types    operands T, sums and x float.
// Work     of a warp for a tile, F = 6, d = 64, in instructions. Forward: 20 products (mma.m16n8k16), 16 sines and
//          cosines, 40 to advance the features, 24 to pack them; 134 in all. dq: 28 products, 48 to add up the
//          derivative; 175 in all. dk and dA: 40 products; 223 in all.
// Launch   Forward and dq: persistent blocks of several groups of warps, see Group. dk and dA: a warp takes 16 tokens
//          of one head, keeps the sums of their coefficients in registers, and goes over the rows of a part of the
//          batch, of which the next ones are copied meanwhile.
// Sums     Every output has one writer. dA and dW of the parts of the batch are added in a fixed order: equal inputs
//          give equal bits.
#pragma once
#include "attention_features.h"
#include "mma.cuh"

#define RANK 16

template <typename T>
struct Matrix {  // (B, h, N, d)
    T* data;
    i64 image, head, row;
    __device__ __forceinline__ T* at(int b, int h, int n) const { return data + b * image + h * head + n * row; }
};

struct Sizes {
    int B, H, N, d, padded, chunk;
    float scale, low, step;
};

// F features of scale x (8 per lane), of which the last is the base function, if there is one. `use` gets each one and
// its 8 values or derivatives.
template <typename BASIS, typename BASE, int F, bool VALUES, bool DERIVATIVES, typename Use>
__device__ __forceinline__ void for_features(const float (*x)[4], const Sizes& size, float scale, Use use) {
    constexpr int P = BASE::NONE ? F : F - 1;
    BASIS state[8];
    float scaled[8], values[2][4], derivatives[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        scaled[i] = x[i / 4][i % 4] * scale;
        state[i].start(scaled[i], size.low, size.step);
    }
#pragma unroll
    for (int f = 0; f < F; f++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (VALUES) values[i / 4][i % 4] = f < P ? state[i].value(f) : BASE::value(scaled[i]);
            if (DERIVATIVES) derivatives[i / 4][i % 4] = f < P ? state[i].derivative(f) : BASE::derivative(scaled[i]);
            if (f + 1 < P) state[i].advance(f);
        }
        use(f, values, derivatives);
    }
}

template <typename T, int D> __device__ __forceinline__ void scale_operands(unsigned (*a)[4], float scale) {
    const unsigned pair = pack<T>(scale, scale);
#pragma unroll
    for (int i = 0; i < D / 4; i++) a[i / 4][i % 4] = multiply_pairs<T>(a[i / 4][i % 4], pair);
}

// x of 16 rows, whose operands are `a`, and 16 tokens from `b` in shared memory.
template <int D, typename T>
__device__ __forceinline__ void scores(float (*x)[4], const unsigned (*a)[4], const T* b) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        unsigned r[4];
        load_operand<false, true>(r, b + k * 16, D + 8);
        if (k == 0)
            multiply<T>(x, a[k], r);
        else
            multiply_add<T>(x, a[k], r);
    }
}

// dx += derivative c, or = for the first one.
__device__ __forceinline__ void add_products(float (*dx)[4], const float (*derivative)[4], const float (*c)[4],
                                             bool first) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float term = derivative[i / 4][i % 4] * c[i / 4][i % 4];
        dx[i / 4][i % 4] = first ? term : dx[i / 4][i % 4] + term;
    }
}

// All threads: starts copies of COUNT slots of the packed coefficients of head h, from slot `first` on.
template <int COUNT, int WIDTH, typename T>
__device__ __forceinline__ void copy_packed(T* target, const T* packed, int h, int slots, int first,
                                            const Sizes& size) {
    for (int f = 0; f < COUNT; f++)
        copy_rows<RANK>(target + f * RANK, WIDTH, packed + (i64)(h * slots + first + f) * size.padded * RANK, RANK,
                        size.chunk, size.padded, RANK, threadIdx.x, blockDim.x);
    commit_copies();  // also for threads that copy nothing else, whose wait would ignore them
}

// A grid shares the heads evenly, and the warps of a block form groups. A group takes a block of the rows of an image,
// 16 rows for each warp at a time, then one of another image. Shared memory holds the coefficients of the head, for all
// groups, and all tokens of the image of each group.
template <int SLOTS, int D, typename T>
struct Group {
    static constexpr int WIDTH = D + 8, PACKED = SLOTS * RANK + 8;
    const Sizes& size;
    int head, threads, thread, warp, index, first, stride;
    T *table, *tokens, *more;

    // `rest` elements of each group lie behind its tokens, at `more`.
    __device__ __forceinline__ Group(T* shared, const Sizes& size, int warps, int rest)
        : size(size), head(blockIdx.x % size.H), threads(32 * warps) {
        thread = threadIdx.x % threads, warp = thread / 32, index = threadIdx.x / threads;
        stride = gridDim.x / size.H * (blockDim.x / threads);
        first = blockIdx.x / size.H + index * (gridDim.x / size.H);
        table = shared;
        tokens = shared + size.chunk * PACKED + index * (size.chunk * WIDTH + rest);
        more = tokens + size.chunk * WIDTH;
    }
    __device__ __forceinline__ void copy_tokens(const Matrix<const T>& from, int b) const {
        copy_rows<D>(tokens, WIDTH, from.at(b, head, 0), from.row, size.chunk, size.N, size.d, thread, threads);
        commit_copies();
    }
    // Waits for the copies of the threads of the group, or of all groups.
    __device__ __forceinline__ void wait(bool all = false) const {
        wait_copies<0>();
        if (all)
            __syncthreads();
        else
            asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "r"(threads) : "memory");
    }
};
