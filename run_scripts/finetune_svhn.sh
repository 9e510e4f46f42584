#!/usr/bin/env bash
# Fine-tunes on SVHN at 224 pixels, global batch 2 x 16 = 32, learning rate 5e-4 x 32 / 512 (recipe and variables: finetune.sh).
# Comparable rows, top-1 in %, cited from arXiv:2503.10632 (ViT; KArAt blockwise / universal, T and S with G = 3, B with G = 1):
#   T 96.69; 96.37 / 96.39    S 97.48; 97.04 / 97.11    B 97.74; 96.83 / 97.21
# Without flips: mirrored digits are no digits.
#   CHECKPOINT=weights.pth MODEL=kat_tiny_patch16_224 bash run_scripts/finetune_svhn.sh [argument of main.py ...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/finetune.sh" SVHN --hflip 0 "$@"
