"""Features of the bases that are linear in their coefficients, their derivatives, and base functions, in Triton.

A feature function has a state: `begin` makes that of f = 0 from x, `value` and `derivative` belong to feature f, and
`advance` makes the state of f + 1. attention_features.h has the formulas; the derivatives leave out the same factors,
which the packed coefficients contain.
"""

import triton
import triton.language as tl


@triton.jit
def _inline_sin(x):
    return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _inline_cos(x):
    return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _cos_sin(x, FAST: tl.constexpr):
    """cos x and sin x. FAST: the units of the hardware, whose error grows as |x| 2^-23; else within 2e-7 for |x| < 1e4.

    Otherwise x is reduced to |t| <= pi / 4 by multiples of pi / 2 in three parts, and Taylor polynomials follow.
    """
    if FAST:
        return _inline_cos(x), _inline_sin(x)
    quarter = tl.floor(x * 0.6366197723675814 + 0.5)
    t = x - quarter * 1.5703125 - quarter * 4.837512969970703e-4 - quarter * 7.549789948768648e-8
    y = t * t
    sin = t + t * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880))))
    cos = 1 - y * (1 / 2 - y * (1 / 24 - y * (1 / 720 - y * (1 / 40320 - y * (1 / 3628800)))))
    quadrant = quarter.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    c = tl.where((quadrant == 1) | (quadrant == 2), -c, c)
    return c, tl.where(quadrant >= 2, -s, s)


@triton.jit
def begin(x, low, step, BASIS: tl.constexpr, FAST: tl.constexpr):
    if BASIS == "fourier":  # cos x, sin x, cos 2x, ...: T and U by cos (m + 1) x = 2 cos x cos m x - cos (m - 1) x
        c, s = _cos_sin(x, FAST)
        return (2 * c, tl.full(x.shape, 1.0, tl.float32), c, tl.zeros(x.shape, tl.float32), s, x)
    elif BASIS == "chebyshev":  # T_f(t) and f U_(f-1)(t), t = tanh x
        t = 2 * tl.sigmoid(2 * x) - 1
        one = tl.full(x.shape, 1.0, tl.float32)
        return (2 * t, t, one, -one, tl.zeros(x.shape, tl.float32), x)
    else:  # x in units of the grid
        u = (x - low) * step
        return (u, u, u, u, u, x)


@triton.jit
def advance(state, f: tl.constexpr, BASIS: tl.constexpr):
    two, c0, c, s0, s, x = state
    if (BASIS == "fourier" and f % 2 == 1) or BASIS == "chebyshev":
        return (two, c, two * c - c0, s, two * s - s0, x)
    else:
        return state


@triton.jit
def _power(t, left, N: tl.constexpr):
    """max(t, 0)^N, N >= 0. Cells are half-open: 0^0 is 1 on the left side, where one begins, and 0 on the right."""
    if N == 0:
        return tl.where((t > 0) | ((t == 0) & left), 1.0, 0.0)
    else:
        t = tl.maximum(t, 0.0)
        y = t
        for _ in tl.static_range(N - 1):
            y = y * t
        return y


@triton.jit
def _bump(u, K: tl.constexpr, DERIVATIVE: tl.constexpr):
    """Cardinal B-spline of order K around 0, from its truncated powers on the nearer side, or its derivative."""
    y = tl.abs(u)
    sum = tl.zeros(u.shape, tl.float32)
    term = 1.0
    for i in tl.static_range(1, K + 1 - DERIVATIVE):
        term = term / i
    for j in tl.static_range((K + 2) // 2):
        sum += term * _power((K + 1) * 0.5 - j - y, u < 0, K - DERIVATIVE)
        term = -term * (K + 1 - j) / (j + 1)
    if DERIVATIVE:
        return tl.where(u >= 0, -sum, sum)
    else:
        return sum


@triton.jit
def value(state, f: tl.constexpr, ORDER: tl.constexpr, BASIS: tl.constexpr):
    two, c0, c, s0, s, x = state
    if BASIS == "fourier":
        return c if f % 2 == 0 else s
    elif BASIS == "chebyshev":
        return c
    elif BASIS == "radial":
        u = tl.minimum(tl.maximum(two - f, -64.0), 64.0)
        return tl.exp(-u * u)
    else:
        return _bump(two + ((ORDER - 1) * 0.5 - f), ORDER, 0)


@triton.jit
def derivative(state, f: tl.constexpr, step, ORDER: tl.constexpr, BASIS: tl.constexpr):
    """The derivative of feature f without the factor of `weight`."""
    two, c0, c, s0, s, x = state
    if BASIS == "fourier":
        return s if f % 2 == 0 else c
    elif BASIS == "chebyshev":
        t = 0.5 * two
        return s * (1 - t * t)
    elif BASIS == "radial":
        u = tl.minimum(tl.maximum(two - f, -64.0), 64.0)
        return -2 * step * u * tl.exp(-u * u)
    else:
        return step * _bump(two + ((ORDER - 1) * 0.5 - f), ORDER, 1)


@triton.jit
def base(x, BASE: tl.constexpr):
    if BASE == "relu":
        return tl.maximum(x, 0.0)
    elif BASE == "silu":
        return x * tl.sigmoid(x)
    elif BASE == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        return x


@triton.jit
def base_derivative(x, BASE: tl.constexpr):
    if BASE == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif BASE == "silu":
        s = tl.sigmoid(x)
        return s * (1 + x * (1 - s))
    elif BASE == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        return tl.full(x.shape, 1.0, tl.float32)
