#!/usr/bin/env bash
# Trains a small KAT on the embedded digits, evaluates its best checkpoint and says where the results are. No GPU needed.
#   bash run_scripts/quickstart.sh                                  results in output/quickstart
#   OUT=output/other bash run_scripts/quickstart.sh --epochs 50     any argument of main.py; OUT is relative to the repository
set -euo pipefail
# shellcheck source=run_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
OUT=${OUT:-output/quickstart}
TRAIN=(
    --model kat_micro_patch8_32 --data-set DIGITS --input-size 32  # 4 blocks, 16 tokens
    --epochs 40 --batch-size 50 --lr 3e-3 --unscale-lr --warmup-epochs 2 --sched-on-updates
    # DeiT's augmentation is meant for 1.3 million photos, not for 1,500 digits
    --no-aug --no-repeated-aug --mixup 0.2 --cutmix 0 --drop-path 0 --num-workers 0
)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # tensors this small take two threads half as long again as one

"$PYTHON" main.py "${TRAIN[@]}" --output-dir "$OUT" "$@"
echo
"$PYTHON" main.py --eval --resume "$OUT/best_checkpoint.pth"  # the last line is the top-1
echo "checkpoint: $OUT/best_checkpoint.pth"
echo "log: $OUT/log.txt"
echo "curves: $OUT/curves.png"
