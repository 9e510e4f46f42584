"""Time and peak memory of a training step or of inference, several models side by side.

    python benchmarks/train_step.py vit_tiny_patch16_224 kat_tiny_patch16_224 --batch-size 256 --compile [--inference] [--out rows.jsonl]
    python benchmarks/train_step.py vit_tiny_patch16_224 vit_tiny_patch16_224_karat,universal=True,grid=5 --batch-size 32
The first model is what the others are compared with. Options of a model follow its name.
"""

import argparse

import common
import timm
import torch
import torch.nn.functional as F
from timm.utils import ParseKwargs

import models  # noqa: F401
from kan_basis.rational import KERNELS, use_kernel


def build(model: str, input_size: int) -> torch.nn.Module:
    """The model of "NAME,KEY=VALUE,..."; values as --model-kwargs of main.py takes them."""
    name, *pairs = model.split(",")
    given = argparse.Namespace()
    ParseKwargs([], "kwargs")(None, given, pairs)
    return timm.create_model(name, img_size=input_size, **given.kwargs)


def measure(name: str, options: argparse.Namespace) -> dict:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = build(name, options.input_size).cuda().train(not options.inference)
    images = torch.randn(options.batch_size, 3, options.input_size, options.input_size, device="cuda")
    targets = torch.randint(model.num_classes, (options.batch_size,), device="cuda")
    forward = torch.compile(model, mode=options.compile_mode) if options.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
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
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() / 2**20
    median, low, high = common.times(step, options.milliseconds)
    row = {
        "model": name,
        "mode": "inference" if options.inference else "training",
        "compiled": options.compile and options.compile_mode,
        "batch": options.batch_size,
        "amp": options.amp,
        "kernel": options.kernel,
        "ms": median,
        "ms 20 %": low,
        "ms 80 %": high,
        "images/s": options.batch_size / median * 1e3,
    }
    if not options.compile or options.compile_mode == "default":  # a CUDA graph allocates nothing when it is replayed
        row["peak MiB"] = peak
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL[,KEY=VALUE...]",
        help="timm names, ours among them, with options of the model",
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
    parser.add_argument("--kernel", default="auto", choices=KERNELS, help="what computes the rational functions")
    parser.add_argument("--milliseconds", type=int, default=1500, help="time to measure for")
    parser.add_argument("--out", help="file to append rows to")
    options = parser.parse_args()
    use_kernel(options.kernel)
    rows = [measure(name, options) for name in options.models]
    for row in rows:
        row |= {
            f"{what} ratio": row[key] / rows[0][key]
            for what, key in (("time", "ms"), ("memory", "peak MiB"))
            if key in row
        }
    common.report(rows, options.out)


if __name__ == "__main__":
    main()
