// Backward kernels of attention by functions that are linear in their coefficients; see attention.cuh.
#include "attention.cuh"

// dz = dout (W^T V)^T, (B, h, N, 16), and d(W^T V) = z^T dout, (B, h, 16, d). Grid: B h blocks of D / 16 warps.
template <typename T, int D>
__global__ void __launch_bounds__(2 * D) attention_backward_values_kernel(
    Matrix<const T> grad, const T* values, const T* z, T* dz, T* dvalues, Sizes size) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8, NARROW = RANK + 8;
    const int bh = blockIdx.x, b = bh / size.H, h = bh % size.H, warp = threadIdx.x / 32;
    T *grads = reinterpret_cast<T*>(shared), *sums = grads + size.chunk * WIDTH;
    T* projected = sums + size.chunk * NARROW;

    copy_rows<D>(projected, WIDTH, values + (i64)bh * RANK * size.d, size.d, RANK, RANK, size.d, threadIdx.x, 2 * D);
    float part[2][4] = {};
    for (int start = 0; start < size.N; start += size.chunk) {
        copy_rows<D>(grads, WIDTH, grad.at(b, h, start), grad.row, size.chunk, size.N - start, size.d, threadIdx.x,
                     2 * D);
        copy_rows<RANK>(sums, NARROW, z + ((i64)bh * size.N + start) * RANK, RANK, size.chunk, size.N - start, RANK,
                        threadIdx.x, 2 * D);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        const int count = min(size.chunk, size.N - start);
        for (int i = 0; i < count; i += 16) {  // 16 columns for each warp
            unsigned a[4], r[4];
            load_operand<true, false>(a, sums + i * NARROW, NARROW);
            load_operand<false, false>(r, grads + i * WIDTH + warp * 16, WIDTH);
            multiply_add<T>(part, a, r);
        }
        for (int i = warp * 16; i < count; i += D) {  // 16 rows for each warp
            float c[2][4] = {};
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                unsigned a[4], r[4];
                load_operand<true, true>(a, grads + i * WIDTH + j * 16, WIDTH);
                load_operand<false, true>(r, projected + j * 16, WIDTH);
                multiply_add<T>(c, a, r);
            }
            T* row = dz + ((i64)bh * size.N + start + i) * RANK;
            store_tile(row, RANK, c[0], 1.0f, size.N - start - i);
            store_tile(row + 8, RANK, c[1], 1.0f, size.N - start - i);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (warp * 16 + i * 8 < size.d)
            store_tile(dvalues + (i64)bh * RANK * size.d + warp * 16 + i * 8, size.d, part[i], 1.0f, RANK);
}

