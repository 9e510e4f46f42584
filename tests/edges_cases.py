"""Cases of the edge kernels, and their definition in float64.

`TRITON_INTERPRET=1 python edges_cases.py interpret` runs the kernels on the CPU, and `python edges_cases.py compile`
compiles them for several GPUs. Both print a JSON dictionary of the checks, "" for a pass.
"""

import json
import re
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kan_basis import Basis, make_basis

WAVELETS = "mexican_hat morlet dog dog_wavkan meyer meyer_wavkan shannon".split()
FUNCTIONS = [(name, 0, 0) for name in WAVELETS] + [("rational_A", 5, 4), ("rational_B", 5, 4)]
DEGREES = [("rational_A", 0, 1), ("rational_B", 0, 1), ("rational_A", 1, 2), ("rational_B", 8, 8), ("rational_A", 3, 8)]
# B, h, M, N, r
SHAPES = [(3, 2, 7, 5, 6), (1, 1, 1, 1, 1), (2, 1, 37, 3, 12), (3, 3, 2, 34, 5)]
TOLERANCE = {"z": 2e-5, "dx": 1e-4, "theta": 1e-4}


def basis_of(name: str, m: int, n: int) -> Basis:
    if name.startswith("rational"):
        return make_basis("rational", degrees=(m, n), version=name[-1])
    return make_basis("wavelet", wavelet=name)


def names_of(basis: Basis) -> list[str]:
    if basis.name == "wavelet":
        return ["weight", "translation", "scale"]
    m, n = basis.degrees
    return [f"a_{i}" for i in range(m + 1)] + [f"b_{j}" for j in range(1, n + 1)]


def theta_of(basis: Basis, h: int, r: int, N: int, device: str = "cpu", calm: bool = False) -> Tensor:
    """Random coefficients, among them scales of wavelets near 0 and denominators that start at 0.

    calm: without those, and the sum inside the absolute value of version B keeps its sign for |x| < 6. Where it changes
    sign, the derivative jumps. In many edges some x is so near that rounding decides the side.
    """
    theta = torch.randn(h, r, N, basis.num_coefficients) * 0.7
    if basis.name == "wavelet":
        theta[..., 2] += torch.where(theta[..., 2] < -1, -0.3, 1.0)
        if calm:
            theta[..., 2] = theta[..., 2].sign() * theta[..., 2].abs().clamp(min=0.3)
        else:
            special = theta.new_tensor([0.005, -0.005, 0.0, -1.0])
            theta[0, 0, : len(special), 2] = special[:N]
    else:
        a, b = theta.tensor_split([basis.degrees[0] + 1], -1)
        if calm:
            a *= 0.3 ** torch.arange(a.shape[-1])
            b[..., 0] = b[..., 0].sign() * (0.5 + b[..., 0].abs())
            b[..., 1:] *= 0.02 * 0.25 ** torch.arange(2, b.shape[-1] + 1)
        else:
            b[0, 0, 0] = 0
    return theta.to(device)


def sums(basis: Basis, x: Tensor, theta: Tensor) -> Tensor:
    """(B, h, M, N), (h, r, N, P) -> (B, h, M, r) by the definition of the basis, image by image."""
    return torch.stack([basis(image[:, :, None], theta[:, None]).sum(-1) for image in x])


