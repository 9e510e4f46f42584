"""The functions phi(x; theta) of the edge kernels (edges_triton.py) in Triton, with their gradients.

Each function has P coefficients, which `pack` turns into the K numbers that the loops read:

    rational_A   P(x) / (1 + |b_1| |x| + ..)    a_0..a_m, |b_1|..|b_n|              K = m + 1 + n
    rational_B   P(x) / (1 + |b_1 x + ..|)      a_0..a_m, b_1..b_n                  K = m + 1 + n
    a wavelet    w psi((x - tau) / s)           w, tau, 1 / s, where |s| >= 0.01    K = 3

`gradient` accumulates K sums over the rows for each edge, from which `unpack` computes the gradient of theta:

    rational     sum of g x^i / Q, of g |x|^j F / Q (version A) or of sign(D) g x^j F / Q (version B, Q = 1 + |D|)
    a wavelet    sum of g psi(u), of g psi'(u) and of g psi'(u) u

The definitions are in kan_basis/quotient.py and kan_basis/wavelet.py. As there, sign(0) = +1, also for -0.
All arithmetic is float32. Reciprocals, exponentials, sines and cosines are the approximations of the GPU, whose errors
are a few units in the last place, or 5e-7 absolute for sines and cosines of the arguments that occur.
"""

import math
import os

import triton
import triton.language as tl

# The interpreter runs no inline assembly; it uses plain operations.
APPROXIMATE = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")
ALL = tl.constexpr(tl.PropagateNan.ALL)
MIN_SCALE = tl.constexpr(1e-2)
FAR = tl.constexpr(64.0)
HAT = tl.constexpr(2 / (math.sqrt(3) * math.pi**0.25))
HALF_LOG2E = tl.constexpr(0.5 / math.log(2))
PI = tl.constexpr(math.pi)


@triton.jit
def _reciprocal(x):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _exp2(x):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def _sin(x):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.sin(x)


@triton.jit
def _cos(x):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.cos(x)


