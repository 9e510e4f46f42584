// Features F_f(x) of the bases that are linear in their coefficients (kan_basis), their derivatives, and base
// functions, in float32. They compile for the GPU and for the host, where they are tested.
//
// A basis is a struct with the state of one x: start(x, low, step), value(f), derivative(f) without the factor that the
// packed coefficients of the derivative contain, and advance(f), to be called for f = 0, 1, ... in turn.
//   Fourier    cos x, sin x, cos 2x, ...: cos (m + 1) x = 2 cos x cos m x - cos (m - 1) x, likewise the sine; factors
//              of the derivatives -sin x, cos x, -2 sin 2x, ...: -1, 1, -2, ...
//   Chebyshev  T_f(t), t = tanh x; derivative f U_(f - 1)(t) (1 - t^2), factor f
//   Radial     exp(-u^2), u = (x - low) step - f; factor 1
//   Spline     cardinal B-spline of order K around f - (K - 1) / 2 in units of (x - low) step, as the sum of truncated
//              powers from the nearer end; factor 1
#pragma once

#ifdef __CUDACC__
#define HD __device__ __forceinline__
HD void cos_sin(float x, float& c, float& s) {  // the error of both grows as |x| 2^-23
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(x));
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(x));
}
HD float exponential(float x) { return __expf(x); }
HD float quotient(float a, float b) { return __fdividef(a, b); }
#else
#include <cmath>
#define HD inline
HD void cos_sin(float x, float& c, float& s) { c = std::cos(x), s = std::sin(x); }
HD float exponential(float x) { return std::exp(x); }
HD float quotient(float a, float b) { return a / b; }
inline float fabsf(float x) { return std::fabs(x); }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }
inline float fminf(float a, float b) { return std::fmin(a, b); }
inline float erff(float x) { return std::erf(x); }
#endif

struct Fourier {
    float two, c0, c, s0, s;
    HD void start(float x, float, float) {
        cos_sin(x, c, s);
        two = c + c, c0 = 1, s0 = 0;
    }
    HD float value(int f) const { return f % 2 ? s : c; }
    HD float derivative(int f) const { return f % 2 ? c : s; }
    // The place of feature f among the P coefficients of the basis, and the factor of its derivative.
    template <int P> HD static int source(int f) { return f / 2 + f % 2 * (P / 2); }
    HD static float factor(int f) { return f % 2 ? f / 2 + 1 : -(f / 2 + 1); }
    HD void advance(int f) {
        if (f % 2) {
            const float next_c = two * c - c0, next_s = two * s - s0;
            c0 = c, c = next_c, s0 = s, s = next_s;
        }
    }
};

struct Chebyshev {
    float two, t0, t, u0, u, slope;
    HD void start(float x, float, float) {
        const float e = exponential(-2 * fabsf(x));
        t0 = quotient(1 - e, 1 + e);
        slope = 4 * quotient(e, (1 + e) * (1 + e));
        if (x < 0) t0 = -t0;
        two = 2 * t0, t = 1, u0 = -1, u = 0;
    }
    HD float value(int) const { return t; }
    HD float derivative(int) const { return u * slope; }
    template <int P> HD static int source(int f) { return f; }
    HD static float factor(int f) { return f; }
    HD void advance(int) {
        const float next_t = two * t - t0, next_u = two * u - u0;
        t0 = t, t = next_t, u0 = u, u = next_u;
    }
};

struct Radial {
    float v, step;
    HD void start(float x, float low, float step_) { step = step_, v = (x - low) * step_; }
    HD float bounded(int f) const { return fminf(fmaxf(v - f, -64.0f), 64.0f); }
    HD float value(int f) const { return exponential(-bounded(f) * bounded(f)); }
    HD float derivative(int f) const { return -2 * step * bounded(f) * value(f); }
    template <int P> HD static int source(int f) { return f; }
    HD static float factor(int) { return 1; }
    HD void advance(int) {}
};

template <int K>
struct Spline {
    float v, step;
    HD void start(float x, float low, float step_) { step = step_, v = (x - low) * step_; }
    // The sum over j of (-1)^j binomial(K + 1, j) max((K + 1) / 2 - j - |u|, 0)^power / power!. The cells are half-open:
    // 0^0 is 1 on the left side, where a cell begins, and 0 on the right.
    template <int POWER> HD static float sum(float u) {
        const float y = fabsf(u);
        float total = 0, factor = 1;
        for (int i = 2; i <= POWER; i++) factor /= i;
#pragma unroll
        for (int j = 0; j < (K + 2) / 2; j++) {
            const float t = (K + 1) * 0.5f - j - y;
            float power = t > 0 || (POWER == 0 && t == 0 && u < 0) ? 1.0f : 0.0f;
#pragma unroll
            for (int i = 0; i < POWER; i++) power *= t;
            total += factor * power;
            factor = -factor * (K + 1 - j) / (j + 1);
        }
        return total;
    }
    HD float centred(int f) const { return v + ((K - 1) * 0.5f - f); }
    HD float value(int f) const { return sum<K>(centred(f)); }
    HD float derivative(int f) const {
        const float slope = step * sum<K - 1>(centred(f));
        return centred(f) >= 0 ? -slope : slope;
    }
    template <int P> HD static int source(int f) { return f; }
    HD static float factor(int) { return 1; }
    HD void advance(int) {}
};

// Base functions: b(x) and b'(x).
struct Zero {
    static constexpr bool NONE = true;
    HD static float value(float) { return 0; }
    HD static float derivative(float) { return 0; }
};
struct Identity {
    static constexpr bool NONE = false;
    HD static float value(float x) { return x; }
    HD static float derivative(float) { return 1; }
};
struct Relu {
    static constexpr bool NONE = false;
    HD static float value(float x) { return fmaxf(x, 0.0f); }
    HD static float derivative(float x) { return x > 0 ? 1.0f : 0.0f; }
};
struct Silu {
    static constexpr bool NONE = false;
    HD static float sigmoid(float x) { return quotient(1.0f, 1 + exponential(-x)); }
    HD static float value(float x) { return x * sigmoid(x); }
    HD static float derivative(float x) { return sigmoid(x) * (1 + x * (1 - sigmoid(x))); }
};
struct Gelu {
    static constexpr bool NONE = false;
    HD static float cdf(float x) { return 0.5f * (1 + erff(x * 0.70710678f)); }
    HD static float value(float x) { return x * cdf(x); }
    HD static float derivative(float x) { return cdf(x) + x * 0.39894228f * exponential(-0.5f * x * x); }
};
