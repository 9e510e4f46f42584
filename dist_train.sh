#!/usr/bin/env bash
# Trains on the GPUs of this machine, with one process for each:
#   bash dist_train.sh 8 /path/to/imagenet --model kat_tiny_patch16_224 -b 128 --output output/kat_tiny
# The first argument is the number of processes, the others go to main.py. Relative paths start at the current folder.
set -euo pipefail
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "dist_train.sh: the first argument must be the number of processes (GPUs), such as 8, not '${1:-}'" >&2
    exit 2
fi
# shellcheck source=run_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/run_scripts/setup.sh"
[ "$1" = 1 ] && exec "$PYTHON" "$ROOT/main.py" "${@:2}"
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$1" "$ROOT/main.py" "${@:2}"
