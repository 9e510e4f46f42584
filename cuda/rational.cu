// Grouped rational function F(x) = P(x) / Q(x) with Q = 1 + sum_j |b_j| |x|^j, forward and backward.
// The formulas are in rational_math.h.
//
// Layout   x, y, grad, grad_x: contiguous (outer, groups, length), where `length` neighbours share one function.
//          Channels last is (rows, G, C / G), and (B, C, H, W) is (B, G, C / G * H * W). Function g has row
//          g / a_share of the numerator (., M + 1) and row g / b_share of the denominator (., N), so that each may be
//          shared more widely than the other.
// Types    x, y, grad, grad_x: float, half or bfloat16; coefficients, their gradients, arithmetic and sums: float.
// Launch   Flat: vector i of the tensor goes to thread i modulo the grid, whose size is a multiple of `period`, the
//          vectors of one row of groups. A thread meets one function only and keeps it in registers.
//          Segments, for long ones: block b meets function b modulo groups only.
//          The blocks of both are persistent.
//          Tiles: as flat, but a block takes one stretch of `tile` rows and ends. Forward only, which has no sums.
//          All prefetch STAGES - 1 vectors into shared memory slots of each thread (cp.async), without barriers in the
//          loop.
// Sums     registers -> shared memory (float: every FLUSH turns of STAGES steps) -> block -> partials
//          (blocks, groups, M + 1 + N) -> teams of blocks -> all, each in a fixed order, in double from the block on.
//          The block that finishes last does the last step. No float atomics: equal inputs give equal bits.
// Source   Yang & Wang 2025 (arXiv:2409.10594), Molina et al. 2020 (arXiv:1907.06732), version A.
#include "common.cuh"
#include "rational_math.h"

template <bool VECTORS> struct IndexOf { typedef int type; };  // vectors: fewer than 2^31 of 16 bytes
template <> struct IndexOf<false> { typedef i64 type; };
template <bool VECTORS> using Index = typename IndexOf<VECTORS>::type;

// The way of one thread through the tensor, in vectors of V elements or in elements. j counts what the blocks of the
// same functions go over, i is the place in the tensor. Flat: both are the same.
template <typename I, bool SEGMENTS>
struct Walk {
    I i, j, n, step;
    I col, length, row_step, col_step;  // segments only

    // tile: rows that a block takes; a row is one of groups, or as long as the block, whichever is longer.
    // 0: blocks take turns to the end.
    __device__ __forceinline__ void start(i64 outer, int groups, int length_, int tile) {
        const int blocks = SEGMENTS ? gridDim.x / groups : gridDim.x;
        const int rank = SEGMENTS ? blockIdx.x / groups : blockIdx.x;
        n = I(outer * length_ * (SEGMENTS ? 1 : groups));
        j = I(rank) * blockDim.x + threadIdx.x, step = I(blocks) * blockDim.x;
        if (tile) {
            step = max(blockDim.x, groups * length_);
            const int slices = step / blockDim.x;
            const I begin = I(rank / slices) * tile * step, end = begin + tile * step;
            j = begin + rank % slices * blockDim.x + threadIdx.x;
            if (n > end) n = end;
        }
        i = j;
        if (SEGMENTS) {
            length = length_, col = j % length, col_step = step % length;
            row_step = I(groups) * length;
            i = j / length * row_step + I(blockIdx.x % groups) * length + col;
        }
    }
    __device__ __forceinline__ void next() {
        j += step;
        if (SEGMENTS) {
            i += step / length * row_step + col_step, col += col_step;
            if (col >= length) col -= length, i += row_step - length;
        } else {
            i = j;
        }
    }
    // The place of this thread after `steps` more steps.
    __device__ __forceinline__ I later(int steps) const {
        if (!SEGMENTS) return i + steps * step;
        const I k = j + steps * step;
        return i - (j / length) * row_step - col + k / length * row_step + k % length;
    }
};

