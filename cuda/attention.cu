// Attention by functions that are linear in their coefficients (kan_basis/attention.py), for half precision, head
// dimensions up to 64, ranks up to 16 and up to 8 features; attention_kernels.py has the formulas and all other cases.
//
//   x = scale q k^T,   z[m, p] = sum_n sum_f F_f(x[m, n]) A[f, n, p],   out = z (W^T V)
//
// Layout   q, k, v, out and their gradients: (B, h, N, d) with any strides that are multiples of 8, 1 in d. packed:
//          (h, 2 F + 1, padded, 16) from attention_kernels.py, that is A, A with the factors of the derivatives, and W,
//          0 in the padding. z, dz: (B, h, N, 16). Tiles of x have 16 x 16 elements and live in registers.
// Types    operands T, sums and x float.
// Work     of a warp for 16 x 16 scores, F = 6, d = 64, in instructions: forward 20 products (mma.m16n8k16), 16 sines
//          and cosines, 40 to advance the features, 24 to pack them. dq: 28 products and 48 to add up the derivative.
//          dk and dA: 40 products.
// Launch   forward and dq: a block takes consecutive rows of one (B, h), a warp 32 or 16 of them, and goes over all
//          tokens in chunks in shared memory. dk and dA: a warp takes 16 tokens of one head, keeps their operands and
//          the sums of their coefficients in registers, and goes over the rows of a part of the batch.
// Sums     Every output has one writer. dA and dW of the parts of the batch, and d(W^T V) of the blocks of rows, are
//          added in a fixed order: equal inputs give equal bits.
#include "features.h"
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

// F features of x (8 per lane), of which the last is the base function, if there is one. `use` gets each one and its 8
// values or derivatives.
template <typename BASIS, typename BASE, int F, bool VALUES, bool DERIVATIVES, typename Use>
__device__ __forceinline__ void for_features(const float (*x)[4], const Sizes& size, Use use) {
    constexpr int P = BASE::NONE ? F : F - 1;
    BASIS state[8];
    float scaled[8], values[2][4], derivatives[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        scaled[i] = x[i / 4][i % 4] * size.scale;
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

// x of 16 rows, whose operands are `a`, and 16 tokens from `b` in shared memory.
template <int D, typename T>
__device__ __forceinline__ void scores(float (*x)[4], const unsigned (*a)[4], const T* b) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i / 4][i % 4] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        unsigned r[4];
        load_tile<false>(r, b + k * 16, D + 8);
        Tensor<T>::multiply(x[0], a[k], r[0], r[2]);
        Tensor<T>::multiply(x[1], a[k], r[1], r[3]);
    }
}

// COUNT slots of the packed coefficients of head h from slot FIRST on, for `count` tokens from n on.
template <int COUNT, int WIDTH, typename T>
__device__ __forceinline__ void copy_packed(T* target, const T* packed, int h, int slots, int first, int n, int count,
                                            const Sizes& size) {
    for (int f = 0; f < COUNT; f++)
        copy_rows<RANK>(target + f * RANK, WIDTH, packed + ((i64)(h * slots + first + f) * size.padded + n) * RANK,
                        RANK, count, size.padded - n, RANK);
}

