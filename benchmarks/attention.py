"""Time and memory of Kolmogorov-Arnold attention beside softmax attention, forward, and forward and backward.

    python benchmarks/attention.py [--shapes 128x3x197 64x3x1025] [--dtype bf16] [--out rows.jsonl]
"SDPA" is torch's scaled_dot_product_attention with the backend of its choice, "FlashAttention" with FlashAttention, or
memory-efficient attention for fp32. "kernels" and, with --plain, "plain" are
kan_basis.fourier_attention with the kernels and in plain PyTorch.
ms: replay of a CUDA graph of the call, which is GPU time without gaps of the host; eager ms: the call itself.
MiB: what the eager call allocates at most, with its results. Ratios are to SDPA in the same pass. Wrong kernels are an
error.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
from kan_basis import fourier_attention
from kan_basis.kernels import use_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Largest relative errors of the output and of a gradient.
BOUNDS = {torch.bfloat16: (5e-3, 1e-2), torch.float16: (5e-3, 1e-2), torch.float32: (2e-5, 1e-4)}
NAMES = ("out", "dq", "dk", "dv", "dcoefficients", "dprojector")


def inputs(shape: tuple[int, int, int], options: argparse.Namespace) -> tuple[list[Tensor], Tensor]:
    """q, k and v as views of one (B, N, 3, h, d) tensor, as in a model, coefficients and projector; and a gradient."""
    torch.manual_seed(0)
    (B, h, N), d, dtype = shape, options.head_dim, DTYPES[options.dtype]
    qkv = torch.randn(B, N, 3, h, d, device="cuda", dtype=dtype)
    coefficients = torch.randn(h, options.rank, N, 2 * options.grid, device="cuda")
    projector = torch.randn(h, N, options.rank, device="cuda") * N**-0.5
    tensors = [*qkv.permute(2, 0, 3, 1, 4), coefficients, projector]
    grad = torch.randn(B, N, h, d, device="cuda", dtype=dtype).transpose(1, 2)
    return [t.detach().requires_grad_() for t in tensors], grad


def kolmogorov_arnold(kernel: str, *tensors: Tensor) -> Tensor:
    use_kernel(kernel)
    return fourier_attention(*tensors)


def flash(query: Tensor, key: Tensor, value: Tensor, *_) -> Tensor:
    # FlashAttention takes no float32.
    half = query.dtype is not torch.float32
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if half else SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value)


def softmax(query: Tensor, key: Tensor, value: Tensor, *_) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def gradients(function: Callable, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of the tensors that the function uses."""
    out = function(*tensors)
    found = torch.autograd.grad(out, tensors, grad, allow_unused=True)
    return out, *(t for t in found if t is not None)


def errors(tensors: list[Tensor], grad: Tensor) -> dict[str, float]:
    """Relative errors against the definition in float64.

    Raises: AssertionError if the kernels are wrong or do not repeat to the bit.
    """
    exact = gradients(
        partial(kolmogorov_arnold, "torch"), [t.detach().double().requires_grad_() for t in tensors], grad.double()
    )
    found, again = (gradients(partial(kolmogorov_arnold, "cuda"), tensors, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again)), "two runs differ"
    result = {f"error {n}": ((f - e).norm() / e.norm()).item() for n, f, e in zip(NAMES, found, exact)}
    of_output, of_gradient = BOUNDS[tensors[0].dtype]
    assert all(e <= (of_output if name == "error out" else of_gradient) for name, e in result.items()), result
    return result


def graphed(run: Callable) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the call, captured after kernels are compiled and workspaces exist."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def peak(run: Callable) -> float:
    """MiB that the call allocates at most beyond what there was before."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(shape: tuple[int, int, int], options: argparse.Namespace) -> list[dict]:
    tensors, grad = inputs(shape, options)
    exactness, rows = errors(tensors, grad), []
    functions = {"SDPA": softmax, "FlashAttention": flash, "kernels": partial(kolmogorov_arnold, "cuda")}
    if options.plain:
        functions["plain"] = partial(kolmogorov_arnold, "torch")
    for backward in (False, True):
        for name, function in functions.items():
            leaves = tensors[:3] if function in (softmax, flash) else tensors

            def run(function=function, leaves=leaves, backward=backward):
                if backward:
                    return gradients(function, leaves, grad)
                with torch.no_grad():
                    return function(*leaves)

            memory, eager, graph = peak(run), common.times(run, options.milliseconds)["ms"], graphed(run)
            rows.append(
                {
                    "attention": name,
                    "pass": "forward + backward" if backward else "forward",
                    "batch x heads x tokens": "x".join(map(str, shape)),
                    "d": options.head_dim,
                    "G": options.grid,
                    "r": options.rank,
                    "dtype": options.dtype,
                    **common.times(graph.replay, options.milliseconds),
                    "eager ms": eager,
                    "MiB": memory,
                }
            )
            del graph
            first = rows[len(functions) * backward]
            for ratio, key in (("time ratio", "ms"), ("eager ratio", "eager ms"), ("memory ratio", "MiB")):
                rows[-1][ratio] = rows[-1][key] / first[key]
            rows[-1] |= exactness if name == "kernels" and backward else {}
    return rows


def shape_of(text: str) -> tuple[int, int, int]:
    B, h, N = map(int, text.split("x"))
    return B, h, N


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape_of,
        default=[(128, 3, 197), (256, 6, 197), (128, 12, 197), (64, 3, 1025)],
        metavar="BxHxN",
        help="batch, heads and tokens",
    )
    parser.add_argument("--head-dim", type=int, default=64, help="channels of a head")
    parser.add_argument("--grid", type=int, default=3, help="frequencies G of the Fourier series")
    parser.add_argument("--rank", type=int, default=12, help="rank r of the operator")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="precision of q, k and v")
    parser.add_argument("--plain", action="store_true", help="also the definition in plain PyTorch, which is slow")
    parser.add_argument("--milliseconds", type=int, default=300, help="time to measure each row for")
    parser.add_argument("--out", help="file to append rows to")
    options = parser.parse_args()
    common.report([row for shape in options.shapes for row in measure(shape, options)], options.out)


if __name__ == "__main__":
    main()
