// Backward kernels of attention by functions that are linear in their coefficients; see attention.cuh.
#include "attention.cuh"

// dq, dz and d(W^T V). The latter, (B, h, 16, d), is complete if a block of rows holds all of them; otherwise its parts
// go to `parts`, (B, h, blocks, 16, d) in float. A warp takes 16 rows, then another 16. It takes D / 16 warps at least.
template <typename T, typename BASIS, typename BASE, int F, int D>
__global__ void __launch_bounds__(224, 2) attention_backward_query_kernel(
    Matrix<const T> grad, Matrix<const T> q, Matrix<const T> k, const T* packed, const T* values, const T* z, T* dz,
    T* dvalues, float* parts, Matrix<T> dq, Sizes size) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8, PACKED = F * RANK + 8, NARROW = RANK + 8;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, rows = 32 * warps, half = 16 * warps;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, blocks = (size.N + rows - 1) / rows;
    T *keys = reinterpret_cast<T*>(shared), *table = keys + size.chunk * WIDTH, *grads = table + size.chunk * PACKED;
    T *sums = grads + half * WIDTH, *projected = sums + half * NARROW;
    const bool whole = size.chunk >= size.N;  // the tokens are one chunk
    const i64 turns = (i64)size.B * size.H * blocks;
    int head = -1;

    for (i64 index = turns * blockIdx.x / gridDim.x; index < turns * (blockIdx.x + 1) / gridDim.x; index++) {
        const Turn turn(index, size, blocks, rows);
        const int b = turn.b, h = turn.h, bh = b * size.H + h;
        auto copy_grads = [&](int m) {
            copy_rows<D>(grads, WIDTH, grad.at(b, h, m), grad.row, half, size.N - m, size.d);
            copy_rows<RANK>(sums, NARROW, z + ((i64)bh * size.N + m) * RANK, RANK, half, size.N - m, RANK);
        };
        copy_grads(turn.first);
        copy_rows<D>(projected, WIDTH, values + (i64)bh * RANK * size.d, size.d, RANK, RANK, size.d);
        float part[2][4] = {};
        for (int side = 0; side < 2; side++) {
            const int m = turn.first + side * half + warp * 16;
            unsigned queries[D / 16][4], dz_operand[4];
            float dq_sum[D / 8][4];
            load_rows<D>(queries, q.at(b, h, m), q.row, size.N - m, size.d);
#pragma unroll
            for (int i = 0; i < D / 2; i++) dq_sum[i / 4][i % 4] = 0;
            for (int start = 0; start < size.N; start += size.chunk) {
                if (!whole || side == 0)
                    copy_rows<D>(keys, WIDTH, k.at(b, h, start), k.row, size.chunk, size.N - start, size.d);
                if (!whole || h != head)
                    copy_packed<F, PACKED>(table, packed, h, 2 * F + 1, F, start, size.chunk, size);
                head = h;
                commit_copies();
                wait_copies<0>();
                __syncthreads();
                if (start == 0) {
                    float c[2][4];
#pragma unroll
                    for (int j = 0; j < D / 16; j++) {
                        unsigned a[4], r[4];
                        load_operand<true, true>(a, grads + warp * 16 * WIDTH + j * 16, WIDTH);
                        load_operand<false, true>(r, projected + j * 16, WIDTH);
                        if (j == 0) {
                            multiply<T>(c, a, r);
                        } else {
                            multiply_add<T>(c, a, r);
                        }
                    }
                    pack_tiles<T>(dz_operand, c);
                    T* row = dz + ((i64)bh * size.N + m) * RANK;
                    store_tile(row, RANK, c[0], 1.0f, size.N - m);
                    store_tile(row + 8, RANK, c[1], 1.0f, size.N - m);
                    if (warp < D / 16)  // 16 columns of d(W^T V)
                        for (int i = 0; i < half; i += 16) {
                            unsigned r[4], s[4];
                            load_operand<true, false>(r, sums + i * NARROW, NARROW);
                            load_operand<false, false>(s, grads + i * WIDTH + warp * 16, WIDTH);
                            multiply_add<T>(part, r, s);
                        }
                    if (side == 0) {
                        __syncthreads();
                        copy_grads(turn.first + half);  // for the other side, during the loop
                    }
                }
                const int count = m < size.N ? min(size.chunk, (size.N - start + 15) / 16 * 16) : 0;
                for (int n = 0; n < count; n += 16) {
                    float x[2][4], dx[2][4];
                    unsigned a[4];
                    scores<D>(x, queries, keys + n * WIDTH);
                    for_features<BASIS, BASE, F, false, true>(
                        x, size, [&](int f, const float (*)[4], const float (*derivative)[4]) {
                            unsigned r[4];
                            float c[2][4];
                            load_operand<false, true>(r, table + n * PACKED + f * RANK, PACKED);
                            multiply<T>(c, dz_operand, r);
                            add_products(dx, derivative, c, f == 0);
                        });
                    pack_tiles<T>(a, dx);
#pragma unroll
                    for (int j = 0; j < D / 16; j++) {
                        unsigned r[4];
                        load_operand<false, false>(r, keys + n * WIDTH + j * 16, WIDTH);
                        multiply_add<T>(dq_sum + 2 * j, a, r);
                    }
                }
                if (!whole || side) __syncthreads();
            }
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                if (j * 8 < size.d) store_tile(dq.at(b, h, m) + j * 8, dq.row, dq_sum[j], size.scale, size.N - m);
        }
        if (warp < D / 16)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int column = warp * 16 + i * 8;
                if (column >= size.d) break;
                if (blocks == 1)
                    store_tile(dvalues + (i64)bh * RANK * size.d + column, size.d, part[i], 1.0f, RANK);
                else
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        *reinterpret_cast<float2*>(parts + (index_of_part(bh, turn.first / rows, blocks) * RANK + g + 8 * j) *
                                                               size.d + column + 2 * t) =
                            make_float2(part[i][2 * j], part[i][2 * j + 1]);
            }
    }
}

