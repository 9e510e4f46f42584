// Forward kernel of attention by functions that are linear in their coefficients; see attention.cuh.
#include "attention.cuh"

// z, W^T V and out. Grid: a multiple of h. `warps` form a group, at least D / 16 unless WHOLE. A turn of a group is one of
// `blocks` blocks of the rows of an image.
template <typename T, typename BASIS, typename BASE, int F, int D, bool WHOLE>
__global__ void __launch_bounds__(640, 1) attention_forward_kernel(
    Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, const T* packed, T* values, T* z, Matrix<T> out, Sizes size,
    int warps, int blocks) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8;
    const Group<WHOLE, F + 1, WIDTH, T> group(reinterpret_cast<T*>(shared), size, packed, 2 * F + 1, warps, RANK);
    constexpr int PACKED = group.PACKED;
    const int h = group.head, rows = ((size.N + blocks - 1) / blocks + 15) / 16 * 16;
    T* projected = group.extra;  // W^T V, (16, D)

    if (WHOLE) {
        group.template copy_table<F, 0, 2 * F>(group.table, 0);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
    }
    for (int turn = group.first; turn < size.B * blocks; turn += group.stride) {
        const int b = turn / blocks, first = turn % blocks * rows, last = min(size.N, first + rows), bh = b * size.H + h;

        if (WHOLE) {
            group.template copy_tokens<D>(group.tokens, v, b, 0);
            group.wait();
        }
        float c[2][4] = {};
        for (int tile = group.warp; tile < (WHOLE ? D / 16 : max(D / 16, group.warp + 1)); tile += warps) {
            group.template for_chunks<D, F, 0, 2 * F>(v, b, [&](const T* tokens, const T* table, int count) {
                if (tile < D / 16)  // 16 columns of W^T V
                    for (int n = 0; n < count; n += 16) {
                        unsigned w[4], r[4];
                        load_operand<true, false>(w, table + n * PACKED + F * RANK, PACKED);
                        load_operand<false, false>(r, tokens + n * WIDTH + tile * 16, WIDTH);
                        multiply_add<T>(c, w, r);
                    }
            });
            if (tile < D / 16)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int column = tile * 16 + i * 8;
                    store_tile(projected + column, WIDTH, c[i], 1.0f, RANK);
                    if (first == 0 && column < size.d)
                        store_tile(values + (i64)bh * RANK * size.d + column, size.d, c[i], 1.0f, RANK);
#pragma unroll
                    for (int j = 0; j < 4; j++) c[i][j] = 0;
                }
        }
        group.synchronise();
        if (WHOLE) {
            group.template copy_tokens<D>(group.tokens, k, b, 0);
            group.wait();
        }
        for (int m = first + group.warp * 16; m - group.warp * 16 < last; m += 16 * warps) {
            unsigned queries[D / 16][4], a[4], r[4];
            float sums[2][4] = {};
            const int left = last - m;
            load_rows<D>(queries, q.at(b, h, m), q.row, left, size.d);
            group.template for_chunks<D, F, 0, 2 * F>(k, b, [&](const T* tokens, const T* table, int count) {
                for (int n = 0; n < (left > 0 ? count : 0); n += 16) {
                    float x[2][4];
                    scores<D>(x, queries, tokens + n * WIDTH);
                    for_features<BASIS, BASE, F, true, false>(
                        x, size, [&](int f, const float (*value)[4], const float (*)[4]) {
                            load_operand<false, false>(r, table + n * PACKED + f * RANK, PACKED);
                            pack_tiles<T>(a, value);
                            multiply_add<T>(sums, a, r);
                        });
                }
            });
            pack_tiles<T>(a, sums);
            T* row = z + ((i64)bh * size.N + m) * RANK;
            store_tiles(row, RANK, sums, 1.0f, left, RANK);
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                float o[2][4];
                load_operand<false, false>(r, projected + j * 16, WIDTH);
                multiply<T>(o, a, r);
                store_tiles(out.at(b, h, m) + j * 16, out.row, o, 1.0f, left, size.d - j * 16);
            }
        }
        group.synchronise();
    }
}
