#!/usr/bin/env bash
# Fine-tunes on SVHN at 224 pixels: global batch 2 x 16 = 32, learning rate 5e-4 x 32 / 512 (see finetune.sh).
# Comparable rows, top-1 in %, cited from arXiv:2503.10632: ViT; KArAt blockwise / universal, grid 3 (T, S) or 1 (B):
#   T 96.69; 96.37 / 96.39    S 97.48; 97.04 / 97.11    B 97.74; 96.83 / 97.21
# There are no flips, because mirrored digits are no digits.
#   CHECKPOINT=weights.pth MODEL=kat_tiny_patch16_224 bash run_scripts/finetune_svhn.sh [argument of main.py ...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/finetune.sh" SVHN --hflip 0 "$@"
