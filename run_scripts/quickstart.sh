#!/usr/bin/env bash
# Trains a small KAT on scikit-learn's digits, on CPU or GPU, evaluates its best checkpoint and lists the results.
#   bash run_scripts/quickstart.sh                                results in output/quickstart
#   OUT=output/other bash run_scripts/quickstart.sh --epochs 50   OUT: another folder; arguments go to main.py
set -euo pipefail
# shellcheck source=run_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
OUT=${OUT:-output/quickstart}
TRAIN=(
    --model kat_micro_patch8_32 --data-set DIGITS --input-size 32  # 4 blocks, 16 tokens
    --epochs 40 --batch-size 50 --lr 3e-3 --unscale-lr --warmup-epochs 2 --sched-on-updates
    # DeiT's augmentation is meant for 1.3 million photographs, not for 1,500 digits.
    --no-aug --no-repeated-aug --mixup 0.2 --cutmix 0 --drop-path 0 --num-workers 0
)
# With two threads, tensors of this size take half as long again as with one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

"$PYTHON" main.py "${TRAIN[@]}" --output-dir "$OUT" "$@"
echo
"$PYTHON" main.py --eval --resume "$OUT/best_checkpoint.pth"  # prints the top-1 in its last line
echo "checkpoint: $OUT/best_checkpoint.pth"
echo "log: $OUT/log.txt"
echo "curves: $OUT/curves.png"
