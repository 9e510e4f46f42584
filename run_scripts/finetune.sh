#!/usr/bin/env bash
# Fine-tunes a model from a checkpoint on a small data set at 224 pixels, called by finetune_{svhn,flowers102,stl10}.sh:
#   finetune.sh DATA_SET [argument of main.py ...]      a later argument overrides an earlier one
# MODEL       default kat_tiny_patch16_224
# CHECKPOINT  file, URL or hf_hub:name to start from; for kat_{tiny,small,base}_patch16_224 the default is the published weights
# DATA_PATH   folder of the data, which are downloaded into it; default ./data
# GPUS        processes on this machine, default 2. The global batch stays 32: each takes 32 / GPUS images
#
# KArAt (arXiv:2503.10632) gives accuracies but no schedule for fine-tuning, so this is its training recipe: learning rate
# 5e-4 x 32 / 512, 100 epochs. What that leaves open (drop path, repeated augmentation, ...) is the default of main.py.
set -euo pipefail
DATA_SET=${1:?finetune.sh: the first argument must be a data set, such as STL10}
MODEL=${MODEL:-kat_tiny_patch16_224}
GPUS=${GPUS:-2}
if [[ $MODEL =~ ^kat_(tiny|small|base)_patch16_224$ ]]; then
    CHECKPOINT=${CHECKPOINT:-hf_hub:adamdad/$MODEL}
fi
if [ ! "${CHECKPOINT:-}" ]; then
    echo "finetune.sh: set CHECKPOINT to the weights that $MODEL starts from: a file, a URL or hf_hub:name" >&2
    exit 2
fi
if ! [[ $GPUS =~ ^[1-9][0-9]*$ ]] || ((32 % GPUS)); then
    echo "finetune.sh: GPUS must divide the global batch of 32 images, and $GPUS does not" >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/../dist_train.sh" "$GPUS" \
    --data-set "$DATA_SET" \
    --data-path "${DATA_PATH:-./data}" \
    --model "$MODEL" \
    --finetune "$CHECKPOINT" \
    --input-size 224 \
    --batch-size $((32 / GPUS)) \
    --opt adamw --opt-eps 1e-6 \
    --weight-decay 0.05 \
    --clip-grad 1.0 \
    --epochs 100 \
    --sched cosine --lr 5e-4 --warmup-epochs 5 --warmup-lr 1e-6 --min-lr 1e-5 \
    --model-ema-decay 0.99992 \
    --color-jitter 0.4 \
    --aa rand-m15-n2-mstd1.0-inc1 \
    --mixup 0.8 --cutmix 1.0 \
    --smoothing 0.1 \
    --eval-crop-ratio 0.9 \
    --output-dir "output/${MODEL}_$DATA_SET" \
    "${@:2}"
