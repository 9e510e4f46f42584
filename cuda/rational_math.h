// One element of the grouped rational function and of its gradients, in float32. Compiles for the GPU and for the host, where it is tested.
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

// Returns grad * dF/dx and adds grad * dF/da_i and grad * dF/d|b_j| to sums[0 .. M] and sums[M + 1 .. M + N].
template <int M, int N>
HD float rational_backward(float grad, float x, const Coefficients<M, N>& c, float* sums) {
    float ax = ABS(x), p = c.a[M], q = c.b[N - 1], r = M > 0 ? c.r[M > 0 ? M - 1 : 0] : 0.0f, s = c.s[N - 1];
#pragma unroll
    for (int i = M - 1; i >= 0; i--) p = FMA(p, x, c.a[i]);
#pragma unroll
    for (int i = M - 2; i >= 0; i--) r = FMA(r, x, c.r[i]);
#pragma unroll
    for (int j = N - 2; j >= 0; j--) q = FMA(q, ax, c.b[j]);
#pragma unroll
    for (int j = N - 2; j >= 0; j--) s = FMA(s, ax, c.s[j]);
    s = x < 0.0f ? -s : s;
    float inverse = reciprocal(FMA(q, ax, 1.0f)), term = grad * inverse, w = -(p * inverse) * term;
    float grad_x = FMA(w, s, term * r);
    sums[0] += term;
#pragma unroll
    for (int i = 1; i <= M; i++) sums[i] += term *= x;
#pragma unroll
    for (int j = 0; j < N; j++) sums[M + 1 + j] += w *= ax;
    return grad_x;
}

// Degrees 5 and 4 in 38 instructions instead of 48: even and odd powers apart, so that the powers serve polynomials and sums alike.
template <>
HD float rational_backward<5, 4>(float grad, float x, const Coefficients<5, 4>& c, float* sums) {
    const float *a = c.a, *b = c.b, *r = c.r, *s = c.s;
    float x2 = x * x, x4 = x2 * x2;
    float odd = FMA(FMA(b[2], x2, b[0]), x, 0.0f);  // + 0 turns -0 into 0: the sign of `odd` is sign(x) with sign(0) = +1
    float q = FMA(b[3], x4, FMA(b[1], x2, 1.0f)) + ABS(odd);
    float ds = FMA(x, FMA(s[3], x2, s[1]), COPYSIGN(FMA(s[2], x2, b[0]), odd));
    float p = FMA(FMA(FMA(a[5], x, a[4]), x2, FMA(a[3], x, a[2])), x2, FMA(a[1], x, a[0]));
    float dp = FMA(FMA(r[4], x2, FMA(r[3], x, r[2])), x2, FMA(r[1], x, r[0]));
    float inverse = reciprocal(q), term = grad * inverse, w = -(p * inverse) * term;
    float term_x = term * x, w_x = w * ABS(x);
    sums[0] += term;
    sums[1] += term_x;
    sums[2] = FMA(term, x2, sums[2]);
    sums[3] = FMA(term_x, x2, sums[3]);
    sums[4] = FMA(term, x4, sums[4]);
    sums[5] = FMA(term_x, x4, sums[5]);
    sums[6] += w_x;
    sums[7] = FMA(w, x2, sums[7]);
    sums[8] = FMA(w_x, x2, sums[8]);
    sums[9] = FMA(w, x4, sums[9]);
    return FMA(w, ds, term * dp);
}