@triton.jit
def _with_sign_of(x, s):
    """x with its sign flipped where s is negative; s is not -0."""
    sign = s.to(tl.int32, bitcast=True) & -2147483648
    return (x.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def pack(theta, FUNCTION: tl.constexpr, m: tl.constexpr, n: tl.constexpr):
    """K numbers from the P coefficients, a tuple of tensors each."""
    if FUNCTION == "rational_A":
        packed = ()
        for k in tl.static_range(m + 1 + n):
            packed = packed + ((theta[k] if k <= m else tl.abs(theta[k])),)
    elif FUNCTION == "rational_B":
        packed = theta
    else:
        w, tau, s = theta[0], theta[1], theta[2]
        if FUNCTION == "mexican_hat":
            w = w * HAT
        elif FUNCTION == "dog_wavkan":
            w = -w
        packed = (w, tau, 1.0 / _safe(s))
    return packed


@triton.jit
def _safe(s):
    return tl.where(s < 0, tl.minimum(s, -MIN_SCALE, ALL), tl.maximum(s, MIN_SCALE, ALL))


@triton.jit
def unpack(sums, theta, FUNCTION: tl.constexpr, m: tl.constexpr, n: tl.constexpr):
    """The gradients of the P coefficients from the K sums that `gradient` accumulated."""
    if FUNCTION == "rational_A" or FUNCTION == "rational_B":
        result = ()
        for k in tl.static_range(m + 1 + n):
            value = sums[k]
            if k > m:
                value = -value
                if FUNCTION == "rational_A":
                    value = tl.where(theta[k] < 0, -value, value)
            result = result + (value,)
    else:
        packed = pack(theta, FUNCTION, m, n)
        slope = -packed[0] * packed[2]
        dw = sums[0]
        if FUNCTION == "mexican_hat":
            dw = dw * HAT
        elif FUNCTION == "dog_wavkan":
            dw = -dw
        result = (dw, slope * sums[1], slope * sums[2])
    return result


@triton.jit
def value(x, c, FUNCTION: tl.constexpr, m: tl.constexpr, n: tl.constexpr):
    """phi(x) from the packed coefficients c."""
    if FUNCTION == "rational_A" or FUNCTION == "rational_B":
        p = c[m]
        for i in tl.static_range(m):
            p = p * x + c[m - 1 - i]
        t = x
        if FUNCTION == "rational_A":
            t = tl.abs(x)
        d = c[m + n]
        for j in tl.static_range(n - 1):
            d = d * t + c[m + n - 1 - j]
        if FUNCTION == "rational_A":
            q = d * t + 1.0
        else:
            q = 1.0 + tl.abs(d * t)
        return p * _reciprocal(q)
    else:
        u = tl.clamp((x - c[1]) * c[2], -FAR, FAR, ALL)
        return c[0] * _wave(u, FUNCTION, False)[0]


@triton.jit
def gradient(x, power, g, c, sums, FUNCTION: tl.constexpr, m: tl.constexpr, n: tl.constexpr):
    """The derivative in x times g, and the sums with the terms of this x added.

    Args:
        x, power, g: the argument (BLOCK, 1); x or |x|, as the denominator takes it; the gradient of the output.
        c, sums: packed coefficients and sums, tuples of K tensors (BLOCK, outputs).
    """
    if FUNCTION == "rational_A" or FUNCTION == "rational_B":
        p, dp = c[m], c[m]
        for i in tl.static_range(m):
            if i > 0:
                dp = dp * x + p
            p = p * x + c[m - 1 - i]
        d, dd = c[m + n], c[m + n]
        for j in tl.static_range(n):
            if j > 0:
                dd = dd * power + d
            if j < n - 1:
                d = d * power + c[m + n - 1 - j]
            else:
                d = d * power + 0.0  # a fused multiplication and addition turns -0 into +0
        if FUNCTION == "rational_A":
            q = 1.0 + d
        else:
            q = 1.0 + tl.abs(d)
        inverse = _reciprocal(q)
        t = g * inverse
        f = p * inverse
        if FUNCTION == "rational_A":
            s = f * tl.where(x < 0, -1.0, 1.0)
        else:
            f = _with_sign_of(f, d)
            s = f
        if m > 0:
            dx = t * (dp - s * dd)
        else:
            dx = -t * s * dd
        w = t * f
        result = (sums[0] + t,)
        xi = x
        for i in tl.static_range(m):
            result = result + (sums[i + 1] + t * xi,)
            xi = xi * x
        tj = power
        for j in tl.static_range(n):
            result = result + (sums[m + 1 + j] + w * tj,)
            tj = tj * power
    else:
        u = tl.clamp((x - c[1]) * c[2], -FAR, FAR, ALL)
        psi, slope = _wave(u, FUNCTION, True)
        v = g * slope
        dx = v * (c[0] * c[2])
        result = (sums[0] + g * psi, sums[1] + v, sums[2] + v * u)
    return dx, result


@triton.jit
def _wave(u, FUNCTION: tl.constexpr, SLOPE: tl.constexpr):
    """psi and psi' at u, without the constant factors that are in the packed weight."""
    slope = u
    if FUNCTION == "mexican_hat":
        t = u * u
        e = _exp2(t * -HALF_LOG2E)
        psi = (t - 1.0) * e
        if SLOPE:
            slope = (3.0 - t) * (u * e)
    elif FUNCTION == "dog" or FUNCTION == "dog_wavkan":
        t = u * u
        e = _exp2(t * -HALF_LOG2E)
        psi = u * e
        if SLOPE:
            slope = e - t * e
    elif FUNCTION == "morlet":
        v = 5.0 * u
        e = _exp2((u * u) * -HALF_LOG2E)
        psi = _cos(v) * e
        if SLOPE:
            slope = -5.0 * (_sin(v) * e) - u * psi
    elif FUNCTION == "shannon":
        v = tl.abs(u)
        near = v < 1.0  # sin(u) / u and its derivative cancel there
        t = u * u
        series = 1.0 - t * (1 / 6) * (1.0 - t * (1 / 20) * (1.0 - t * (1 / 42) * (1.0 - t * (1 / 72))))
        inverse = _reciprocal(tl.where(near, 1.0, u))
        a = PI / 8 * u
        window = tl.where(v <= 8.0, 0.54 + 0.46 * _cos(a), 0.0)
        sinc = tl.where(near, series, _sin(u) * inverse)
        psi = sinc * window
        if SLOPE:
            # The derivative of the series, and (cos(u) - sinc(u)) / u.
            ds = (
                u * (-1 / 3) * (1.0 - t * (1 / 10) * (1.0 - t * (1 / 28) * (1.0 - t * (1 / 54) * (1.0 - t * (1 / 88)))))
            )
            ds = tl.where(near, ds, (_cos(u) - sinc) * inverse)
            dw = tl.where(v <= 8.0, (-0.46 * PI / 8) * _sin(a), 0.0)
            slope = ds * window + sinc * dw
    else:
        v = tl.abs(u)
        if FUNCTION == "meyer":
            t, dt = _smooth_step(v)
        else:
            t, dt = v, 1.0
        inner, di = _smooth_step(2.0 * t - 1.0)
        a = PI / 2 * inner
        window = tl.where(t < 1.0, _cos(a), 0.0)
        b = PI * tl.minimum(v, 2.0, ALL)  # beyond 1 the window is 0
        sine = _sin(b)
        psi = sine * window
        if SLOPE:
            dw = tl.where(t < 1.0, -PI * _sin(a) * di * dt, 0.0)
            slope = PI * _cos(b) * window + sine * dw
            slope = tl.where(u < 0, -slope, tl.where(u == 0, 0.0, slope))  # as abs in torch
    return psi, slope


@triton.jit
def _smooth_step(t):
    """nu(t) = t^4 (35 - 84 t + 70 t^2 - 20 t^3) between 0 and 1, and its derivative 140 t^3 (1 - t)^3."""
    t = tl.clamp(t, 0.0, 1.0, ALL)
    low = t < 0.5
    r = tl.where(low, t, 1.0 - t)
    s = r * r
    nu = s * s * (35.0 + r * (-84.0 + r * (70.0 - 20.0 * r)))
    product = t * (1.0 - t)
    return tl.where(low, nu, 1.0 - nu), 140.0 * product * product * product
