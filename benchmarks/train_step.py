"""Time and peak memory of a training step or of inference, several models side by side.

    python benchmarks/train_step.py vit_tiny_patch16_224 kat_tiny_patch16_224 --compile [--inference] [--out rows.jsonl]
    python benchmarks/train_step.py vit_tiny_patch16_224 vit_tiny_patch16_224_karat,universal=True,grid=5
The others are compared with the first model. The options of a model follow its name.

peak MiB: what tensors take at most during a step. The replay of a CUDA graph allocates no tensors, and there is no such
number. reserved MiB: what torch holds on the GPU at most during a step, after unused memory was given back. It contains
the pools of CUDA graphs and what fragmentation and the sizes of segments add, but not what compilation took.
"""

import argparse
import gc

import timm
import torch
import torch.nn.functional as F
from timm.utils import ParseKwargs

import common
import models  # noqa: F401
from kan_basis.kernels import KERNELS, use_kernel


def measure(model: str, options: argparse.Namespace) -> dict:
    """The row of the model "NAME,KEY=VALUE,..."; values as --model-kwargs of main.py takes them."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()  # by what an earlier model left
    torch.manual_seed(0)
    name, *pairs = model.split(",")
    given = argparse.Namespace()
    ParseKwargs([], "kwargs")(None, given, pairs)
    network = timm.create_model(name, img_size=options.input_size, **given.kwargs).cuda().train(not options.inference)
    images = torch.randn(options.batch_size, 3, options.input_size, options.input_size, device="cuda")
    targets = torch.randint(network.num_classes, (options.batch_size,), device="cuda")
    forward = torch.compile(network, mode=options.compile_mode) if options.compile else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.amp)

    def step() -> None:
        with torch.set_grad_enabled(not options.inference), torch.autocast("cuda", dtype, enabled=dtype is not None):
            output = forward(images)
            loss = F.cross_entropy(output, targets)
        if not options.inference:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved() - held
    times = common.times(step, options.milliseconds)
    row = {
        "model": model,
        "mode": "inference" if options.inference else "training",
        "compiled": options.compile and options.compile_mode,
        "batch": options.batch_size,
        "amp": options.amp,
        "kernel": options.kernel,
        **times,
        "images/s": options.batch_size / times["ms"] * 1e3,
        "reserved MiB": reserved / 2**20,
    }
    if not options.compile or options.compile_mode == "default":
        row["peak MiB"] = peak / 2**20
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL[,KEY=VALUE...]",
        help="names of models in timm's registry, with their options",
    )
    parser.add_argument("--batch-size", type=int, default=256, help="images")
    parser.add_argument("--input-size", type=int, default=224, help="pixels")
    parser.add_argument("--amp", default="bf16", choices=["bf16", "fp16", "off"], help="precision")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument(
        "--compile-mode",
        default="reduce-overhead",
        choices=["default", "reduce-overhead", "max-autotune"],
        help="mode of --compile; the default is that of main.py on a GPU",
    )
    parser.add_argument("--inference", action="store_true", help="forward pass only")
    parser.add_argument(
        "--kernel", default="auto", choices=KERNELS, help="what computes functions on a GPU that have kernels"
    )
    parser.add_argument("--milliseconds", type=int, default=1500, help="time to measure for")
    parser.add_argument("--out", help="file to append rows to")
    options = parser.parse_args()
    use_kernel(options.kernel)
    rows = [measure(name, options) for name in options.models]
    for row in rows:
        for ratio, key in (("time ratio", "ms"), ("memory ratio", "peak MiB"), ("reserved ratio", "reserved MiB")):
            if key in row:
                row[ratio] = row[key] / rows[0][key]
    common.report(rows, options.out)


if __name__ == "__main__":
    main()