// dq. Grid: a multiple of h. `warps` form a group. A turn of a group is one of `blocks` blocks of the rows of an image.
// EXACT: q can be multiplied by the scale without rounding.
template <typename T, typename BASIS, typename BASE, int F, int D, bool EXACT>
__global__ void __launch_bounds__(512, 1) attention_backward_query_kernel(
    Matrix<const T> q, Matrix<const T> k, const T* packed, const T* dz, Matrix<T> dq, Sizes size, int warps,
    int blocks) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8, NARROW = RANK + 8;
    const Group<F, D, T> group(reinterpret_cast<T*>(shared), size, warps, 16 * warps * (WIDTH + NARROW));
    constexpr int PACKED = group.PACKED;
    const int h = group.head, rows = ((size.N + blocks - 1) / blocks + 15) / 16 * 16;
    T *queries = group.more + 16 * group.warp * (WIDTH + NARROW), *grads = queries + 16 * WIDTH;  // rows of the warp

    copy_packed<F, PACKED>(group.table, packed, h, 2 * F + 1, F, size);
    if (group.first >= size.B * blocks) group.wait(true);
    for (int turn = group.first; turn < size.B * blocks; turn += group.stride) {
        const int b = turn / blocks, first = turn % blocks * rows, last = min(size.N, first + rows);
        auto copy_queries = [&](int m) {
            copy_rows<D>(queries, WIDTH, q.at(b, h, m), q.row, 16, last - m, size.d, threadIdx.x % 32, 32);
            copy_rows<RANK>(grads, NARROW, dz + (((i64)b * size.H + h) * size.N + m) * RANK, RANK, 16, last - m, RANK,
                            threadIdx.x % 32, 32);
            commit_copies();
        };
        group.copy_tokens(k, b);
        copy_queries(first + group.warp * 16);
        group.wait(turn == group.first);  // the first time for the coefficients, too
        for (int m = first + group.warp * 16; m < last; m += 16 * warps) {
            unsigned operands[D / 16][4], grad[4];
            float sums[D / 8][4];
#pragma unroll
            for (int i = 0; i < D / 2; i++) sums[i / 4][i % 4] = 0;
            wait_copies<0>();
            __syncwarp();
#pragma unroll
            for (int j = 0; j < D / 16; j++) load_operand<true, true>(operands[j], queries + j * 16, WIDTH);
            load_operand<true, true>(grad, grads, NARROW);
            if (EXACT) scale_operands<T, D>(operands, size.scale);
            __syncwarp();
            copy_queries(m + 16 * warps);
            for (int n = 0; n < size.N; n += 16) {
                float x[2][4], dx[2][4];
                unsigned a[4], r[4];
                scores<D>(x, operands, group.tokens + n * WIDTH);
                for_features<BASIS, BASE, F, false, true>(
                    x, size, EXACT ? 1.0f : size.scale, [&](int f, const float (*)[4], const float (*derivative)[4]) {
                        float c[2][4];
                        load_operand<false, true>(r, group.table + n * PACKED + f * RANK, PACKED);
                        multiply<T>(c, grad, r);
                        add_products(dx, derivative, c, f == 0);
                    });
                pack_tiles<T>(a, dx);
#pragma unroll
                for (int j = 0; j < D / 16; j++) {
                    load_operand<false, false>(r, group.tokens + n * WIDTH + j * 16, WIDTH);
                    multiply_add<T>(sums + 2 * j, a, r);
                }
            }
#pragma unroll
            for (int j = 0; j < D / 16; j++)
                store_tiles(dq.at(b, h, m) + j * 16, dq.row, sums + 2 * j, size.scale, last - m, size.d - j * 16);
        }
        group.wait();
    }
}

// dk, dv, and dA and dW summed over the images of a part of the batch, (parts, h, F + 1, padded, 16) in float. Grid:
// parts x h x blocks of 16 tokens for each warp.
template <typename T, typename BASIS, typename BASE, int F, int D, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, 8 / WARPS) attention_backward_key_kernel(
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
            copy_rows<D>(target, WIDTH, q.at(b, h, m), q.row, size.chunk, size.N - m, size.d, threadIdx.x, blockDim.x);
            copy_rows<RANK>(target + size.chunk * WIDTH, NARROW, dz + ((i64)bh * size.N + m) * RANK, RANK, size.chunk,
                            size.N - m, RANK, threadIdx.x, blockDim.x);
            if (m == 0) {
                const int from = block * tokens;
                target = of_image + step / chunks % 2 * image;
                copy_rows<D>(target, WIDTH, k.at(b, h, from), k.row, tokens, size.N - from, size.d, threadIdx.x,
                             blockDim.x);
                target += tokens * WIDTH;
                copy_rows<D>(target, WIDTH, v.at(b, h, from), v.row, tokens, size.N - from, size.d, threadIdx.x,
                             blockDim.x);
                copy_rows<D>(target + tokens * WIDTH, WIDTH, dvalues + (i64)bh * RANK * size.d, size.d, RANK, RANK,
                             size.d, threadIdx.x, blockDim.x);
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
                x, size, size.scale, [&](int f, const float (*value)[4], const float (*derivative)[4]) {
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
                store_tiles(dk.at(b, h, n) + j * 16, dk.row, dk_sum + 2 * j, size.scale, left, size.d - j * 16);
                store_tiles(dv.at(b, h, n) + j * 16, dv.row, c, 1.0f, left, size.d - j * 16);
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

// dA (h, F, N, r) and dW (h, N, r) from the sums of the parts of the batch. Grid: a thread for each element.
__global__ void attention_finish_kernel(const float* sums, float* da, float* dw, int parts, int H, int F, int N,
                                        int padded, int r) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int p = i % r, n = i / r % N, f = i / r / N % (F + 1), h = i / r / N / (F + 1);
    if (h >= H) return;
    const i64 part = (i64)H * (F + 1) * padded * RANK;
    const float* source = sums + ((i64)(h * (F + 1) + f) * padded + n) * RANK + p;
    float sum = 0;
#pragma unroll 4
    for (int j = 0; j < parts; j++) sum += source[j * part];
    if (f < F)
        da[((i64)(h * F + f) * N + n) * r + p] = sum;
    else
        dw[((i64)h * N + n) * r + p] = sum;
}
