#!/usr/bin/env bash
# The training recipe of KArAt (arXiv:2503.10632, Table 5); train_karat.sh and finetune.sh source it.
#
# --lr is scaled by the effective batch / 512. For mixup and cutmix the table has "prob 0.5, 0.5, batch", which is
# taken for DeiT's default: every batch is mixed, by either of the two with equal probability. Not in the table, and
# here as in DeiT: alphas 0.8 and 1.0 of mixup and cutmix, drop path 0.1, random erasing 0.25, repeated augmentation
# on several GPUs, weight decay on the coefficients of the functions (--decay-rational). Seed and mixed precision are
# not published either: here the seed is 0, and GPUs compute in bfloat16.
# shellcheck disable=SC2034  # used by the scripts that source this file
RECIPE=(
    --input-size 224 --eval-crop-ratio 0.9
    --epochs 100
    --opt adamw --opt-eps 1e-6 --weight-decay 0.05 --decay-rational --clip-grad 1.0
    --sched cosine --lr 5e-4 --warmup-epochs 5 --warmup-lr 1e-6 --min-lr 1e-5
    --model-ema-decay 0.99992
    --scale 0.08 1.0 --ratio 0.67 1.5 --hflip 0.5 --color-jitter 0.4
    --aa rand-m15-n2-mstd1.0-inc1
    --mixup 0.8 --cutmix 1.0 --mixup-prob 1.0 --mixup-switch-prob 0.5 --mixup-mode batch
    --smoothing 0.1
)