// Grid: B h blocks of 32 rows for each warp.
template <typename T, typename BASIS, typename BASE, int F, int D>
__global__ void __launch_bounds__(224, 2) attention_forward_kernel(
    Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, const T* packed, T* values, T* z, Matrix<T> out, Sizes size) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8, PACKED = (F + 1) * RANK + 8;
    T *keys = reinterpret_cast<T*>(shared), *tokens = keys + size.chunk * WIDTH, *table = tokens + size.chunk * WIDTH;
    float* projected = reinterpret_cast<float*>(table + size.chunk * PACKED);  // W^T V, (16, D)
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, rows = 32 * warps, blocks = (size.N + rows - 1) / rows;
    const int bh = blockIdx.x / blocks, b = bh / size.H, h = bh % size.H, m = blockIdx.x % blocks * rows + warp * 32;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

    unsigned queries[2][D / 16][4];
    float sums[2][2][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        load_rows<D>(queries[i], q.at(b, h, m + i * 16), q.row, size.N - m - i * 16, size.d);
#pragma unroll
        for (int j = 0; j < 8; j++) sums[i][j / 4][j % 4] = 0;
    }
    for (int start = 0; start < size.N; start += size.chunk) {
        const int count = min(size.chunk, (size.N - start + 15) / 16 * 16);
        copy_rows<D>(keys, WIDTH, k.at(b, h, start), k.row, count, size.N - start, size.d);
        copy_rows<D>(tokens, WIDTH, v.at(b, h, start), v.row, count, size.N - start, size.d);
        copy_packed<F, PACKED>(table, packed, h, 2 * F + 1, 0, start, count, size);
        copy_packed<1, PACKED>(table + F * RANK, packed, h, 2 * F + 1, 2 * F, start, count, size);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        if (m < size.N) {
            for (int n = 0; n < count; n += 16) {
                float x[2][2][4];
                unsigned coefficients[F][4];
                scores<D>(x[0], queries[0], keys + n * WIDTH);
                scores<D>(x[1], queries[1], keys + n * WIDTH);
#pragma unroll
                for (int f = 0; f < F; f++) load_tile<true>(coefficients[f], table + n * PACKED + f * RANK, PACKED);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (i && m + 16 >= size.N) break;
                    for_features<BASIS, BASE, F, true, false>(
                        x[i], size, [&](int f, const float (*value)[4], const float (*)[4]) {
                            unsigned a[4];
                            pack_tiles<T>(a, value);
                            Tensor<T>::multiply(sums[i][0], a, coefficients[f][0], coefficients[f][1]);
                            Tensor<T>::multiply(sums[i][1], a, coefficients[f][2], coefficients[f][3]);
                        });
                }
            }
        }
        for (int tile = warp; tile < D / 16; tile += warps) {  // 16 columns of W^T V
            float c[2][4] = {};
            for (int n = 0; n < count; n += 16) {
                unsigned w[4], r[4];
                load_tile<true>(w, table + n * PACKED + F * RANK, PACKED);
                load_tile<true>(r, tokens + n * WIDTH + tile * 16, WIDTH);
                const unsigned a[4] = {w[0], w[2], w[1], w[3]};
                Tensor<T>::multiply(c[0], a, r[0], r[1]);
                Tensor<T>::multiply(c[1], a, r[2], r[3]);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float& sum = projected[(g + i % 4 / 2 * 8) * D + tile * 16 + i / 4 * 8 + 2 * t + i % 2];
                sum = start ? sum + c[i / 4][i % 4] : c[i / 4][i % 4];
            }
        }
        __syncthreads();
    }
    T* rounded = keys;  // W^T V
    for (int i = threadIdx.x; i < RANK * D; i += blockDim.x) {
        const T value = from_float<T>(projected[i]);
        rounded[i / D * WIDTH + i % D] = value;
        if (blockIdx.x % blocks == 0 && i % D < size.d) values[((i64)bh * RANK + i / D) * size.d + i % D] = value;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int first = m + i * 16, left = size.N - first;
        if (left <= 0) break;
        unsigned a[4];
        pack_tiles<T>(a, sums[i]);
        T* row = z + ((i64)bh * size.N + first) * RANK;
        store_tile(row, RANK, sums[i][0], 1.0f, left);
        store_tile(row + 8, RANK, sums[i][1], 1.0f, left);
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            unsigned r[4];
            float c[2][4] = {};
            load_tile<true>(r, rounded + j * 16, WIDTH);
            Tensor<T>::multiply(c[0], a, r[0], r[1]);
            Tensor<T>::multiply(c[1], a, r[2], r[3]);
#pragma unroll
            for (int side = 0; side < 2; side++)
                if (j * 16 + side * 8 < size.d)
                    store_tile(out.at(b, h, first) + j * 16 + side * 8, out.row, c[side], 1.0f, left);
        }
    }
}

