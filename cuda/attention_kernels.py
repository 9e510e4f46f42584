"""Triton kernels of attention by functions that are linear in their coefficients (kan_basis/attention.py).

    x = scale q k^T,   z[m, p] = sum_n sum_f F_f(x[m, n]) A[f, n, p],   out = z (W^T V)

(B, h) problems of N tokens; F_f are the features of the basis (kan_basis), A their coefficients and p < r. Tiles of x
stay on chip, and the backward pass computes them again, so that memory is linear in N:

    dz = dout (W^T V)^T,   d(W^T V) = z^T dout,   dV = W d(W^T V),   dW = sum over B of V d(W^T V)^T
    dx = sum_f F_f'(x) (dz A_f^T),   dq = scale dx k,   dk = scale dx^T q,   dA_f = sum over B of F_f(x)^T dz

Layout: q, k, v, out and their gradients (B, h, N, d) with any strides but 1 in d; A (h, F, N', R), W (h, N', R) and
z, dz (B, h, N, R) with the rank padded to R = 16, 32, ... and N to N', by zeros; padded tokens hence contribute 0.
Types: x, sums and accumulators float32; operands of the products in the dtype of q, k and v.
Work for each score in multiply-adds of the tensor cores, F features: forward d + F R (softmax attention: 2 d);
backward d + F R + d for dq, and d + 2 F R + d for dk and dA (softmax attention: 5 d). Fourier features take one sine,
one cosine and two operations for each further feature.
Determinism: every output element has one writer. dA and dW are partial sums over parts of the batch, which the caller
adds in a fixed order.
"""

import triton
import triton.language as tl

# ---- features: the state of f = 0 from x, the value and the derivative of feature f, and the state of f + 1


