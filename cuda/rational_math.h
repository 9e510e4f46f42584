// One element of the grouped rational function and of its gradients, in float32. It compiles for the GPU and for the
// host, where it is tested.
//
//   F(x) = P(x) / Q(x)     P = a_0 + a_1 x + ... + a_M x^M     Q = 1 + |b_1| |x| + ... + |b_N| |x|^N
//   dF/dx = R/Q - S P/Q^2  R = P'   S = sign(x) (|b_1| + 2 |b_2| |x| + ... + N |b_N| |x|^(N-1))   sign(0) = +1
//   dF/da_i = x^i / Q      dF/d|b_j| = -|x|^j P / Q^2
//
// Source: Molina et al. 2020 (arXiv:1907.06732), version A.
#pragma once

#ifdef __CUDACC__
#define HD __device__ __forceinline__
#define FMA(a, b, c) fmaf(a, b, c)
#define ABS(a) fabsf(a)
#define COPYSIGN(a, b) copysignf(a, b)
HD float reciprocal(float q) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(q));  // q >= 1; within 1 ulp
    return r;
}
#else
#include <cmath>
#define HD inline
#define FMA(a, b, c) std::fma(float(a), float(b), float(c))
#define ABS(a) std::fabs(float(a))
#define COPYSIGN(a, b) std::copysign(float(a), float(b))
HD float reciprocal(float q) { return 1.0f / q; }
#endif

// Coefficients of one function, b as absolute values, with those of the derivatives.
template <int M, int N>
struct Coefficients {
    float a[M + 1], b[N], r[M > 0 ? M : 1], s[N];

    HD void load(const float* numerator, const float* denominator) {
#pragma unroll
        for (int i = 0; i <= M; i++) a[i] = numerator[i];
#pragma unroll
        for (int j = 0; j < N; j++) b[j] = ABS(denominator[j]);
#pragma unroll
        for (int i = 0; i < M; i++) r[i] = (i + 1) * a[i + 1];
#pragma unroll
        for (int j = 0; j < N; j++) s[j] = (j + 1) * b[j];
    }
};

template <int M, int N>
HD float rational_forward(float x, const Coefficients<M, N>& c) {
    float ax = ABS(x), p = c.a[M], q = c.b[N - 1];
#pragma unroll
    for (int i = M - 1; i >= 0; i--) p = FMA(p, x, c.a[i]);
#pragma unroll
    for (int j = N - 2; j >= 0; j--) q = FMA(q, ax, c.b[j]);
    return p * reciprocal(FMA(q, ax, 1.0f));
}

// ptxas moves no instruction across this one, which costs an issue slot. On Hopper an FMA of three registers takes two
// cycles unless one of them is the same as in the instruction before. Instructions with the same coefficients should
// therefore follow each other, and ptxas does not order them so by itself.
template <int W>
HD void keep_order() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    if (W >= 8) asm volatile("pmevent 1;");
#endif
}

// For W elements: x becomes grad * dF/dx; grad * dF/da_i is added to sums[0 .. M], and grad * dF/d|b_j| to
// sums[M + 1 .. M + N].
template <int W, int M, int N>
HD void rational_backward(const float* grad, float* x, const Coefficients<M, N>& c, float* sums) {
#pragma unroll
    for (int e = 0; e < W; e++) {
        float v = x[e], av = ABS(v), p = c.a[M], q = c.b[N - 1];
        float r = M > 0 ? c.r[M > 0 ? M - 1 : 0] : 0.0f, s = c.s[N - 1];
#pragma unroll
        for (int i = M - 1; i >= 0; i--) p = FMA(p, v, c.a[i]);
#pragma unroll
        for (int i = M - 2; i >= 0; i--) r = FMA(r, v, c.r[i]);
#pragma unroll
        for (int j = N - 2; j >= 0; j--) q = FMA(q, av, c.b[j]);
#pragma unroll
        for (int j = N - 2; j >= 0; j--) s = FMA(s, av, c.s[j]);
        s = v < 0.0f ? -s : s;
        float inverse = reciprocal(FMA(q, av, 1.0f)), term = grad[e] * inverse, w = -(p * inverse) * term;
        x[e] = FMA(w, s, term * r);
        sums[0] += term;
#pragma unroll
        for (int i = 1; i <= M; i++) sums[i] += term *= v;
#pragma unroll
        for (int j = 0; j < N; j++) sums[M + 1 + j] += w *= av;
    }
}