def exact(basis: Basis, g: Tensor, x: Tensor, theta: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """z, dx and dtheta in float64, one image at a time."""
    z, dx, dtheta = [], [], torch.zeros_like(theta, dtype=torch.float64)
    for xi, gi in zip(x, g):
        xi, t = (a.detach().double().requires_grad_() for a in (xi, theta))
        out = sums(basis, (scale * xi)[None], t)[0]
        grads = torch.autograd.grad(out, (xi, t), gi.double())
        z, dx, dtheta = [*z, out.detach()], [*dx, grads[0]], dtheta + grads[1]
    return torch.stack(z), torch.stack(dx), dtheta


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error in the norm; NaN and infinity where the numbers are not finite."""
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-20)).item()


def compare(basis: Basis, found, expected, tolerance=TOLERANCE) -> None:
    """Raises: AssertionError that names the tensor or coefficient with too large an error."""
    pairs = [("z", *(t[0] for t in (found, expected))), ("dx", *(t[1] for t in (found, expected)))]
    pairs += [(name, found[2][..., k], expected[2][..., k]) for k, name in enumerate(names_of(basis))]
    for name, a, b in pairs:
        assert a.shape == b.shape, f"{name} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        e = error(a, b)
        assert e <= tolerance.get(name, tolerance["theta"]), f"relative error {e:.1e} of {name}"


class Guarded:
    """A tensor of NaN between elements that no kernel may touch."""

    def __init__(self, *shape: int, dtype=torch.float32, device="cpu") -> None:
        size, margin = torch.Size(shape).numel(), 256
        self.memory = torch.full((size + 2 * margin,), 7.0, dtype=dtype, device=device)
        self.tensor = self.memory[margin : margin + size].view(shape).fill_(float("nan"))
        self.outside = self.memory[:margin], self.memory[margin + size :]

    def intact(self) -> bool:
        return all(bool((side == 7).all()) for side in self.outside)


def by_kernels(basis: Basis, g: Tensor, x: Tensor, theta: Tensor, scale: float, dtype=torch.float32, config=None):
    """z, dx and dtheta by the kernels, images in two chunks, with guarded outputs."""
    from cuda import edges_launch as launch

    phi, (B, h, M, N), r, device = launch.Function(*basis.edge_function), x.shape, theta.shape[1], x.device
    z, dx = Guarded(B, h, M, r, device=device), Guarded(B, h, M, N, dtype=dtype, device=device)
    size = (B + 1) // 2
    totals = launch.Sums(theta, phi, size, M, 4, config)
    partials = Guarded(*totals.partials.shape, device=device)
    scratch, totals.partials = Guarded(size, h, M, N, device=device), partials.tensor
    for i in range(0, B, size):
        part = slice(i, i + size)
        launch.forward(x[part].mT.contiguous(), totals.c, z.tensor[part], scale, phi)
        earlier = dx.tensor[part] if dtype is torch.float32 else scratch.tensor
        totals.backward(g[part], x[part], dx.tensor[part], earlier, scale)
    dtheta = totals.finish()
    assert all(t.intact() for t in (z, dx, scratch, partials)), "a kernel wrote outside its output"
    return z.tensor, dx.tensor, dtheta


def check_kernels(phi, shape, dtype=torch.float32, device="cpu", calm=False) -> None:
    torch.manual_seed(0)
    (B, h, M, N, r), basis, scale = shape, basis_of(*phi), 0.6
    x, g = torch.randn(B, h, M, N, device=device) * 2, torch.randn(B, h, M, r, device=device)
    x[0, 0, 0, 0] = 0  # sign(0) = +1
    theta = theta_of(basis, h, r, N, device, calm)
    found = by_kernels(basis, g, x, theta, scale, dtype)
    tolerance = TOLERANCE | {"dx": 5e-3} if dtype is not torch.float32 else TOLERANCE
    compare(basis, found, exact(basis, g, x, theta, scale), tolerance)
    if device != "cpu":
        again = by_kernels(basis, g, x, theta, scale, dtype)
        assert all(torch.equal(a, b) for a, b in zip(found, again)), "two runs differ"


def check_sign_of_zero(version: str, device="cpu") -> None:
    """At x = 0 and x = -0, for every sign of b_1."""
    basis = make_basis("rational", degrees=(1, 2), version=version)
    x = torch.tensor([0.0, -0.0], device=device).expand(1, 1, 1, 2)
    for b in (0.0, -0.0, 0.5, -0.5):
        theta = torch.tensor([1.0, 2.0, b, 0.3], device=device).expand(1, 1, 2, 4).contiguous()
        g = torch.ones(1, 1, 1, 1, device=device)
        compare(basis, by_kernels(basis, g, x, theta, 1.0), exact(basis, g, x, theta))


def check_far_and_nan(name: str, device="cpu") -> None:
    """A wavelet is 0 far away, as are its gradients; a score that is not a number stays visible."""
    basis, g = basis_of(name, 0, 0), torch.ones(1, 1, 6, 1, device=device)
    x = torch.tensor([1e3, -1e3, 3e38, -3e38, float("inf"), float("nan")], device=device).view(1, 1, 6, 1)
    theta = torch.tensor([1.0, 0.3, 0.005], device=device).view(1, 1, 1, 3)
    z, dx, _ = by_kernels(basis, g, x, theta, 1.0)
    assert not z[..., :5, :].any() and not dx[..., :5, :].any() and z[..., 5, :].isnan().all()
    _, _, dtheta = by_kernels(basis, g[..., :5, :], x[..., :5, :].contiguous(), theta, 1.0)
    assert not dtheta.any()


def check_operators(device="cpu") -> None:
    """kan::edges with strided arguments."""
    from cuda import edges as kernel

    basis = basis_of("rational_B", 5, 4)
    x = torch.randn(13, 6, 3, device=device).permute(2, 0, 1)
    theta = theta_of(basis, 3, 5, 6, device).transpose(0, 3).contiguous().transpose(0, 3)
    g = torch.randn(3, 1, 5, device=device).expand(3, 13, 5)
    found = (
        kernel.forward(x, theta, *basis.edge_function),
        *kernel.backward(g, x, theta, *basis.edge_function),
    )
    z, dx, dtheta = exact(basis, g[None], x[None], theta)
    compare(basis, found, (z[0], dx[0], dtheta))
    for shape in ((3, 0, 6), (3, 13, 6)):
        x = torch.zeros(shape, device=device)
        empty = kernel.backward(x.new_zeros(3, shape[1], 5), x, theta, *basis.edge_function)
        assert kernel.forward(x, theta, *basis.edge_function).shape == (3, shape[1], 5)
        assert empty[0].shape == shape and not empty[1].any()


def check_attention(phi, dtype, device="cpu", B=5, h=2, M=6, N=6, r=6, d=8, images=2) -> None:
    """kan::edge_attention in chunks of images, with Q and K in one tensor, as a model has them."""
    from cuda import edges as kernel

    torch.manual_seed(0)
    basis, scale = basis_of(*phi), d**-0.5
    q, k = torch.randn(B, max(M, N), 3, h, d, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)[:2]
    q, k = q[:, :, :M], k[:, :, :N]
    theta, g = theta_of(basis, h, r, N, device, calm=True), torch.randn(B, h, M, r, device=device)
    before, kernel.CHUNK = kernel.CHUNK, 4 * h * M * N * images
    try:
        z = kernel.attention_forward(q, k, theta, scale, *basis.edge_function)
        dq, dk, dtheta = kernel.attention_backward(g, q, k, theta, scale, *basis.edge_function)
    finally:
        kernel.CHUNK = before
    half = dtype is not torch.float32
    exact_z, dx, exact_theta = exact(basis, g, q.double() @ k.double().mT, theta, scale)
    expected = dx @ k.double(), dx.mT @ q.double()
    compare(basis, (z, dq, dtheta), (exact_z, expected[0], exact_theta), TOLERANCE | {"dx": 2e-2 if half else 1e-4})
    assert error(dk, expected[1]) <= (2e-2 if half else 1e-4), "dk"
    assert dq.dtype is dk.dtype is dtype and z.dtype is torch.float32


def checks(device: str = "cpu") -> dict:
    """Functions without arguments by name."""
    from functools import partial

    found = {}
    for phi in FUNCTIONS:
        found["-".join(map(str, phi))] = partial(check_kernels, phi, SHAPES[0], device=device)
    for phi in DEGREES:
        found["degrees " + "-".join(map(str, phi))] = partial(check_kernels, phi, (2, 1, 9, 4, 3), device=device)
    for shape in SHAPES[1:]:
        found[f"shape {shape}"] = partial(check_kernels, FUNCTIONS[-1], shape, device=device)
    found["half"] = partial(check_kernels, FUNCTIONS[-1], SHAPES[0], torch.bfloat16, device)
    for version in "AB":
        found[f"sign of zero {version}"] = partial(check_sign_of_zero, version, device)
    for name in WAVELETS:
        found[f"far {name}"] = partial(check_far_and_nan, name, device)
    found["operators"] = partial(check_operators, device)
    for dtype in (torch.float32, torch.bfloat16):
        found[f"attention {dtype}"] = partial(check_attention, FUNCTIONS[-1], dtype, device)
    found["attention of other keys"] = partial(check_attention, FUNCTIONS[0], torch.float32, device, M=3, N=7)
    return found


COMPILED = [("rational_B", 5, 4), ("mexican_hat", 0, 0)]
ARCHITECTURES = (80, 90, 100, 120)


def compile_for(architecture: int, phi) -> str:
    """Compiles the kernels of the default shapes. Returns: what is wrong with them, "" if nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cuda import edges_launch as kernels

    function = kernels.Function(*phi)
    (rows, warps), (columns, backward_warps, step, registers) = kernels.FORWARD, kernels.backward_config(function)
    common = dict(r=12, R=12, FUNCTION=phi[0], m=phi[1], n=phi[2], K=function.count, OUTPUTS=kernels.OUTPUTS)
    backward = dict(common, N=197, BLOCK=columns, STEP=step, ACCUMULATE=False)
    wrong = []
    for kernel, constants, options in (
        (kernels.forward_kernel, dict(common, BLOCK=rows), dict(num_warps=warps)),
        (kernels.backward_kernel, backward, dict(num_warps=backward_warps, maxnreg=registers)),
    ):
        types = dict.fromkeys("x c z g scratch partials".split(), "*fp32") | {"scale": "fp32", "dx": "*bf16"}
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        pointers = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
        values = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=pointers)
        target = GPUTarget("cuda", architecture, 32)
        built = triton.compile(source, target=target, options={**options, **kernels.OPTIONS})
        usage = resources(built.asm["cubin"])
        if usage["STACK"] or usage["LOCAL"]:
            wrong.append(f"{kernel.__name__} spills: {usage}")
    return "; ".join(wrong)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of the kernel in a cubin."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main(task: str) -> None:
    results = {}
    if task == "interpret":
        for name, check in checks().items():
            try:
                check()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    else:
        results = {f"{phi[0]} sm_{sm}": compile_for(sm, phi) for phi in COMPILED for sm in ARCHITECTURES}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
