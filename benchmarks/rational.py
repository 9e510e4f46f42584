"""Times of the rational function and of GELU, forward and backward, as shares of the copy bandwidth of the same run.

    python benchmarks/rational.py [--out rows.jsonl]
A share is (bytes that must be read and written once) / time / (copy bandwidth). Wrong kernels are an error.
"""

import argparse

import torch
import torch.nn.functional as F

import common
from kan_basis import rational
from kan_basis.group_rational import preset_coefficients
from kan_basis.kernels import use_kernel

SHAPES = ((1024, 197, 768), (256, 197, 3072), (256, 197, 768), (1024, 197, 192))


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    a, b = (torch.tensor([values], device="cuda") for values in preset_coefficients("swish", (5, 4)))
    a, b = a + 0.01 * torch.randn(1, 6, device="cuda"), b + 0.01 * torch.randn(8, 4, device="cuda")
    return torch.randn(shape, device="cuda", dtype=dtype), a, b, torch.randn(shape, device="cuda", dtype=dtype)


def gradients(x, a, b, g, kernel="cuda"):
    use_kernel(kernel)
    x, a, b = (t.detach().requires_grad_() for t in (x, a, b))
    return torch.autograd.grad(rational(x, a, b), (x, a, b), g)


def errors(dtype: torch.dtype) -> dict[str, float]:
    """Relative errors against the definition in float64, [64, 197, 768].

    Raises: AssertionError if the kernels are wrong or do not repeat to the bit.
    """
    x, a, b, g = inputs((64, 197, 768), dtype)
    exact = gradients(*(t.double() for t in (x, a, b, g)), kernel="torch")
    found, again = gradients(x, a, b, g), gradients(x, a, b, g)
    assert all(torch.equal(p, q) for p, q in zip(found, again)), "two runs differ"
    bounds = {"error dx": 4 * torch.finfo(dtype).eps, "error da": 2e-6, "error db": 2e-6}
    result = {name: ((p.double() - q).norm() / q.norm()).item() for name, p, q in zip(bounds, found, exact)}
    assert all(result[name] < bound for name, bound in bounds.items()), result
    return result


def measure(shape: tuple[int, ...], dtype: torch.dtype, bandwidth: float, exactness: dict[str, float]) -> list[dict]:
    x, a, b, g = inputs(shape, dtype)
    live = x.detach().requires_grad_()
    y = F.gelu(live)
    operations = {  # passes over a tensor of the size of x, and the call
        "rational forward": (2, lambda: torch.ops.kan.rational(x, a, b, 2)),
        "rational backward": (3, lambda: torch.ops.kan.rational_backward(g, x, a, b, 2)),
        "GELU forward": (2, lambda: F.gelu(x)),
        "GELU backward": (3, lambda: torch.autograd.grad(y, live, g, retain_graph=True)),
    }
    rows = []
    for name, (passes, run) in operations.items():
        times = common.times(run)
        rows.append(
            {
                "operation": name,
                "shape": "x".join(map(str, shape)),
                "dtype": str(dtype)[6:],
                **times,
                "share": passes * x.numel() * x.element_size() / times["ms"] / 1e6 / bandwidth,
                "copy GB/s": bandwidth,
                **(exactness if name == "rational backward" else {}),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="file to append rows to")
    options = parser.parse_args()
    use_kernel("cuda")
    bandwidth, rows = common.copy_bandwidth(), []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        exactness = errors(dtype)
        for shape in SHAPES:
            rows += measure(shape, dtype, bandwidth, exactness)
    common.report(rows, options.out)


if __name__ == "__main__":
    main()