// dk, dv, and dA and dW summed over the images of a part of the batch, (parts, h, F + 1, padded, 16) in float. Grid:
// parts x h x blocks of 16 tokens for each warp.
template <typename T, typename BASIS, typename BASE, int F, int D, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 2) attention_backward_key_kernel(
    Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, const T* packed, const T* dz, const T* dvalues,
    Matrix<T> dk, Matrix<T> dv, float* sums, Sizes size, int images) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8, NARROW = RANK + 8;
    const int warp = threadIdx.x / 32, tokens = blockDim.x / 2, blocks = (size.N + tokens - 1) / tokens;
    const int block = blockIdx.x % blocks, h = blockIdx.x / blocks % size.H, part = blockIdx.x / blocks / size.H;
    const int n = block * tokens + warp * 16, left = size.N - n;
    const int first = part * images, last = min(size.B, first + images);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int chunks = (size.N + size.chunk - 1) / size.chunk;
    const int stage = size.chunk * (WIDTH + NARROW), image = (2 * tokens + RANK) * WIDTH;
    T *rows = reinterpret_cast<T*>(shared), *of_image = rows + 2 * stage;
    float* dw = reinterpret_cast<float*>(of_image + 2 * image) + threadIdx.x;  // 8 of each thread

    const T* slots = packed + ((i64)h * (2 * F + 1) * size.padded + n) * RANK;
    const i64 slot = (i64)size.padded * RANK;
    unsigned coefficients[F][1][4];
    float da[F][2][4], dk_sum[D / 8][4];
#pragma unroll
    for (int f = 0; f < F; f++) load_rows<16>(coefficients[f], slots + (F + f) * slot, RANK, left, RANK);
