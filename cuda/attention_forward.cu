// Forward kernel of attention by functions that are linear in their coefficients; see attention.cuh.
#include "attention.cuh"

template <typename T, typename BASIS, typename BASE, int F, int D>
__global__ void __launch_bounds__(224, 2) attention_forward_kernel(
    Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, const T* packed, T* values, T* z, Matrix<T> out, Sizes size) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8, PACKED = (F + 1) * RANK + 8;
    T *keys = reinterpret_cast<T*>(shared), *tokens = keys + size.chunk * WIDTH, *table = tokens + size.chunk * WIDTH;
    T* projected = table + size.chunk * PACKED;  // W^T V, (16, D)
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, rows = 32 * warps, blocks = (size.N + rows - 1) / rows;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, chunks = (size.N + size.chunk - 1) / size.chunk;
    const i64 turns = (i64)size.B * size.H * blocks;
    const i64 begin = turns * blockIdx.x / gridDim.x, end = turns * (blockIdx.x + 1) / gridDim.x;

    auto copy_keys = [&](i64 step) {  // a step is a chunk of a turn
        if (step < end * chunks) {
            const Turn to(step / chunks, size, blocks, rows);
            const int n = step % chunks * size.chunk;
            copy_rows<D>(keys, WIDTH, k.at(to.b, to.h, n), k.row, size.chunk, size.N - n, size.d);
        }
        commit_copies();
    };
    auto copy_values = [&](i64 step, int head) {
        const Turn to(step / chunks, size, blocks, rows);
        const int n = step % chunks * size.chunk;
        if (step < end * chunks && (chunks > 1 || to.h != head)) {
            copy_packed<F, PACKED>(table, packed, to.h, 2 * F + 1, 0, n, size.chunk, size);
            copy_packed<1, PACKED>(table + F * RANK, packed, to.h, 2 * F + 1, 2 * F, n, size.chunk, size);
        }
        commit_copies();
        if (step < end * chunks)
            copy_rows<D>(tokens, WIDTH, v.at(to.b, to.h, n), v.row, size.chunk, size.N - n, size.d);
        commit_copies();
    };
    copy_keys(begin * chunks);
    copy_values(begin * chunks, -1);
    unsigned queries[2][D / 16][4];
    float sums[2][2][4], c[2][4];
    for (i64 step = begin * chunks; step < end * chunks; step++) {
        const Turn turn(step / chunks, size, blocks, rows);
        const int m = turn.first + warp * 32, start = step % chunks * size.chunk;
        const int count = min(size.chunk, (size.N - start + 15) / 16 * 16);
        if (start == 0) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                load_rows<D>(queries[i], q.at(turn.b, turn.h, m + i * 16), q.row, size.N - m - i * 16, size.d);
#pragma unroll
                for (int j = 0; j < 8; j++) sums[i][j / 4][j % 4] = 0;
            }
        }
        wait_copies<1>();
        __syncthreads();
        if (m < size.N) {
            for (int n = 0; n < count; n += 16) {
                float x[2][2][4];
                unsigned coefficients[F][4];
                scores<D>(x[0], queries[0], keys + n * WIDTH);
                scores<D>(x[1], queries[1], keys + n * WIDTH);
#pragma unroll
                for (int f = 0; f < F; f++) load_operand<false, false>(coefficients[f], table + n * PACKED + f * RANK, PACKED);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (i && m + 16 >= size.N) break;
                    for_features<BASIS, BASE, F, true, false>(
                        x[i], size, [&](int f, const float (*value)[4], const float (*)[4]) {
                            unsigned a[4];
                            pack_tiles<T>(a, value);
                            multiply_add<T>(sums[i], a, coefficients[f]);
                        });
                }
            }
        }
        wait_copies<0>();
        __syncthreads();
        copy_keys(step + 1);
        for (int tile = warp; tile < D / 16; tile += warps) {  // 16 columns of W^T V; one tile if there are more chunks
            if (start == 0)
#pragma unroll
                for (int i = 0; i < 8; i++) c[i / 4][i % 4] = 0;
            for (int n = 0; n < count; n += 16) {
                unsigned w[4], r[4];
                load_operand<true, false>(w, table + n * PACKED + F * RANK, PACKED);
                load_operand<false, false>(r, tokens + n * WIDTH + tile * 16, WIDTH);
                multiply_add<T>(c, w, r);
            }
            if (start + size.chunk >= size.N) {
                T* target = values + ((i64)turn.b * size.H + turn.h) * RANK * size.d + tile * 16;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    store_tile(projected + tile * 16 + i * 8, WIDTH, c[i], 1.0f, RANK);
                    if (turn.first == 0 && tile * 16 + i * 8 < size.d)
                        store_tile(target + i * 8, size.d, c[i], 1.0f, RANK);
                }
            }
        }
        __syncthreads();
        copy_values(step + 1, turn.h);
        if (start + size.chunk < size.N) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int first = m + i * 16, left = size.N - first;
            if (left <= 0) break;
            unsigned a[4];
            pack_tiles<T>(a, sums[i]);
            T* row = z + (((i64)turn.b * size.H + turn.h) * size.N + first) * RANK;
            store_tile(row, RANK, sums[i][0], 1.0f, left);
            store_tile(row + 8, RANK, sums[i][1], 1.0f, left);
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                unsigned r[4];
                float o[2][4];
                load_operand<false, false>(r, projected + j * 16, WIDTH);
                multiply<T>(o, a, r);
#pragma unroll
                for (int side = 0; side < 2; side++)
                    if (j * 16 + side * 8 < size.d)
                        store_tile(out.at(turn.b, turn.h, first) + j * 16 + side * 8, out.row, o[side], 1.0f, left);
            }
        }
    }
    wait_copies<0>();
}