@triton.jit
def _inline_sin(x):
    return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _inline_cos(x):
    return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _cos_sin(x, FAST: tl.constexpr):
    """cos x and sin x. FAST: the units of the hardware, whose error grows as |x| 2^-23; else within 2e-7.

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
def _power(t, N: tl.constexpr):
    """max(t, 0)^N, N >= 0, where 0^0 = 0."""
    if N == 0:
        return tl.where(t > 0, 1.0, 0.0)
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
        sum += term * _power((K + 1) * 0.5 - j - y, K - DERIVATIVE)
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
def _base(x, BASE: tl.constexpr):
    if BASE == "relu":
        return tl.maximum(x, 0.0)
    elif BASE == "silu":
        return x * tl.sigmoid(x)
    elif BASE == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        return x


@triton.jit
def _base_derivative(x, BASE: tl.constexpr):
    if BASE == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif BASE == "silu":
        s = tl.sigmoid(x)
        return s * (1 + x * (1 - s))
    elif BASE == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


# ---- tiles


@triton.jit
def _tile(pointer, rows, stride, columns, N, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix of N rows and WIDTH columns; 0 beyond its end."""
    mask = rows[:, None] < N
    if WIDTH != BLOCK:
        mask = mask & (columns[None, :] < WIDTH)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, rows, stride, columns, tile, N, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    mask = rows[:, None] < N
    if WIDTH != BLOCK:
        mask = mask & (columns[None, :] < WIDTH)
    tl.store(pointer + rows[:, None] * stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _scores(a, b, scale):
    """scale a b^T in float32."""
    return tl.dot(a, tl.trans(b), input_precision="ieee") * scale


@triton.jit
def pack_kernel(
    A,
    W,
    TARGET,
    sah,
    saf,
    san,
    sap,
    swh,
    swn,
    swp,
    N,
    PADDED,
    r,
    P: tl.constexpr,
    F: tl.constexpr,
    BASIS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Coefficients (h, F, N, r) and projector (h, N, r) -> (h, 2 F + 1, N', R): A in the order of the features, A times
    the weights of the derivatives, and W."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.program_id(1)
    h = tl.program_id(2)
    p = tl.arange(0, R)
    mask = (n[:, None] < N) & (p[None, :] < r)
    if slot == 2 * F:
        t = tl.load(W + h * swh + n[:, None] * swn + p[None, :] * swp, mask=mask, other=0.0)
    else:
        f = slot % F
        source = f
        weight = 1.0
        if BASIS == "fourier":
            if f < P:
                source = f // 2 + (f % 2) * (P // 2)
                weight = (f // 2 + 1) * (2.0 * (f % 2) - 1)
        elif BASIS == "chebyshev":
            if f < P:
                weight = 1.0 * f
        t = tl.load(A + h * sah + source * saf + n[:, None] * san + p[None, :] * sap, mask=mask, other=0.0)
        t = tl.where(slot >= F, t.to(tl.float32) * weight, t.to(tl.float32))
    at = ((h * (2 * F + 1) + slot) * PADDED + n[:, None]) * R + p[None, :]
    tl.store(TARGET + at, t.to(TARGET.dtype.element_ty))


@triton.jit
def project_kernel(
    V,
    PACKED,
    VALUES,
    svb,
    svh,
    svn,
    N,
    PADDED,
    H,
    F: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W^T V of each head: (B, h, R, d)."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    d, p = tl.arange(0, BLOCK_D), tl.arange(0, R)
    total = tl.zeros([R, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        v = _tile(V + b * svb + h * svh, n, svn, d, N, D, BLOCK_D)
        w = tl.load(PACKED + ((h * (2 * F + 1) + 2 * F) * PADDED + n[:, None]) * R + p[None, :])
        total = tl.dot(tl.trans(w), v, total, input_precision="ieee")
    _store(VALUES + bh * R * D, p, D, d, total, R, D, BLOCK_D)


@triton.jit
def forward_kernel(
    Q,
    K,
    PACKED,
    VALUES,
    Z,
    OUT,
    sqb,
    sqh,
    sqn,
    skb,
    skh,
    skn,
    sob,
    soh,
    son,
    N,
    PADDED,
    H,
    scale,
    low,
    step,
    P: tl.constexpr,
    F: tl.constexpr,
    ORDER: tl.constexpr,
    BASIS: tl.constexpr,
    BASE: tl.constexpr,
    FAST: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_M)  # One dimension of the grid: the second one ends at 65,535.
    bh, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b, h = bh // H, bh % H
    m, d, p = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, R)
    q = _tile(Q + b * sqb + h * sqh, m, sqn, d, N, D, BLOCK_D)
    z = tl.zeros([BLOCK_M, R], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _tile(K + b * skb + h * skh, n, skn, d, N, D, BLOCK_D)
        x = _scores(q, k, scale)
        state = begin(x, low, step, BASIS, FAST)
        for f in tl.static_range(F):
            a = tl.load(PACKED + ((h * (2 * F + 1) + f) * PADDED + n[:, None]) * R + p[None, :])
            t = value(state, f, ORDER, BASIS) if f < P else _base(x, BASE)
            z = tl.dot(t.to(a.dtype), a, z, input_precision="ieee")
            state = advance(state, f, BASIS)
    _store(Z + bh * N * R, m, R, p, z, N, R, R)
    values = _tile(VALUES + bh * R * D, p, D, d, R, D, BLOCK_D)
    out = tl.dot(z.to(values.dtype), values, input_precision="ieee")
    _store(OUT + b * sob + h * soh, m, son, d, out, N, D, BLOCK_D)


@triton.jit
def backward_query_kernel(
    GRAD,
    Q,
    K,
    PACKED,
    VALUES,
    Z,
    DZ,
    PARTS,
    DQ,
    sgb,
    sgh,
    sgn,
    sqb,
    sqh,
    sqn,
    skb,
    skh,
    skn,
    sob,
    soh,
    son,
    N,
    PADDED,
    H,
    scale,
    low,
    step,
    P: tl.constexpr,
    F: tl.constexpr,
    ORDER: tl.constexpr,
    BASIS: tl.constexpr,
    BASE: tl.constexpr,
    FAST: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq, dz, and d(W^T V) of the rows of this block, (B, h, blocks, R, d) in float32."""
    blocks = tl.cdiv(N, BLOCK_M)  # One dimension of the grid: the second one ends at 65,535.
    bh, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b, h = bh // H, bh % H
    m, d, p = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, R)
    grad = _tile(GRAD + b * sgb + h * sgh, m, sgn, d, N, D, BLOCK_D)
    values = _tile(VALUES + bh * R * D, p, D, d, R, D, BLOCK_D)
    z = _tile(Z + bh * N * R, m, R, p, N, R, R)
    part = tl.dot(tl.trans(z), grad, input_precision="ieee")
    _store(PARTS + (bh * blocks + block) * R * D, p, D, d, part, R, D, BLOCK_D)
    dz = _scores(grad, values, 1.0).to(values.dtype)
    _store(DZ + bh * N * R, m, R, p, dz, N, R, R)
    q = _tile(Q + b * sqb + h * sqh, m, sqn, d, N, D, BLOCK_D)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _tile(K + b * skb + h * skh, n, skn, d, N, D, BLOCK_D)
        x = _scores(q, k, scale)
        state = begin(x, low, step, BASIS, FAST)
        dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for f in tl.static_range(F):
            a = tl.load(PACKED + ((h * (2 * F + 1) + F + f) * PADDED + n[:, None]) * R + p[None, :])
            t = derivative(state, f, step, ORDER, BASIS) if f < P else _base_derivative(x, BASE)
            dx += t * tl.dot(dz, tl.trans(a), input_precision="ieee")
            state = advance(state, f, BASIS)
        dq = tl.dot(dx.to(k.dtype), k, dq, input_precision="ieee")
    _store(DQ + b * sob + h * soh, m, son, d, dq * scale, N, D, BLOCK_D)


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return tiles


@triton.jit
def backward_key_kernel(
    Q,
    K,
    V,
    PACKED,
    DZ,
    PARTS,
    DK,
    DV,
    SUMS,
    sqb,
    sqh,
    sqn,
    skb,
    skh,
    skn,
    svb,
    svh,
    svn,
    sob,
    soh,
    son,
    B,
    N,
    PADDED,
    H,
    images,
    blocks,
    scale,
    low,
    step,
    P: tl.constexpr,
    F: tl.constexpr,
    ORDER: tl.constexpr,
    BASIS: tl.constexpr,
    BASE: tl.constexpr,
    FAST: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
):
    """dk and dv of a block of tokens, and dA and dW summed over a part of the batch, (parts, h, F + 1, N', R).

    dA of the features FIRST .. FIRST + COUNT - 1; dk, dv and dW if FIRST is 0.
    """
    n, d, p = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, R)
    h, part = tl.program_id(1), tl.program_id(2).to(tl.int64)
    sums = _zeros(COUNT, BLOCK_N, R)
    dw = tl.zeros([BLOCK_N, R], tl.float32)
    at = n[:, None] * R + p[None, :]
    w = tl.load(PACKED + (h * (2 * F + 1) + 2 * F) * PADDED * R + at)
    for b in range(part * images, tl.minimum((part + 1) * images, B)):
        bh = b * H + h
        k = _tile(K + b * skb + h * skh, n, skn, d, N, D, BLOCK_D)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in range(0, N, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            q = _tile(Q + b * sqb + h * sqh, m, sqn, d, N, D, BLOCK_D)
            dz = _tile(DZ + bh * N * R, m, R, p, N, R, R)
            x = _scores(k, q, scale)  # transposed
            state = begin(x, low, step, BASIS, FAST)
            dx = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            new = ()
            for f in tl.static_range(F):
                if f >= FIRST and f < FIRST + COUNT:
                    t = value(state, f, ORDER, BASIS) if f < P else _base(x, BASE)
                    new = new + (tl.dot(t.to(dz.dtype), dz, sums[f - FIRST], input_precision="ieee"),)
                if FIRST == 0:
                    a = tl.load(PACKED + (h * (2 * F + 1) + F + f) * PADDED * R + at)
                    t = derivative(state, f, step, ORDER, BASIS) if f < P else _base_derivative(x, BASE)
                    dx += t * tl.dot(a, tl.trans(dz), input_precision="ieee")
                state = advance(state, f, BASIS)
            sums = new
            if FIRST == 0:
                dk = tl.dot(dx.to(q.dtype), q, dk, input_precision="ieee")
        if FIRST == 0:
            _store(DK + b * sob + h * soh, n, son, d, dk * scale, N, D, BLOCK_D)
            dvalues = tl.zeros([R, BLOCK_D], tl.float32)
            for block in range(0, blocks):
                dvalues += _tile(PARTS + (bh * blocks + block) * R * D, p, D, d, R, D, BLOCK_D)
            dvalues = dvalues.to(k.dtype)
            dv = tl.dot(w, dvalues, input_precision="ieee")
            _store(DV + b * sob + h * soh, n, son, d, dv, N, D, BLOCK_D)
            v = _tile(V + b * svb + h * svh, n, svn, d, N, D, BLOCK_D)
            dw = tl.dot(v, tl.trans(dvalues), dw, input_precision="ieee")
    for f in tl.static_range(COUNT):
        source = f + FIRST
        if BASIS == "fourier" and f + FIRST < P:
            source = (f + FIRST) // 2 + ((f + FIRST) % 2) * (P // 2)
        tl.store(SUMS + ((part * tl.num_programs(1) + h) * (F + 1) + source) * PADDED * R + at, sums[f])
    if FIRST == 0:
        tl.store(SUMS + ((part * tl.num_programs(1) + h) * (F + 1) + F) * PADDED * R + at, dw)
