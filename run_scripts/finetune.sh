#!/usr/bin/env bash
# Fine-tunes a model from a checkpoint on a small data set at 224 pixels; finetune_{svhn,flowers102,stl10}.sh call it:
#   finetune.sh DATA_SET [argument of main.py ...]      a later argument overrides an earlier one
# MODEL       default kat_tiny_patch16_224
# CHECKPOINT  initial weights: file, URL or hf_hub:name; default for kat_{tiny,small,base}_patch16_224: published
# DATA_PATH   folder of the data, which are downloaded into it; default ./data
# GPUS        processes on this machine, default 2. The global batch is always 32: each process takes 32 / GPUS images
#
# KArAt (arXiv:2503.10632) publishes accuracies but no schedule for fine-tuning, so this is its training recipe
# (karat_recipe.sh), with learning rate 5e-4 x 32 / 512.
set -euo pipefail
DATA_SET=${1:?finetune.sh: the first argument must be a data set, such as STL10}
MODEL=${MODEL:-kat_tiny_patch16_224}
GPUS=${GPUS:-2}
if [[ $MODEL =~ ^kat_(tiny|small|base)_patch16_224$ ]]; then
    CHECKPOINT=${CHECKPOINT:-hf_hub:adamdad/$MODEL}
fi
if [ ! "${CHECKPOINT:-}" ]; then
    echo "finetune.sh: set CHECKPOINT to the initial weights of $MODEL: a file, a URL or hf_hub:name" >&2
    exit 2
fi
if ! [[ $GPUS =~ ^[1-9][0-9]*$ ]] || ((32 % GPUS)); then
    echo "finetune.sh: GPUS must divide the global batch of 32 images, and $GPUS does not" >&2
    exit 2
fi
# shellcheck source=run_scripts/karat_recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/karat_recipe.sh"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../dist_train.sh" "$GPUS" \
    --data-set "$DATA_SET" \
    --data-path "${DATA_PATH:-./data}" \
    --model "$MODEL" \
    --finetune "$CHECKPOINT" \
    --batch-size $((32 / GPUS)) \
    "${RECIPE[@]}" \
    --output-dir "output/${MODEL}_$DATA_SET" \
    "${@:2}"
