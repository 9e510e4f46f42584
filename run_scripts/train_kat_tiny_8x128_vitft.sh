#!/usr/bin/env bash
# KAT-T on ImageNet-1K, started from a ViT: 75.7 % top-1 (cited from arXiv:2409.10594).
# Effective batch 8 x 128 = 1024. The learning rate 1e-3 is not scaled, because the data folder comes first.
# The weights of the ViT (AugReg) are downloaded, unless CHECKPOINT names a file.
#   DATA_PATH=/path/to/imagenet bash run_scripts/train_kat_tiny_8x128_vitft.sh [argument of main.py ...]
set -euo pipefail
AUGREG=https://storage.googleapis.com/vit_models/augreg
AUGREG+=/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224.npz
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_kat.sh" kat_tiny_swish_patch16_224 --drop-path 0.1 \
    --initial-checkpoint "${CHECKPOINT:-$AUGREG}" --output output/kat_tiny_swish_patch16_224_vitft "$@"
