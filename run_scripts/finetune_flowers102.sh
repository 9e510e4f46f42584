#!/usr/bin/env bash
# Fine-tunes on Flowers102 at 224 pixels: global batch 2 x 16 = 32, learning rate 5e-4 x 32 / 512 (see finetune.sh).
# Comparable rows, top-1 in %, cited from arXiv:2503.10632: ViT; KArAt blockwise / universal, grid 3 (T, S) or 1 (B):
#   T 84.21; 83.67 / 83.70    S 91.46; 89.67 / 90.08    B 92.24; 89.66 / 89.43
# 100 epochs of 2,040 images are about 6,000 updates, in which an average with decay .99992 moves by less than half of
# the way: look at the raw weights, which are evaluated as well.
#   CHECKPOINT=weights.pth MODEL=kat_tiny_patch16_224 bash run_scripts/finetune_flowers102.sh [argument of main.py ...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/finetune.sh" Flowers102 "$@"
