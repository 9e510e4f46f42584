#!/usr/bin/env bash
# Measurements of Kolmogorov-Arnold attention on one GPU. Rows and logs go to OUT, further arguments to main.py.
#   bash benchmarks/karat.sh step OUT [...]              memory and time of a training step beside the softmax, eager and
#       compiled: tiny (G3) with every basis and small (G3) at batch 256, base (G1) at batch 128
#   bash benchmarks/karat.sh first OUT DATA SIZE [...]   losses and gradient norms of the first 300 steps, batch 128,
#       30 warm-up steps to 1.25e-4: softmax, and operators of SIZE tiny (G3B), small (G3B) or base (G1B), with options
#       that may stabilise them
#   bash benchmarks/karat.sh resolution OUT DATA [...]   tiny, trained at 224 pixels, evaluated at 160, 224 and 288
#       with each interpolation; 2 minutes with --compile
# DATA holds train/ and val/ (or validation/), such as CIFAR-10 as JPEG files; `first` takes 38,400 images.
# Environment: ONLY (names of the runs of `first`; default: all), MODEL (default: vit_SIZE_patch16_224_karat), PIXELS
# (default: 224), PYTHON.
set -euo pipefail
usage() { sed -n '3,9p' "${BASH_SOURCE[0]}" | cut -c5- >&2; exit 2; }
PART=${1:-} OUT=${2:-} DATA=${3:-} SIZE=${4:-} PIXELS=${PIXELS:-224}
case $PART in
    step) [ $# -ge 2 ] ;;
    first) [ $# -ge 4 ] && [[ $SIZE =~ ^(tiny|small|base)$ ]] ;;
    resolution) [ $# -ge 3 ] ;;
    *) false ;;
esac || usage
PYTHON=${PYTHON:-python}
ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$OUT"
LIGHT=(--data-set IMNET --data-path "$DATA" --check-images off
    --no-repeated-aug --aa none --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --drop-path 0
    --clip-grad 1 --unscale-lr --sched-on-updates --min-lr 1e-6)

first() {  # arguments of main.py
    local name flags model grid=3 karat=${MODEL:-vit_${SIZE}_patch16_224_karat}
    [ "$SIZE" != base ] || grid=1
    while read -r name flags; do
        [[ " ${ONLY:-$name} " = *" $name "* ]] || continue
        model=$karat
        [ "$name" != softmax ] || model=${karat%_karat}
        # shellcheck disable=SC2086  # the flags are words
        "$PYTHON" "$ROOT/main.py" --model "$model" $flags "${LIGHT[@]}" --input-size "$PIXELS" \
            --train-subset 38400 --val-subset 1000 --batch-size 128 --epochs 1 --lr 1.25e-4 --warmup-epochs 0.1 \
            --no-model-ema --log-grad-norms --print-freq 10 "$@" 2>&1 </dev/null |
            tee "$OUT/${SIZE}_G${grid}B_$name.txt"
    done <<EOF
softmax
published --grid $grid
scaled --grid $grid --karat-init scaled
published_sqrt --grid $grid --output-scale sqrt
published_learned --grid $grid --output-scale learned
published_tenth --grid $grid --karat-init-scale 0.1
published_late --grid $grid --karat-blocks 6-11
EOF
}

resolution() {  # arguments of main.py
    local pixels mode
    "$PYTHON" "$ROOT/main.py" --model "${MODEL:-vit_tiny_patch16_224_karat}" --karat-init scaled "${LIGHT[@]}" \
        --input-size "$PIXELS" --batch-size 128 --epochs 8 --lr 3e-4 --warmup-epochs 1 \
        --output-dir "$OUT/resolution" "$@"
    for pixels in $((PIXELS * 5 / 7)) "$PIXELS" $((PIXELS * 9 / 7)); do
        for mode in bicubic bilinear nearest; do
            if [ "$pixels" = "$PIXELS" ] && [ $mode != bicubic ]; then continue; fi  # nothing is resampled
            echo "evaluated at $pixels pixels, $mode"
            "$PYTHON" "$ROOT/main.py" --eval --resume "$OUT/resolution/checkpoint.pth" \
                --input-size "$pixels" --karat-resample "$mode"
        done
    done
}

step() {  # arguments of train_step.py
    local compile size karat models batch
    for compile in "" --compile; do
        for size in tiny small base; do
            karat=vit_${size}_patch16_224_karat
            case $size in
                tiny) models=("$karat" "$karat",universal=True kat_tiny_patch16_224_karat
                    "$karat",basis_type={Spline,Chebyshev,Radial,Wavelet,Rational}Basis) batch=256 ;;
                small) models=("$karat" "$karat",universal=True) batch=256 ;;
                base) models=("$karat",grid=1 "$karat",grid=1,universal=True) batch=128 ;;
            esac
            "$PYTHON" "$ROOT/benchmarks/train_step.py" --batch-size $batch $compile --out "$OUT/train_step.jsonl" "$@" \
                "${karat%_karat}" "${models[@]}"
        done
    done
}

case $PART in
    step) step "${@:3}" ;;
    first) first "${@:5}" ;;
    resolution) resolution "${@:4}" 2>&1 | tee "$OUT/resolution.txt" ;;
esac
