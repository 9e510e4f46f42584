#!/usr/bin/env bash
# A row of KArAt's tables (arXiv:2503.10632): a ViT with Kolmogorov-Arnold attention, rank 12, from scratch, 224 pixels.
#   bash run_scripts/train_karat.sh SIZE VARIANT DATASET [argument of main.py ...]
#   bash run_scripts/train_karat.sh tiny G3B CIFAR10
#   DATA_PATH=/path/to/imagenet GPUS=4 bash run_scripts/train_karat.sh small G3U IMNET
# A later argument overrides an earlier one. Useful: --compile, several times as fast; --karat-init scaled, which is not
# the published initialisation.
# SIZE        tiny, small, base
# VARIANT     G3B: Fourier functions with grid 3, an operator for each block; G3U: one for all blocks; any other grid.
#             In place of G3: rational, mexican_hat, morlet, dog, meyer, shannon. vit: the softmax baseline.
#             The operator is W Phi(A); the suffix _w1_phi2 means Phi(W A), _phi1_phi2 means Phi2(Phi1(A))
# DATASET     CIFAR10, CIFAR100, IMNET
# DATA_PATH   folder of the data; CIFAR is downloaded into it; default ./data
# GPUS        processes on this machine, default 2; they share the effective batch of 32 (CIFAR) or 128 (IMNET) images
#
# Recipe, and what is not published: karat_recipe.sh. Learning rate 5e-4 x 32 / 512, or x 128 / 512. Top-1 in %, cited:
#                         CIFAR10          CIFAR100         IMNET
#   tiny   vit            72.76            43.53            59.15
#          G3B / G3U      76.69 / 75.56    46.29 / 46.75    59.11 / 57.97
#   small  vit            81.08            53.47            70.50
#          G3B / G3U      79.78 / 79.52    54.11 / 53.86    67.77 / 67.76
#   base   vit            83.45            58.07            72.90
#          G1B / G1U      81.81 / 80.75    55.92 / 57.36    68.03 / 68.83
#   tiny, CIFAR10: G1B 75.75, G5B 75.85, G7B 75.11, G9B 74.85, G11B 74.52; rationalB 69.22, mexican_hatB 69.62,
#                  morletB 70.84, dogB 73.89, meyerB 71.13, shannonB 71.41; in the comparison of orders, G11B 75.41,
#                  G11B_w1_phi2 67.04, G11B_phi1_phi2 33.09
set -euo pipefail
die() { echo "train_karat.sh: $*" >&2; exit 2; }
[ $# -ge 3 ] || die "the first arguments must be SIZE VARIANT DATASET, such as tiny G3B CIFAR10"
SIZE=$1 VARIANT=$2 DATASET=$3 GPUS=${GPUS:-2} BATCH=32
[[ $SIZE =~ ^(tiny|small|base)$ ]] || die "SIZE must be tiny, small or base, not $SIZE"
[[ $DATASET =~ ^(CIFAR10|CIFAR100|IMNET)$ ]] || die "DATASET must be CIFAR10, CIFAR100 or IMNET, not $DATASET"
if [ "$DATASET" = IMNET ]; then
    BATCH=128
    [ -d "${DATA_PATH:-}" ] || die "set DATA_PATH to the folder that holds ImageNet's train/ and val/"
fi
if ! [[ $GPUS =~ ^[1-9][0-9]*$ ]] || ((BATCH % GPUS)); then
    die "GPUS must divide the effective batch of $BATCH images, and $GPUS does not"
fi
MODEL=vit_${SIZE}_patch16_224
if [ "$VARIANT" = vit ]; then
    OPERATOR=()
elif [[ $VARIANT =~ ^(G([1-9][0-9]*)|rational|mexican_hat|morlet|dog|meyer|shannon)([BU])(_(w1|phi1)_phi2)?$ ]]; then
    MODEL+=_karat
    case ${BASH_REMATCH[1]} in
        G*) OPERATOR=(--basis-type FourierBasis --grid "${BASH_REMATCH[2]}") ;;
        rational) OPERATOR=(--basis-type RationalBasis --rational-order 5 4) ;;
        *) OPERATOR=(--basis-type WaveletBasis --wavelet-type "${BASH_REMATCH[1]}") ;;
    esac
    if [ "${BASH_REMATCH[3]}" = U ]; then OPERATOR+=(--universal); else OPERATOR+=(--blockwise); fi
    case ${BASH_REMATCH[4]} in
        _phi1_phi2) OPERATOR+=(--depth 2) ;;
        _w1_phi2) OPERATOR+=(--modular-attn --modular-mode w1_phi2) ;;
        *) OPERATOR+=(--modular-attn --modular-mode phi1_w2) ;;
    esac
    OPERATOR+=(--base-fn ZeroModule --hidden-dim 12)
else
    die "VARIANT must be like G3B, G3U, rationalB, dogB, G3B_phi1_phi2 or vit, not $VARIANT"
fi
# shellcheck source=run_scripts/karat_recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/karat_recipe.sh"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../dist_train.sh" "$GPUS" \
    --data-set "$DATASET" \
    --data-path "${DATA_PATH:-./data}" \
    --model "$MODEL" "${OPERATOR[@]}" \
    --batch-size $((BATCH / GPUS)) \
    "${RECIPE[@]}" \
    --output-dir "output/${MODEL}_${VARIANT}_$DATASET" \
    "${@:4}"
