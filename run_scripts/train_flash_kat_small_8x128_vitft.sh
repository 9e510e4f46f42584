#!/usr/bin/env bash
# FlashKAT-S on ImageNet-1K, started from a ViT. FlashKAT (arXiv:2505.13813) published no such row: the figure cited is
# KAT-S's, 82.0 % top-1 (arXiv:2409.10594).
# Effective batch 8 x 128 = 1024. The learning rate 1e-3 is not scaled, because the data folder comes first.
# The weights of the ViT (AugReg) are downloaded, unless CHECKPOINT names a file.
#   DATA_PATH=/path/to/imagenet bash run_scripts/train_flash_kat_small_8x128_vitft.sh [argument of main.py ...]
set -euo pipefail
AUGREG=https://storage.googleapis.com/vit_models/augreg
AUGREG+=/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_kat.sh" flash_kat_small_swish_patch16_224 --drop-path 0.1 \
    --model-kwargs m=6 n=4 num_groups=1 den_groups=8 \
    --initial-checkpoint "${CHECKPOINT:-$AUGREG}" --output output/flash_kat_small_swish_patch16_224_vitft "$@"
