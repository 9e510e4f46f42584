// Forward kernels of attention by functions that are linear in their coefficients; see attention.cuh.
#include "attention.cuh"

// z. Grid: a multiple of h. `warps` form a group, which takes 16 rows of each.
template <typename T, typename BASIS, typename BASE, int F, int D>
__global__ void __launch_bounds__(640, 1) attention_forward_kernel(
    Matrix<const T> q, Matrix<const T> k, const T* packed, T* z, Sizes size, int warps) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8, PACKED = F * RANK + 8;
    const Group group(size, warps);
    const int h = group.head, rows = 16 * warps, blocks = (size.N + rows - 1) / rows;
    const bool whole = size.chunk >= size.N;  // the tokens are one chunk
    T *table = reinterpret_cast<T*>(shared), *keys = table + size.chunk * (PACKED + group.index * WIDTH);

    if (whole) {
        copy_packed<F, PACKED>(table, packed, h, 2 * F + 1, 0, 0, size.chunk, size);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
    }
    // With several chunks all groups go over them together, also those that have no rows left.
    for (int turn = group.first; turn - (whole ? 0 : group.index) < size.B * blocks; turn += group.stride) {
        const bool active = turn < size.B * blocks;
        const int b = turn / blocks, m = active ? turn % blocks * rows + group.warp * 16 : size.N;
        unsigned queries[D / 16][4];
        float sums[2][4] = {};
        if (active) load_rows<D>(queries, q.at(b, h, m), q.row, size.N - m, size.d);
        for (int start = 0; start < size.N; start += size.chunk) {
            if (active)
                copy_rows<D>(keys, WIDTH, k.at(b, h, start), k.row, size.chunk, size.N - start, size.d,
                             threadIdx.x % group.threads, group.threads);
            if (!whole) copy_packed<F, PACKED>(table, packed, h, 2 * F + 1, 0, start, size.chunk, size);
            commit_copies();
            wait_copies<0>();
            if (whole)
                group.synchronise();
            else
                __syncthreads();
            const int count = m < size.N ? min(size.chunk, (size.N - start + 15) / 16 * 16) : 0;
            for (int n = 0; n < count; n += 16) {
                float x[2][4];
                scores<D>(x, queries, keys + n * WIDTH);
                for_features<BASIS, BASE, F, true, false>(
                    x, size, [&](int f, const float (*value)[4], const float (*)[4]) {
                        unsigned a[4], r[4];
                        load_operand<false, false>(r, table + n * PACKED + f * RANK, PACKED);
                        pack_tiles<T>(a, value);
                        multiply_add<T>(sums, a, r);
                    });
            }
            if (whole)
                group.synchronise();
            else
                __syncthreads();
        }
        if (active) {
            T* row = z + (((i64)b * size.H + h) * size.N + m) * RANK;
            store_tile(row, RANK, sums[0], 1.0f, size.N - m);
            store_tile(row + 8, RANK, sums[1], 1.0f, size.N - m);
        }
    }
}

// W^T V, (B, h, 16, d), and out = z (W^T V). Grid: B h blocks of D / 16 warps.
template <typename T, int D>
__global__ void __launch_bounds__(2 * D) attention_values_kernel(
    Matrix<const T> v, const T* w, int head_of_w, const T* z, T* values, Matrix<T> out, Sizes size) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8, NARROW = RANK + 8;
    const int bh = blockIdx.x, b = bh / size.H, h = bh % size.H, warp = threadIdx.x / 32;
    T *tokens = reinterpret_cast<T*>(shared), *projector = tokens + size.chunk * WIDTH;
    T* projected = projector + size.chunk * NARROW;
    w += (i64)h * head_of_w;

    float c[2][4] = {};
    for (int start = 0; start < size.N; start += size.chunk) {
        copy_rows<D>(tokens, WIDTH, v.at(b, h, start), v.row, size.chunk, size.N - start, size.d, threadIdx.x, 2 * D);
        copy_rows<RANK>(projector, NARROW, w + (i64)start * RANK, RANK, size.chunk, size.N - start, RANK, threadIdx.x,
                        2 * D);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        for (int n = 0; n < min(size.chunk, size.N - start); n += 16) {
            unsigned a[4], r[4];
            load_operand<true, false>(a, projector + n * NARROW, NARROW);
            load_operand<false, false>(r, tokens + n * WIDTH + warp * 16, WIDTH);
            multiply_add<T>(c, a, r);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int column = warp * 16 + i * 8;
        store_tile(projected + column, WIDTH, c[i], 1.0f, RANK);
        if (column < size.d) store_tile(values + (i64)bh * RANK * size.d + column, size.d, c[i], 1.0f, RANK);
    }
    __syncthreads();
    unsigned r[D / 16][4], a[1][4];
#pragma unroll
    for (int j = 0; j < D / 16; j++) load_operand<false, false>(r[j], projected + j * 16, WIDTH);
    for (int m = warp * 16; m < size.N; m += D) {
        load_rows<16>(a, z + ((i64)bh * size.N + m) * RANK, RANK, size.N - m, RANK);
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            float o[2][4];
            multiply<T>(o, a[0], r[j]);
            if (j * 16 < size.d) store_tile(out.at(b, h, m) + j * 16, out.row, o[0], 1.0f, size.N - m);
            if (j * 16 + 8 < size.d) store_tile(out.at(b, h, m) + j * 16 + 8, out.row, o[1], 1.0f, size.N - m);
        }
    }
}
