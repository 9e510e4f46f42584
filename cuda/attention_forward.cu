// Forward kernels of attention by functions that are linear in their coefficients; see attention.cuh.
#include "attention.cuh"

// packed, from the coefficients (h, F, N, r) and W (h, N, r) with any strides. Grid: a thread for each element.
template <typename T, typename BASIS, typename BASE, int F>
__global__ void attention_pack_kernel(Matrix<const float> a, i64 a_rank, const float* w, i64 w_head, i64 w_row,
                                      i64 w_rank, T* packed, int H, int N, int padded, int r) {
    constexpr int P = BASE::NONE ? F : F - 1;
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int p = i % RANK, n = i / RANK % padded;
    const int slot = i / RANK / padded % (2 * F + 1), h = i / RANK / padded / (2 * F + 1);
    if (h >= H) return;
    float x = 0;
    if (n < N && p < r) {
        if (slot == 2 * F) {
            x = w[h * w_head + n * w_row + p * w_rank];
        } else {
            const int f = slot % F;
            x = a.at(h, f < P ? BASIS::template source<P>(f) : f, n)[p * a_rank];
            if (slot >= F && f < P) x *= BASIS::factor(f);
        }
    }
    packed[i] = from_float<T>(x);
}

// z, W^T V and out. Grid: a multiple of h. `warps` form a group. A turn of a group is one of `blocks` blocks of the
// rows of an image. EXACT: q can be multiplied by the scale without rounding.
template <typename T, typename BASIS, typename BASE, int F, int D, bool EXACT>
__global__ void __launch_bounds__(640, 1) attention_forward_kernel(
    Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, const T* packed, T* values, T* z, Matrix<T> out,
    Sizes size, int warps, int blocks) {
    extern __shared__ __align__(16) unsigned char shared[];
    constexpr int WIDTH = D + 8;
    const Group<F + 1, D, T> group(reinterpret_cast<T*>(shared), size, warps, RANK * WIDTH);
    constexpr int PACKED = group.PACKED;
    const int h = group.head, rows = ((size.N + blocks - 1) / blocks + 15) / 16 * 16;
    T* projected = group.more;  // W^T V

    copy_packed<F, PACKED>(group.table, packed, h, 2 * F + 1, 0, size);
    copy_packed<1, PACKED>(group.table + F * RANK, packed, h, 2 * F + 1, 2 * F, size);
    if (group.first >= size.B * blocks) group.wait(true);
    for (int turn = group.first; turn < size.B * blocks; turn += group.stride) {
        const int b = turn / blocks, first = turn % blocks * rows, last = min(size.N, first + rows);
        const int bh = b * size.H + h;
        group.copy_tokens(v, b);
        group.wait(turn == group.first);  // the first time for the coefficients, too
        for (int tile = group.warp; tile < D / 16; tile += warps) {  // 16 columns of W^T V
            float c[2][4] = {};
            for (int n = 0; n < size.N; n += 16) {
                unsigned w[4], r[4];
                load_operand<true, false>(w, group.table + n * PACKED + F * RANK, PACKED);
                load_operand<false, false>(r, group.tokens + n * WIDTH + tile * 16, WIDTH);
                multiply_add<T>(c, w, r);
            }
            store_tiles(projected + tile * 16, WIDTH, c, 1.0f, RANK, 16);
            if (first == 0)
                store_tiles(values + (i64)bh * RANK * size.d + tile * 16, size.d, c, 1.0f, RANK, size.d - tile * 16);
        }
        group.wait();
        group.copy_tokens(k, b);
        group.wait();
        for (int m = first + group.warp * 16; m < last; m += 16 * warps) {
            unsigned operands[D / 16][4], a[4], r[4];
            float sums[2][4] = {};
            load_rows<D>(operands, q.at(b, h, m), q.row, last - m, size.d);
            if (EXACT) scale_operands<T, D>(operands, size.scale);
            for (int n = 0; n < size.N; n += 16) {
                float x[2][4];
                scores<D>(x, operands, group.tokens + n * WIDTH);
                for_features<BASIS, BASE, F, true, false>(
                    x, size, EXACT ? 1.0f : size.scale, [&](int f, const float (*value)[4], const float (*)[4]) {
                        load_operand<false, false>(r, group.table + n * PACKED + f * RANK, PACKED);
                        pack_tiles<T>(a, value);
                        multiply_add<T>(sums, a, r);
                    });
            }
            pack_tiles<T>(a, sums);
            store_tiles(z + ((i64)bh * size.N + m) * RANK, RANK, sums, 1.0f, last - m, RANK);
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                float o[2][4];
                load_operand<false, false>(r, projected + j * 16, WIDTH);
                multiply<T>(o, a, r);
                store_tiles(out.at(b, h, m) + j * 16, out.row, o, 1.0f, last - m, size.d - j * 16);
            }
        }
        group.wait();
    }
}
