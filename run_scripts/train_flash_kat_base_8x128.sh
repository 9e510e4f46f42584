#!/usr/bin/env bash
# FlashKAT-B (arXiv:2505.13813) on ImageNet-1K, from scratch. It is KAT-B's function; the figure cited is KAT-B's,
# 82.3 % top-1 (arXiv:2409.10594).
# Effective batch 8 x 128 = 1024. The learning rate 1e-3 is not scaled, because the data folder comes first.
#   DATA_PATH=/path/to/imagenet bash run_scripts/train_flash_kat_base_8x128.sh [argument of main.py ...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_kat.sh" flash_kat_base_swish_patch16_224 --drop-path 0.4 \
    --model-kwargs m=6 n=4 num_groups=1 den_groups=8 "$@"