// The coefficients of the one function that this thread meets.
template <int M, int N, bool SEGMENTS>
__device__ __forceinline__ Coefficients<M, N> coefficients_of_thread(const float* numerator, const float* denominator,
                                                                     int groups, int length, int a_share, int b_share) {
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const int group = SEGMENTS ? blockIdx.x % groups : int(thread % (i64(groups) * length)) / length;
    Coefficients<M, N> c;
    c.load(numerator + i64(group / a_share) * (M + 1), denominator + i64(group / b_share) * N);
    return c;
}

// Segments need more than 40 registers, which is what BLOCKS leave to a thread.
template <typename T, int M, int N, bool VECTORS, bool SEGMENTS, int THREADS, int BLOCKS, int STAGES>
__global__ void __launch_bounds__(THREADS, SEGMENTS ? (BLOCKS + 1) / 2 : BLOCKS)
rational_forward_kernel(const T* __restrict__ x, const float* __restrict__ numerator,
                        const float* __restrict__ denominator, T* __restrict__ y, i64 outer, int groups, int length,
                        int a_share, int b_share, int tile) {
    extern __shared__ uint4 slots[];
    constexpr int V = 16 / sizeof(T);
    uint4* slot = slots + threadIdx.x;
    Walk<Index<VECTORS>, SEGMENTS> walk;
    walk.start(outer, groups, length, tile);
    const auto* x16 = reinterpret_cast<const uint4*>(x);
    const auto fetch = [&](int s, int steps) {
        if (walk.j + steps * walk.step < walk.n) copy_async(slot + s * THREADS, x16 + walk.later(steps));
        commit_copies();
    };
    if (VECTORS) {
#pragma unroll
        for (int s = 0; s < STAGES - 1; s++) fetch(s, s);
    }
    const auto c = coefficients_of_thread<M, N, SEGMENTS>(numerator, denominator, groups, length, a_share, b_share);
    while (walk.j < walk.n) {
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            if (walk.j >= walk.n) break;
            if (VECTORS) {
                wait_copies<STAGES - 2>();
                float v[V];
                fetch((s + STAGES - 1) % STAGES, STAGES - 1);
                Vec16<T>::unpack(slot[s * THREADS], v);
#pragma unroll
                for (int k = 0; k < V; k++) v[k] = rational_forward(v[k], c);
                __stcs(reinterpret_cast<uint4*>(y) + walk.i, Vec16<T>::pack(v));
            } else {
                y[walk.i] = from_float<T>(rational_forward(to_float(x[walk.i]), c));
            }
            walk.next();
        }
    }
}

// Sums `count` rows of `items` floats into one row, in a fixed order, with the threads of a block.
// V is 4 if it divides `items`, else 1.
template <int V>
__device__ void sum_rows(const float* rows, int count, int items, float* row, double* table) {
    constexpr int BATCH = 8;  // loads in flight
    const int columns = items / V, parts = max(1, blockDim.x / columns);
    for (int first = 0; first < columns; first += blockDim.x) {  // once, unless there are more columns than threads
        const int column = first + (parts > 1 ? threadIdx.x % columns : threadIdx.x);
        const int part = parts > 1 ? threadIdx.x / columns : 0;
        const bool busy = column < columns && part < parts;
        double sum[V];
#pragma unroll
        for (int v = 0; v < V; v++) sum[v] = 0.0;
        for (int r = part; busy && r < count; r += BATCH * parts) {
            float x[BATCH][V];
#pragma unroll
            for (int m = 0; m < BATCH; m++) {
                const float* from = rows + i64(r + m * parts) * items + column * V;
                const bool there = r + m * parts < count;
                const auto* from4 = reinterpret_cast<const float4*>(from);
                if (V == 4) *reinterpret_cast<float4*>(x[m]) = there ? __ldcg(from4) : make_float4(0, 0, 0, 0);
                else x[m][0] = there ? __ldcg(from) : 0.0f;
            }
#pragma unroll
            for (int m = 0; m < BATCH; m++)
#pragma unroll
                for (int v = 0; v < V; v++) sum[v] += x[m][v];
        }
#pragma unroll
        for (int v = 0; v < V; v++) table[v * blockDim.x + threadIdx.x] = sum[v];
        __syncthreads();
        for (int o = threadIdx.x; o < V * min(columns, int(blockDim.x)); o += blockDim.x) {
            const int v = o % V, c = o / V;
            double total = 0.0;
            for (int p = 0; p < parts; p++) total += table[v * blockDim.x + p * columns + c];
            if (first + c < columns) __stcg(row + (first + c) * V + v, float(total));
        }
        __syncthreads();
    }
}

