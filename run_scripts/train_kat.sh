#!/usr/bin/env bash
# KAT's published ImageNet-1K recipe (arXiv:2409.10594); train_kat_*.sh and train_flash_kat_*.sh call it:
#   train_kat.sh MODEL [argument of main.py ...]      a later argument overrides an earlier one
# DATA_PATH   folder that holds train/ and val/
# GPUS        processes on this machine, default 8. The effective batch is always 1024: each takes 1024 / GPUS images.
#             If these do not fit into memory, accumulate gradients: GPUS=2 ... -b 128 --grad-accum-steps 4
#
# The published runs used timm's trainer, which differs: its seed is 42 (here 0); its mixed precision is float16 (here
# bfloat16 where the GPU supports it); it mixes uint8 images while it collates a batch, before normalisation and random
# erasing (here, as in DeiT, images are normalised and erased first, then mixed).
set -euo pipefail
MODEL=${1:?train_kat.sh: the first argument must be a model}
DATA_PATH=${DATA_PATH:-/path/to/imagenet}
GPUS=${GPUS:-8}
if [ ! -d "$DATA_PATH" ]; then
    echo "train_kat.sh: no folder $DATA_PATH: set DATA_PATH to the folder that holds ImageNet's train/ and val/" >&2
    exit 2
fi
if ! [[ $GPUS =~ ^[1-9][0-9]*$ ]] || ((1024 % GPUS)); then
    echo "train_kat.sh: GPUS must divide the effective batch of 1024 images, and $GPUS does not" >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/../dist_train.sh" "$GPUS" "$DATA_PATH" \
    --model "$MODEL" \
    -b $((1024 / GPUS)) \
    --opt adamw \
    --lr 1e-3 \
    --weight-decay 0.05 \
    --epochs 300 \
    --mixup 0.8 \
    --cutmix 1.0 \
    --sched cosine \
    --smoothing 0.1 \
    --aa rand-m9-mstd0.5 \
    --remode pixel --reprob 0.25 \
    --amp \
    --crop-pct 0.875 \
    --mean 0.485 0.456 0.406 \
    --std 0.229 0.224 0.225 \
    --model-ema \
    --model-ema-decay 0.9999 \
    --output "output/$MODEL" \
    "${@:2}"
