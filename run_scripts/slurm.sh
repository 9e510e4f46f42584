#!/usr/bin/env bash
# Trains on one or more nodes under Slurm, with one process for each GPU. Submit it from the repository root:
#   sbatch --nodes=2 run_scripts/slurm.sh --model kat_base_patch16_224 --data-path /imagenet --output-dir out/kat ...
# The arguments go to main.py; %j in them becomes the job's number. A job that is requeued, or submitted again after its
# time limit, continues from the last checkpoint in --output-dir. Options of sbatch before the script's name, such as
# --partition, --gpus-per-node=4 or --time=24:00:00, override those below.
# The repository, its environment and the data must be on storage that all nodes share.
#SBATCH --job-name=kan-vit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
if [ ! "${SLURM_JOB_ID:-}" ] || [ ! -f "${SLURM_SUBMIT_DIR:-}/run_scripts/setup.sh" ]; then
    echo "slurm.sh: submit it from the repository root: sbatch --nodes=2 run_scripts/slurm.sh --model ..." >&2
    exit 2
fi
# shellcheck source=run_scripts/setup.sh
source "$SLURM_SUBMIT_DIR/run_scripts/setup.sh"  # Slurm runs a copy of this file, in another folder.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((10000 + SLURM_JOB_ID % 20000))  # below the range of ephemeral ports
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-64}" \
    "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node=gpu \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="${nodes[0]}:$port" \
    "$ROOT/main.py" --resume auto "${@//%j/$SLURM_JOB_ID}"