// dq, dz, and d(W^T V) of the rows of each block, (B, h, blocks, 16, d) in float. Grid: B h blocks of 16 rows for each
// warp.
template <typename T, typename BASIS, typename BASE, int F, int D>
__global__ void __launch_bounds__(224, 2) attention_backward_query_kernel(
    Matrix<const T> grad, Matrix<const T> q, Matrix<const T> k, const T* packed, const T* values, const T* z, T* dz,
    float* parts, Matrix<T> dq, Sizes size) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8, PACKED = F * RANK + 8, NARROW = RANK + 8;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, rows = 16 * warps, blocks = (size.N + rows - 1) / rows;
    const int bh = blockIdx.x / blocks, b = bh / size.H, h = bh % size.H, first = blockIdx.x % blocks * rows;
    const int m = first + warp * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    T *keys = reinterpret_cast<T*>(shared), *table = keys + size.chunk * WIDTH, *grads = table + size.chunk * PACKED;
    T *sums = grads + rows * WIDTH, *projected = sums + rows * NARROW;

    copy_rows<D>(grads, WIDTH, grad.at(b, h, first), grad.row, rows, size.N - first, size.d);
    copy_rows<RANK>(sums, NARROW, z + ((i64)bh * size.N + first) * RANK, RANK, rows, size.N - first, RANK);
    copy_rows<D>(projected, WIDTH, values + (i64)bh * RANK * size.d, size.d, RANK, RANK, size.d);
    unsigned queries[D / 16][4], dz_operand[4];
    load_rows<D>(queries, q.at(b, h, m), q.row, size.N - m, size.d);
    float dx_sum[D / 8][4];
