"""Sums of functions phi(x; theta) that are not linear in theta, one for each pair of an input and an output, in Triton.

    z[b, m, p] = sum_q phi(scale x[b, m, q]; theta[p, q])        for each head
    dx[b, m, q] = scale sum_p g[b, m, p] phi'(scale x[b, m, q]; theta[p, q])
    dtheta[p, q] = sum_bm g[b, m, p] dphi/dtheta(scale x[b, m, q]; theta[p, q])

Shapes: x (B, h, M, N), z and g (B, h, M, r), theta (h, r, N, P). The functions are in edge_functions.py.
Types: x and z float32, dx float32 or half precision, all arithmetic float32.

pack      theta as c (h, N, K, R), R: r filled up with functions that are 0 to a multiple of OUTPUTS = 4.
forward   x as (B, h, N, M), so that the threads of a warp read neighbouring rows. A program has BLOCK rows and 4
          outputs of a head and goes through all q. A thread has all 4 outputs of its rows: one load of x serves 4
          edges, and one load of 4 coefficients serves all rows of the thread.
backward  x as (B, h, M, N). A program has BLOCK columns (head, q), 4 outputs at a time, and a share of the rows. A
          thread has the coefficients and the sums of 4 edges in registers. dx is summed over the groups of 4 outputs in
          memory, by the thread that wrote it. The sums go to partials (splits, K, R, h N).
finish    the partials summed over the splits, and the gradient of theta from the sums.

Work for each edge, in instructions of sm_90: rational (5, 4) 14 forward and 39 backward, Mexican hat 11 and 20.
Determinism: there are no atomics. Every sum has a fixed order for given shapes and a given GPU.
Source: Kolmogorov-Arnold attention (arXiv:2503.10632).
"""

import triton
import triton.language as tl

from .edge_functions import gradient, pack, unpack, value

# One compiled kernel serves all sizes. For some sizes the compiler would choose other layouts of x, which are slower.
SIZES = ["rows", "images", "M", "heads", "splits", "images_of_program", "rows_of_program", "parts"]


