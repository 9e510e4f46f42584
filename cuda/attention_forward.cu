// Forward kernel of attention by functions that are linear in their coefficients; see attention.cuh.
#include "attention.cuh"

// z, W^T V and out. Grid: a multiple of h. `warps` form a group, and a turn of a group is a block of the rows of one
// image, 16 for each warp at a time. There are D / 16 warps at least, unless the tokens are one chunk.
template <typename T, typename BASIS, typename BASE, int F, int D>
__global__ void __launch_bounds__(640, 1) attention_forward_kernel(
    Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, const T* packed, T* values, T* z, Matrix<T> out, Sizes size,
    int warps, int blocks) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8, PACKED = (F + 1) * RANK + 8;
    const Group group(size, warps);
    const int h = group.head, thread = threadIdx.x % group.threads;
    const int rows = (size.N + blocks - 1) / blocks, rows_of_block = (rows + 15) / 16 * 16;
    const bool whole = size.chunk >= size.N;  // the tokens are one chunk
    T *table = reinterpret_cast<T*>(shared), *tokens = table + size.chunk * PACKED;
    tokens += group.index * (size.chunk + RANK) * WIDTH;
    T* projected = tokens + size.chunk * WIDTH;  // W^T V, (16, D)

    auto copy_table = [&](int n) {
        copy_packed<F, PACKED>(table, packed, h, 2 * F + 1, 0, n, size.chunk, size);
        copy_packed<1, PACKED>(table + F * RANK, packed, h, 2 * F + 1, 2 * F, n, size.chunk, size);
    };
    auto wait = [&]() {
        commit_copies();
        wait_copies<0>();
        group.synchronise(whole);
    };
    if (whole) copy_table(0);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    // With several chunks all groups go over them together, also those that have nothing left to do.
    for (int turn = group.first; turn - (whole ? 0 : group.index) < size.B * blocks; turn += group.stride) {
        const bool active = turn < size.B * blocks;
        const int b = turn / blocks, first = turn % blocks * rows_of_block, bh = b * size.H + h;
        const int last = active ? min(size.N, first + rows_of_block) : 0;
        auto copy_tokens = [&](const Matrix<const T>& from, int n) {
            if (active) copy_rows<D>(tokens, WIDTH, from.at(b, h, n), from.row, size.chunk, size.N - n, size.d, thread,
                                     group.threads);
        };

        float c[2][4] = {};
        for (int start = 0; start < size.N; start += size.chunk) {
            copy_tokens(v, start);
            if (!whole) copy_table(start);
            wait();
            for (int tile = group.warp; tile < D / 16; tile += warps) {  // 16 columns of W^T V
                if (whole)
#pragma unroll
                    for (int i = 0; i < 8; i++) c[i / 4][i % 4] = 0;
                for (int n = 0; n < min(size.chunk, size.N - start); n += 16) {
                    unsigned w[4], r[4];
                    load_operand<true, false>(w, table + n * PACKED + F * RANK, PACKED);
                    load_operand<false, false>(r, tokens + n * WIDTH + tile * 16, WIDTH);
                    multiply_add<T>(c, w, r);
                }
                if (start + size.chunk >= size.N)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int column = tile * 16 + i * 8;
                        store_tile(projected + column, WIDTH, c[i], 1.0f, RANK);
                        if (active && first == 0 && column < size.d)
                            store_tile(values + (i64)bh * RANK * size.d + column, size.d, c[i], 1.0f, RANK);
                    }
            }
            group.synchronise(whole);
        }
        if (whole) {
            copy_tokens(k, 0);
            wait();
        }
        for (int m = first + group.warp * 16; m - group.warp * 16 < (whole ? last : first + rows_of_block); m += 16 * warps) {
            unsigned queries[D / 16][4], a[4], r[4];
            float sums[2][4] = {};
            const int left = last - m;
            if (active) load_rows<D>(queries, q.at(b, h, m), q.row, left, size.d);
            for (int start = 0; start < size.N; start += size.chunk) {
                if (!whole) {
                    copy_tokens(k, start);
                    copy_table(start);
                    wait();
                }
                const int count = left > 0 ? min(size.chunk, (size.N - start + 15) / 16 * 16) : 0;
                for (int n = 0; n < count; n += 16) {
                    float x[2][4];
                    scores<D>(x, queries, tokens + n * WIDTH);
                    for_features<BASIS, BASE, F, true, false>(
                        x, size, [&](int f, const float (*value)[4], const float (*)[4]) {
                            load_operand<false, false>(r, table + n * PACKED + f * RANK, PACKED);
                            pack_tiles<T>(a, value);
                            multiply_add<T>(sums, a, r);
                        });
                }
                if (!whole) group.synchronise(whole);
            }
            pack_tiles<T>(a, sums);
            T* row = z + ((i64)bh * size.N + m) * RANK;
            store_tile(row, RANK, sums[0], 1.0f, left);
            store_tile(row + 8, RANK, sums[1], 1.0f, left);
            if (left <= 0) continue;
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                float o[2][4];
                load_operand<false, false>(r, projected + j * 16, WIDTH);
                multiply<T>(o, a, r);
                store_tiles(out.at(b, h, m) + j * 16, out.row, o, 1.0f, left, size.d - j * 16);
            }
        }
        if (whole) group.synchronise(whole);
    }
}
