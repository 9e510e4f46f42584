"""Triton kernels of attention by functions that are linear in their coefficients (kan_basis/attention.py).

    x = scale q k^T,   z[m, p] = sum_n sum_f F_f(x[m, n]) A[f, n, p],   out = z (W^T V)

(B, h) problems of N tokens; F_f are the features of the basis (kan_basis), A their coefficients and p < r. Tiles of x
stay on chip, and the backward pass computes them again, so that memory is linear in N:

    dz = dout (W^T V)^T,   d(W^T V) = z^T dout,   dV = W d(W^T V),   dW = sum over B of V d(W^T V)^T
    dx = sum_f F_f'(x) (dz A_f^T),   dq = scale dx k,   dk = scale dx^T q,   dA_f = sum over B of F_f(x)^T dz

Layout: q, k, v, out and their gradients (B, h, N, d) with any strides but 1 in d; A (h, F, N', R), W (h, N', R) and
z, dz (B, h, N, R) with the rank padded to R = 16, 32, ... and N to N', by zeros; padded tokens hence contribute 0.
Types: x, sums and accumulators float32; operands of the products in the dtype of q, k and v.
Work for each score in multiply-adds: forward d + F R (softmax: 2 d); backward 2 d + F R for dq, and 2 d + 2 F R for dk
and dA (softmax: 5 d). Every output element has one writer. dA and dW are partial sums over parts of the batch, which
the caller adds in a fixed order.
"""

import triton
import triton.language as tl

from .attention_features import advance, base, base_derivative, begin, derivative, value


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
            t = value(state, f, ORDER, BASIS) if f < P else base(x, BASE)
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
            t = derivative(state, f, step, ORDER, BASIS) if f < P else base_derivative(x, BASE)
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
                    t = value(state, f, ORDER, BASIS) if f < P else base(x, BASE)
                    new = new + (tl.dot(t.to(dz.dtype), dz, sums[f - FIRST], input_precision="ieee"),)
                if FIRST == 0:
                    a = tl.load(PACKED + (h * (2 * F + 1) + F + f) * PADDED * R + at)
                    t = derivative(state, f, step, ORDER, BASIS) if f < P else base_derivative(x, BASE)
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