@triton.jit(do_not_specialize=[*SIZES, "N"])
def pack_kernel(
    theta,
    c,
    heads,
    N,
    r: tl.constexpr,
    R: tl.constexpr,
    FUNCTION: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """theta (h, r, N, K) -> c (h, N, K, R), one function for each thread."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p, column = i % R, i // R
    valid = column < heads * N
    head, q = column // N, column % N
    theta += ((head * r + p) * N + q) * K
    raw = ()
    for k in tl.static_range(K):
        raw = raw + (tl.load(theta + k, mask=valid & (p < r), other=0.0).to(tl.float32),)
    packed = pack(raw, FUNCTION, m, n)
    for k in tl.static_range(K):
        tl.store(c + (column * K + k) * R + p, packed[k], mask=valid)


@triton.jit(do_not_specialize=[*SIZES, "N"])
def forward_kernel(
    x,
    c,
    z,
    scale,
    rows,
    M,
    N,
    heads,
    r: tl.constexpr,
    R: tl.constexpr,
    FUNCTION: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """z (B, h, M, r) from x (B, h, N, M)."""
    groups: tl.constexpr = R // OUTPUTS
    # Programs of the same rows run at the same time and share them in the L2 cache.
    block, group, head = tl.program_id(0) // groups, tl.program_id(0) % groups, tl.program_id(1)
    row = block * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    row = tl.minimum(row, rows - 1)
    image, i = row // M, row % M
    matrix = image.to(tl.int64) * heads + head
    x += matrix * M * N + i
    p = group * OUTPUTS + tl.arange(0, OUTPUTS)
    c += head * N * K * R + p
    z += ((matrix * M + i) * r)[:, None] + p[None, :]
    # Zeros by a load that loads nothing: from it the compiler takes the layout that has the outputs in one thread.
    total = tl.load(z, mask=(row < 0)[:, None], other=0.0)
    for _ in range(N):
        argument = (tl.load(x) * scale)[:, None]
        functions = ()
        for k in tl.static_range(K):
            functions = functions + (tl.load(c + k * R)[None, :],)
        total += value(argument, functions, FUNCTION, m, n)
        x += M
        c += K * R
    mask = valid[:, None]
    if R != r:
        mask = mask & (p < r)[None, :]
    tl.store(z, total, mask=mask)


@triton.jit
def _rows(
    g,
    x,
    scratch,
    dx,
    functions,
    sums,
    scale,
    lanes,
    group,
    N: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    FUNCTION: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    STEP: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """STEP rows of `backward_kernel`: dx, and the sums with their terms added."""
    groups: tl.constexpr = R // OUTPUTS
    last = group == groups - 1
    outputs = (group * OUTPUTS + tl.arange(0, OUTPUTS) < r)[None, :]
    arguments, gradients, earlier = (), (), ()
    for j in tl.static_range(STEP):
        arguments = arguments + (tl.load(x + j * N),)
        if R == r:
            gradients = gradients + (tl.load(g + j * r),)
        else:
            gradients = gradients + (tl.load(g + j * r, mask=outputs, other=0.0),)
        if groups > 1:
            earlier = earlier + (tl.load(scratch + j * N, mask=lanes & (group > 0), other=0.0),)
    for j in tl.static_range(STEP):
        argument = arguments[j][:, None] * scale
        power = argument
        if FUNCTION == "rational_A":
            power = tl.abs(argument)
        slope, sums = gradient(argument, power, gradients[j], functions, sums, FUNCTION, m, n)
        total = tl.sum(slope, 1)
        if groups > 1:
            total += earlier[j]
            tl.store(scratch + j * N, total, mask=lanes & (group < groups - 1))
        tl.store(dx + j * N, (total * scale).to(dx.dtype.element_ty), mask=lanes & last)
    return sums


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    g,
    x,
    c,
    scratch,
    dx,
    partials,
    scale,
    images,
    M,
    heads,
    images_of_program,
    rows_of_program,
    parts,
    N: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    FUNCTION: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """dx (B, h, M, N), and the sums of `gradient` over a share of the rows in partials (splits, K, R, h N)."""
    groups: tl.constexpr = R // OUTPUTS
    column, split = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    columns = heads * N
    valid = column < columns
    column = tl.minimum(column, columns - 1)
    head, q = column // N, column % N
    first = (split % parts) * rows_of_program
    count = tl.minimum(rows_of_program, M - first)
    begin = split // parts * images_of_program
    end = tl.minimum(begin + images_of_program, images)
    above = head.to(tl.int64) * M + first
    x, dx, scratch, g = x + above * N + q, dx + above * N + q, scratch + above * N + q, g + above * r
    rest = count - count % STEP
    for group in range(groups):
        p = group * OUTPUTS + tl.arange(0, OUTPUTS)
        gp = g[:, None] + p[None, :]
        functions, sums = (), ()
        for k in tl.static_range(K):
            coefficients = c + (column * K + k)[:, None] * R + p[None, :]
            functions = functions + (tl.load(coefficients),)
            sums = sums + (tl.load(coefficients, mask=(column < 0)[:, None], other=0.0),)  # zeros, as in forward_kernel
        for image in range(begin, end):
            image_row = (image * heads).to(tl.int64) * M
            for start in range(0, rest, STEP):
                row = image_row + start
                gi, xi, si, di = gp + row * r, x + row * N, scratch + row * N, dx + row * N
                sums = _rows(
                    gi, xi, si, di, functions, sums, scale, valid, group, N, r, R, FUNCTION, m, n, STEP, OUTPUTS
                )
            for start in range(rest, count):
                row = image_row + start
                gi, xi, si, di = gp + row * r, x + row * N, scratch + row * N, dx + row * N
                sums = _rows(gi, xi, si, di, functions, sums, scale, valid, group, N, r, R, FUNCTION, m, n, 1, OUTPUTS)
        part = partials + (split * K * R + p).to(tl.int64)[None, :] * columns + column[:, None]
        for k in tl.static_range(K):
            total = sums[k]
            if ACCUMULATE:
                total += tl.load(part, mask=valid[:, None], other=0.0)
            tl.store(part, total, mask=valid[:, None])
            part += columns * R
        tl.debug_barrier()  # scratch is read by the thread that wrote it, and if it were not, it is visible now


@triton.jit(do_not_specialize=[*SIZES, "N"])
def finish_kernel(
    partials,
    theta,
    dtheta,
    splits,
    heads,
    N,
    r: tl.constexpr,
    R: tl.constexpr,
    FUNCTION: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """dtheta (h, r, N, K) from partials (splits, K, R, h N)."""
    column, p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    columns = heads * N
    valid = column < columns
    head, q = column // N, column % N
    function = ((head * r + p) * N + q) * K
    sums, raw = (), ()
    for k in tl.static_range(K):
        total = tl.zeros((STEP, BLOCK), tl.float32)
        for start in range(0, splits, STEP):
            split = start + tl.arange(0, STEP)
            part = ((split * K + k) * R + p).to(tl.int64)[:, None] * columns + column[None, :]
            total += tl.load(partials + part, mask=(split < splits)[:, None] & valid[None, :], other=0.0)
        sums = sums + (tl.sum(total, 0),)
        raw = raw + (tl.load(theta + function + k, mask=valid, other=0.0).to(tl.float32),)
    gradients = unpack(sums, raw, FUNCTION, m, n)
    for k in tl.static_range(K):
        tl.store(dtheta + function + k, gradients[k].to(dtheta.dtype.element_ty), mask=valid)