// Whether this block is the last of `blocks` to come here. It then sees what the others wrote. The counter is 0 again.
__device__ bool last_of(unsigned* counter, int blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // for the whole block: the barrier came first
        last = atomicAdd(counter, 1u) == blocks - 1;
        if (last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

template <typename T, int M, int N, bool VECTORS, bool SEGMENTS, int THREADS, int BLOCKS, int STAGES>
__global__ void __launch_bounds__(THREADS, BLOCKS)
rational_backward_kernel(const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ numerator,
                         const float* __restrict__ denominator, T* __restrict__ grad_x,
                         float* __restrict__ grad_numerator, float* __restrict__ grad_denominator,
                         float* __restrict__ partials, unsigned* __restrict__ finished, i64 outer, int groups,
                         int length, int a_share, int b_share, int team) {
    constexpr int K = M + 1 + N;
    constexpr int V = 16 / sizeof(T);
    constexpr int FLUSH = V > 4 ? 0 : 4;  // sums of few terms lose few digits; 16-bit gradients have too few to lose
    extern __shared__ uint4 slots[];
    uint4 *x_slot = slots + threadIdx.x, *grad_slot = x_slot + STAGES * THREADS;
    Walk<Index<VECTORS>, SEGMENTS> walk;
    walk.start(outer, groups, length, 0);
    const auto *x16 = reinterpret_cast<const uint4*>(x), *grad16 = reinterpret_cast<const uint4*>(grad);
    const auto fetch = [&](int s, int steps) {
        if (walk.j + steps * walk.step < walk.n) {
            const auto place = walk.later(steps);
            copy_async(x_slot + s * THREADS, x16 + place);
            copy_async(grad_slot + s * THREADS, grad16 + place);
        }
        commit_copies();
    };
    if (VECTORS) {
#pragma unroll
        for (int s = 0; s < STAGES - 1; s++) fetch(s, s);
    }
    const auto c = coefficients_of_thread<M, N, SEGMENTS>(numerator, denominator, groups, length, a_share, b_share);
    float sums[K];
#pragma unroll
    for (int k = 0; k < K; k++) sums[k] = 0.0f;
    // sums of the threads, (K, THREADS + 1)
    float* table = reinterpret_cast<float*>(slots + (VECTORS && FLUSH ? 2 * STAGES * THREADS : 0));
    const auto flush = [&](bool first) {
#pragma unroll
        for (int k = 0; k < K; k++) {
            float& place = table[k * (THREADS + 1) + threadIdx.x];
            place = first ? sums[k] : place + sums[k];
            sums[k] = 0.0f;
        }
    };
    int turn = 0;
    if (FLUSH) flush(true);
    while (walk.j < walk.n) {
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            if (walk.j >= walk.n) break;
            if (VECTORS) {
                wait_copies<STAGES - 2>();
                float v[V], g[V];
                fetch((s + STAGES - 1) % STAGES, STAGES - 1);
                Vec16<T>::unpack(x_slot[s * THREADS], v);
                Vec16<T>::unpack(grad_slot[s * THREADS], g);
                rational_backward<V>(g, v, c, sums);
                __stcs(reinterpret_cast<uint4*>(grad_x) + walk.i, Vec16<T>::pack(v));
            } else {
                float v = to_float(x[walk.i]), g = to_float(grad[walk.i]);
                rational_backward<1>(&g, &v, c, sums);
                grad_x[walk.i] = from_float<T>(v);
            }
            walk.next();
        }
        if (FLUSH && ++turn % max(FLUSH, 1) == 0) flush(false);
    }

    if (!FLUSH) __syncthreads();  // the slots become the table
    flush(!FLUSH);
    __syncthreads();
    if (SEGMENTS) {
        for (int k = threadIdx.x / 32; k < K; k += THREADS / 32) {  // a warp for each sum
            double sum = 0.0;
            for (int t = threadIdx.x % 32; t < THREADS; t += 32) sum += table[k * (THREADS + 1) + t];
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
            if (threadIdx.x % 32 == 0) __stcg(partials + i64(blockIdx.x) * K + k, float(sum));
        }
    } else {
        const int period = groups * length, first = int(i64(blockIdx.x) * THREADS % period);
        const int outputs = groups * K, parts = max(1, THREADS / outputs);
        float* part_sums = table + K * (THREADS + 1);
        // once, unless there are more outputs than threads
        for (int first_output = 0; first_output < outputs; first_output += THREADS) {
            const int o = first_output + (parts > 1 ? threadIdx.x % outputs : threadIdx.x);
            const int part = parts > 1 ? threadIdx.x / outputs : 0;
            const int g = o / K, k = o % K;
            double sum = 0.0;
            if (o < outputs && part < parts)
                for (int col = g * length + part; col < (g + 1) * length; col += parts)
                    for (int t = col - first + (col < first ? period : 0); t < THREADS; t += period)
                        sum += table[k * (THREADS + 1) + t];
            part_sums[threadIdx.x] = sum;
            __syncthreads();
            if (part == 0 && o < outputs) {
                for (int p = 1; p < parts; p++) sum += part_sums[p * outputs + threadIdx.x];
                __stcg(partials + i64(blockIdx.x) * outputs + o, float(sum));
            }
            __syncthreads();
        }
    }

    // The last block of each team sums the rows of its team, and the last of all teams the rows of the teams.
    const int items = groups * K, share = SEGMENTS ? groups : 1;
    const int blocks = gridDim.x / share, teams = (blocks + team - 1) / team;
    const int index = blockIdx.x / share / team, members = min(team, blocks - index * team);
    double* sums_table = reinterpret_cast<double*>(slots);  // neither slots nor table are needed any more
    float *team_rows = partials + i64(blocks) * items, *total = team_rows + i64(teams) * items;
    const auto sum = [&](const float* rows, int count, float* row) {
        if (items % 4) sum_rows<1>(rows, count, items, row, sums_table);
        else sum_rows<4>(rows, count, items, row, sums_table);
    };
    if (!last_of(finished + 1 + index, members * share)) return;
    sum(partials + i64(index) * team * items, members, teams == 1 ? total : team_rows + i64(index) * items);
    if (teams > 1) {
        if (!last_of(finished, teams)) return;
        sum(team_rows, teams, total);
    }
    const int a_size = groups / a_share * (M + 1), b_size = groups / b_share * N;
    for (int o = threadIdx.x; o < a_size + b_size; o += THREADS) {
        const bool is_a = o < a_size;
        const int output = is_a ? o : o - a_size, width = is_a ? M + 1 : N, share = is_a ? a_share : b_share;
        const float* column = total + i64(output / width) * share * K + output % width + (is_a ? 0 : M + 1);
        double sum = 0.0;
        for (int g = 0; g < share; g += 8) {
            float x[8];
#pragma unroll
            for (int m = 0; m < 8; m++) x[m] = g + m < share ? __ldcg(column + (g + m) * K) : 0.0f;
#pragma unroll
            for (int m = 0; m < 8; m++) sum += x[m];
        }
        if (is_a) grad_numerator[output] = float(sum);
        else grad_denominator[output] = float(denominator[output] < 0.0f ? -sum : sum);
    }
}
