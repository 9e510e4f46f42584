#!/usr/bin/env bash
# Fine-tunes on STL10 at 224 pixels: global batch 2 x 16 = 32, learning rate 5e-4 x 32 / 512 (see finetune.sh).
# Comparable rows, top-1 in %, cited from arXiv:2503.10632: ViT; KArAt blockwise / universal, grid 3 (T, S) or 1 (B):
#   T 93.20; 93.09 / 92.93    S 96.09; 95.26 / 95.45    B 97.26; 95.30 / 95.78
#   CHECKPOINT=weights.pth MODEL=kat_tiny_patch16_224 bash run_scripts/finetune_stl10.sh [argument of main.py ...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/finetune.sh" STL10 "$@"