#pragma unroll
    for (int i = 0; i < D / 2; i++) dx_sum[i / 4][i % 4] = 0;
    for (int start = 0; start < size.N; start += size.chunk) {
        const int count = min(size.chunk, (size.N - start + 15) / 16 * 16);
        copy_rows<D>(keys, WIDTH, k.at(b, h, start), k.row, count, size.N - start, size.d);
        copy_packed<F, PACKED>(table, packed, h, 2 * F + 1, F, start, count, size);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        if (start == 0) {
            float c[2][4] = {};
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                unsigned a[4], r[4];
                load_tile<false>(a, grads + warp * 16 * WIDTH + j * 16, WIDTH);
                load_tile<false>(r, projected + j * 16, WIDTH);
                Tensor<T>::multiply(c[0], a, r[0], r[2]);
                Tensor<T>::multiply(c[1], a, r[1], r[3]);
            }
            pack_tiles<T>(dz_operand, c);
            T* row = dz + ((i64)bh * size.N + m) * RANK;
            store_tile(row, RANK, c[0], 1.0f, size.N - m);
            store_tile(row + 8, RANK, c[1], 1.0f, size.N - m);
            for (int tile = warp; tile < D / 16; tile += warps) {  // 16 columns of d(W^T V)
                float sum[2][4] = {};
                for (int i = 0; i < rows; i += 16) {
                    unsigned r[4], s[4];
                    load_tile<true>(r, sums + i * NARROW, NARROW);
                    load_tile<true>(s, grads + i * WIDTH + tile * 16, WIDTH);
                    const unsigned a[4] = {r[0], r[2], r[1], r[3]};
                    Tensor<T>::multiply(sum[0], a, s[0], s[1]);
                    Tensor<T>::multiply(sum[1], a, s[2], s[3]);
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int p = g + i % 4 / 2 * 8, column = tile * 16 + i / 4 * 8 + 2 * t + i % 2;
                    if (column < size.d) parts[((i64)blockIdx.x * RANK + p) * size.d + column] = sum[i / 4][i % 4];
                }
            }
        }
        if (m < size.N) {
            for (int n = 0; n < count; n += 16) {
                float x[2][4], dx[2][4] = {};
                scores<D>(x, queries, keys + n * WIDTH);
                for_features<BASIS, BASE, F, false, true>(
                    x, size, [&](int f, const float (*)[4], const float (*derivative)[4]) {
                        unsigned r[4];
                        float c[2][4] = {};
                        load_tile<false>(r, table + n * PACKED + f * RANK, PACKED);
                        Tensor<T>::multiply(c[0], dz_operand, r[0], r[2]);
                        Tensor<T>::multiply(c[1], dz_operand, r[1], r[3]);
#pragma unroll
                        for (int i = 0; i < 8; i++) dx[i / 4][i % 4] += derivative[i / 4][i % 4] * c[i / 4][i % 4];
                    });
                unsigned a[4];
                pack_tiles<T>(a, dx);
#pragma unroll
                for (int j = 0; j < D / 16; j++) {
                    unsigned r[4];
                    load_tile<true>(r, keys + n * WIDTH + j * 16, WIDTH);
                    Tensor<T>::multiply(dx_sum[2 * j], a, r[0], r[1]);
                    Tensor<T>::multiply(dx_sum[2 * j + 1], a, r[2], r[3]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < D / 8; j++)
        if (j * 8 < size.d) store_tile(dq.at(b, h, m) + j * 8, dq.row, dx_sum[j], size.scale, size.N - m);
}

// dk, dv, and dA and dW summed over the images of a part of the batch, (parts, h, F + 1, padded, 16) in float. Grid:
// parts x h x blocks of 16 tokens for each warp. The next chunk of rows is copied while one is computed.
template <typename T, typename BASIS, typename BASE, int F, int D, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 2) attention_backward_key_kernel(
    Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, const T* packed, const T* dz, const float* parts, Matrix<T> dk,
    Matrix<T> dv, float* sums, Sizes size, int images, int query_blocks) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8, NARROW = RANK + 8;
    const int warp = threadIdx.x / 32, tokens = blockDim.x / 2, blocks = (size.N + tokens - 1) / tokens;
    const int n = blockIdx.x % blocks * tokens + warp * 16, h = blockIdx.x / blocks % size.H;
    const int part = blockIdx.x / blocks / size.H, first = part * images, last = min(size.B, first + images);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, left = size.N - n;
    const int chunks = (size.N + size.chunk - 1) / size.chunk, stage = size.chunk * (WIDTH + NARROW);
    T *rows = reinterpret_cast<T*>(shared), *projected = rows + 2 * stage;  // d(W^T V)

    const T* slots = packed + (i64)h * (2 * F + 1) * size.padded * RANK + (i64)n * RANK;
    unsigned keys[D / 16][4], coefficients[F][1][4], w[1][4];
#pragma unroll
    for (int f = 0; f < F; f++) load_rows<16>(coefficients[f], slots + (F + f) * size.padded * RANK, RANK, left, RANK);
    load_rows<16>(w, slots + 2 * F * size.padded * RANK, RANK, left, RANK);
    float da[F][2][4], dw[2][4] = {}, dk_sum[D / 8][4];
#pragma unroll
    for (int i = 0; i < F * 8; i++) da[i / 8][i % 8 / 4][i % 4] = 0;

    auto prefetch = [&](int turn) {
        const int b = first + turn / chunks, m = turn % chunks * size.chunk;
        if (b < last) {
            const int count = min(size.chunk, (size.N - m + 15) / 16 * 16);
            T* target = rows + turn % 2 * stage;
            copy_rows<D>(target, WIDTH, q.at(b, h, m), q.row, count, size.N - m, size.d);
            copy_rows<RANK>(target + size.chunk * WIDTH, NARROW, dz + ((i64)(b * size.H + h) * size.N + m) * RANK, RANK,
                            count, size.N - m, RANK);
        }
        commit_copies();
    };
    prefetch(0);
    for (int turn = 0; turn < (last - first) * chunks; turn++) {
        const int b = first + turn / chunks, m = turn % chunks * size.chunk;
        const int count = min(size.chunk, (size.N - m + 15) / 16 * 16);
        const T *queries = rows + turn % 2 * stage, *grads = queries + size.chunk * WIDTH;
        prefetch(turn + 1);
        if (m == 0) {
            load_rows<D>(keys, k.at(b, h, n), k.row, left, size.d);
            for (int i = threadIdx.x; i < RANK * D; i += blockDim.x) {
                const int p = i / D, column = i % D;
                float sum = 0;
                if (column < size.d)
                    for (int block = 0; block < query_blocks; block++)
                        sum += parts[((i64)((b * size.H + h) * query_blocks + block) * RANK + p) * size.d + column];
                projected[p * WIDTH + column] = from_float<T>(sum);
            }
#pragma unroll
            for (int i = 0; i < D / 2; i++) dk_sum[i / 4][i % 4] = 0;
        }
        wait_copies<1>();
        __syncthreads();
        for (int i = 0; i < count; i += 16) {
            float x[2][4], dx[2][4] = {};
            unsigned r[4], by_rows[4], a[4];
            scores<D>(x, keys, queries + i * WIDTH);  // transposed: tokens x rows
            load_tile<false>(r, grads + i * NARROW, NARROW);
            load_tile<true>(by_rows, grads + i * NARROW, NARROW);
            for_features<BASIS, BASE, F, true, true>(
                x, size, [&](int f, const float (*value)[4], const float (*derivative)[4]) {
                    pack_tiles<T>(a, value);
                    Tensor<T>::multiply(da[f][0], a, by_rows[0], by_rows[1]);
                    Tensor<T>::multiply(da[f][1], a, by_rows[2], by_rows[3]);
                    float c[2][4] = {};
                    Tensor<T>::multiply(c[0], coefficients[f][0], r[0], r[2]);
                    Tensor<T>::multiply(c[1], coefficients[f][0], r[1], r[3]);
#pragma unroll
                    for (int j = 0; j < 8; j++) dx[j / 4][j % 4] += derivative[j / 4][j % 4] * c[j / 4][j % 4];
                });
            pack_tiles<T>(a, dx);
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                load_tile<true>(r, queries + i * WIDTH + j * 16, WIDTH);
                Tensor<T>::multiply(dk_sum[2 * j], a, r[0], r[1]);
                Tensor<T>::multiply(dk_sum[2 * j + 1], a, r[2], r[3]);
            }
        }
        if (turn % chunks == chunks - 1 && left > 0) {
            unsigned tokens_of_v[D / 16][4];
            load_rows<D>(tokens_of_v, v.at(b, h, n), v.row, left, size.d);
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                unsigned r[4];
                float c[2][4] = {};
                load_tile<true>(r, projected + j * 16, WIDTH);
                Tensor<T>::multiply(c[0], w[0], r[0], r[1]);
                Tensor<T>::multiply(c[1], w[0], r[2], r[3]);
                load_tile<false>(r, projected + j * 16, WIDTH);
                Tensor<T>::multiply(dw[0], tokens_of_v[j], r[0], r[2]);
                Tensor<T>::multiply(dw[1], tokens_of_v[j], r[1], r[3]);
#pragma unroll
                for (int side = 0; side < 2; side++)
                    if (j * 16 + side * 8 < size.d) {
                        const int column = j * 16 + side * 8;
                        store_tile(dk.at(b, h, n) + column, dk.row, dk_sum[2 * j + side], size.scale, left);
                        store_tile(dv.at(b, h, n) + column, dv.row, c[side], 1.0f, left);
                    }
            }
        }
        __syncthreads();
    }
    constexpr int P = BASE::NONE ? F : F - 1;
    float* target = sums + ((i64)(part * size.H + h) * (F + 1) * size.padded + n) * RANK;
#pragma unroll
    for (int f = 0; f <= F; f++) {
        const float(*c)[4] = f < F ? da[f] : dw;
        float* slot = target + (i64)(f < P ? BASIS::template source<P>(f) : f) * size.padded * RANK;
#pragma unroll
        for (int i = 0; i < 4; i++)  // rows g and g + 8 of the two tiles
            if (g + i % 2 * 8 < left)
                *reinterpret_cast<float2*>(slot + (g + i % 2 * 8) * RANK + i / 2 * 8 + 2 * t) =
                    make_float2(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
    }
}