// Degrees 5 and 4 in 38 instructions per element instead of 48: even and odd powers are apart, so that the polynomials
// and the sums use the same powers. x^4 is infinite for |x| > 4e9, also where its coefficient is 0.
#define EACH _Pragma("unroll") for (int e = 0; e < W; e++)
template <int W>
HD void rational_backward(const float* grad, float* x, const Coefficients<5, 4>& c, float* sums) {
    const float *a = c.a, *b = c.b, *r = c.r, *s = c.s;
    float x2[W], x4[W], odd[W], q[W], ds[W], t[W], p[W], dp[W], inverse[W], term[W], w[W], term_x[W], w_x[W];
    keep_order<W>();
    EACH x2[e] = x[e] * x[e];
    EACH odd[e] = FMA(b[2], x2[e], b[0]);
    keep_order<W>();
    EACH q[e] = FMA(b[1], x2[e], 1.0f);
    EACH x4[e] = x2[e] * x2[e];
    EACH odd[e] = FMA(odd[e], x[e], 0.0f);  // + 0 turns -0 into 0: the sign of `odd` is sign(x) with sign(0) = +1
    EACH q[e] = FMA(b[3], x4[e], q[e]) + ABS(odd[e]);
    keep_order<W>();
    EACH ds[e] = FMA(s[2], x2[e], b[0]);
    keep_order<W>();
    EACH ds[e] = COPYSIGN(ds[e], odd[e]);
    EACH t[e] = FMA(s[3], x2[e], s[1]);
    keep_order<W>();
    EACH ds[e] = FMA(t[e], x[e], ds[e]);
    EACH inverse[e] = reciprocal(q[e]);
    keep_order<W>();
    EACH p[e] = FMA(a[5], x[e], a[4]);
    keep_order<W>();
    EACH t[e] = FMA(a[3], x[e], a[2]);
    keep_order<W>();
    EACH dp[e] = FMA(r[3], x[e], r[2]);
    keep_order<W>();
    EACH p[e] = FMA(p[e], x2[e], t[e]), dp[e] = FMA(r[4], x2[e], dp[e]);
    keep_order<W>();
    EACH t[e] = FMA(a[1], x[e], a[0]);
    keep_order<W>();
    EACH q[e] = FMA(r[1], x[e], r[0]);
    keep_order<W>();
    EACH p[e] = FMA(p[e], x2[e], t[e]), dp[e] = FMA(dp[e], x2[e], q[e]);
    keep_order<W>();
    EACH {
        term[e] = grad[e] * inverse[e];
        w[e] = -(p[e] * inverse[e]) * term[e];
        dp[e] = term[e] * dp[e];
        term_x[e] = term[e] * x[e];
        w_x[e] = w[e] * ABS(x[e]);
        sums[0] += term[e];
        sums[1] += term_x[e];
        sums[6] += w_x[e];
        x[e] = FMA(w[e], ds[e], dp[e]);
    }
    keep_order<W>();
    EACH {
        sums[8] = FMA(w_x[e], x2[e], sums[8]);
        sums[2] = FMA(term[e], x2[e], sums[2]);
        sums[4] = FMA(term[e], x4[e], sums[4]);
        sums[5] = FMA(term_x[e], x4[e], sums[5]);
        sums[3] = FMA(term_x[e], x2[e], sums[3]);
        sums[7] = FMA(w[e], x2[e], sums[7]);
        sums[9] = FMA(w[e], x4[e], sums[9]);
    }
}
#undef EACH