#pragma unroll
    for (int i = 0; i < F * 8; i++) da[i / 8][i % 8 / 4][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) dw[i * blockDim.x] = 0;

    // A step is a chunk of rows of an image. The tokens of k and v, and d(W^T V), come with the first one.
    auto copy = [&](int step) {
        const int b = first + step / chunks, m = step % chunks * size.chunk, bh = b * size.H + h;
        if (b < last) {
            T* target = rows + step % 2 * stage;
            copy_rows<D>(target, WIDTH, q.at(b, h, m), q.row, size.chunk, size.N - m, size.d);
            copy_rows<RANK>(target + size.chunk * WIDTH, NARROW, dz + ((i64)bh * size.N + m) * RANK, RANK, size.chunk,
                            size.N - m, RANK);
            if (m == 0) {
                const int from = block * tokens;
                target = of_image + step / chunks % 2 * image;
                copy_rows<D>(target, WIDTH, k.at(b, h, from), k.row, tokens, size.N - from, size.d);
                target += tokens * WIDTH;
                copy_rows<D>(target, WIDTH, v.at(b, h, from), v.row, tokens, size.N - from, size.d);
                copy_rows<D>(target + tokens * WIDTH, WIDTH, dvalues + (i64)bh * RANK * size.d, size.d, RANK, RANK,
                             size.d);
            }
        }
        commit_copies();
    };
    copy(0);
    for (int step = 0; step < (last - first) * chunks; step++) {
        const int b = first + step / chunks, m = step % chunks * size.chunk;
        const T *queries = rows + step % 2 * stage, *grads = queries + size.chunk * WIDTH;
        const T *keys = of_image + step / chunks % 2 * image, *values = keys + tokens * WIDTH;
        keys += warp * 16 * WIDTH;
        copy(step + 1);
        if (m == 0)
#pragma unroll
            for (int i = 0; i < D / 2; i++) dk_sum[i / 4][i % 4] = 0;
        wait_copies<1>();
        __syncthreads();
        const int count = left > 0 ? min(size.chunk, (size.N - m + 15) / 16 * 16) : 0;
        for (int i = 0; i < count; i += 16) {
            float x[2][4], dx[2][4];  // tokens x rows
            unsigned r[4], by_rows[4], a[4];
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                load_operand<true, true>(a, keys + j * 16, WIDTH);
                load_operand<false, true>(r, queries + i * WIDTH + j * 16, WIDTH);
                if (j == 0) {
                    multiply<T>(x, a, r);
                } else {
                    multiply_add<T>(x, a, r);
                }
            }
            load_operand<false, true>(r, grads + i * NARROW, NARROW);
            load_operand<false, false>(by_rows, grads + i * NARROW, NARROW);
            for_features<BASIS, BASE, F, true, true>(
                x, size, [&](int f, const float (*value)[4], const float (*derivative)[4]) {
                    float c[2][4];
                    multiply<T>(c, coefficients[f][0], r);
                    pack_tiles<T>(a, value);
                    multiply_add<T>(da[f], a, by_rows);
                    add_products(dx, derivative, c, f == 0);
                });
            pack_tiles<T>(a, dx);
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                load_operand<false, false>(r, queries + i * WIDTH + j * 16, WIDTH);
                multiply_add<T>(dk_sum + 2 * j, a, r);
            }
        }
        if (step % chunks == chunks - 1 && left > 0) {
            const T* projected = values + tokens * WIDTH;  // d(W^T V)
            unsigned w[1][4], r[4], a[4];
            float of_w[2][4];
            load_rows<16>(w, slots + 2 * F * slot, RANK, left, RANK);
#pragma unroll
            for (int i = 0; i < 8; i++) of_w[i / 4][i % 4] = dw[i * blockDim.x];
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                float c[2][4];
                load_operand<false, false>(r, projected + j * 16, WIDTH);
                multiply<T>(c, w[0], r);
                load_operand<false, true>(r, projected + j * 16, WIDTH);
                load_operand<true, true>(a, values + warp * 16 * WIDTH + j * 16, WIDTH);
                multiply_add<T>(of_w, a, r);
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    const int column = j * 16 + side * 8;
                    if (column >= size.d) break;
                    store_tile(dk.at(b, h, n) + column, dk.row, dk_sum[2 * j + side], size.scale, left);
                    store_tile(dv.at(b, h, n) + column, dv.row, c[side], 1.0f, left);
                }
            }
#pragma unroll
            for (int i = 0; i < 8; i++) dw[i * blockDim.x] = of_w[i / 4][i % 4];
        }
        __syncthreads();
    }
    constexpr int P = BASE::NONE ? F : F - 1;
    float* target = sums + ((i64)(part * size.H + h) * (F + 1) * size.padded + n) * RANK;
#pragma unroll
    for (int f = 0; f <= F; f++) {
        float* place = target + (f < P ? BASIS::template source<P>(f) : f) * slot;
#pragma unroll
        for (int i = 0; i < 4; i++) {  // rows g and g + 8 of two tiles
            const int row = g + i % 2 * 8, j = i / 2, e = i % 2 * 2;
            const float low = f < F ? da[f][j][e] : dw[(4 * j + e) * blockDim.x];
            const float high = f < F ? da[f][j][e + 1] : dw[(4 * j + e + 1) * blockDim.x];
            if (row < left)
                *reinterpret_cast<float2*>(place + row * RANK + j * 8 + 2 * t) = make_float2(low, high);
        }
    }
}
