"""Micro models with learned functions that several tests share."""

from torch import nn

from arguments import parse
from model_factory import build_model

NAME = "vit_micro_patch8_32_karat"
BASE = ["--model", NAME, "--input-size", "32", "--device", "cpu"]
TRAIN = [*BASE, *"--num-workers 0 --batch-size 20 --train-subset 40 --val-subset 20 --warmup-epochs 0".split()]
TRAIN += ["--model-kwargs", "depth=2", "embed_dim=32"]


def built(command: str, model: str = NAME) -> nn.Module:
    """The model of a command line, with 10 outputs."""
    return build_model(parse(["--model", model, "--input-size", "32", *command.split()]).args, 10)


def operators(model: nn.Module) -> list[nn.Module | None]:
    """The operator of each block."""
    return [block.attn.shared[0] if block.attn.shared else block.attn.operator for block in model.blocks]


def first(model: nn.Module) -> nn.Module:
    """The operator of the first block."""
    return operators(model)[0]
