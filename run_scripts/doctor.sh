#!/usr/bin/env bash
# Checks what the CUDA kernels need on this machine and prints one line for each check, with a remedy for each fault:
#   bash run_scripts/doctor.sh
# Exit status 0 if every check passes, else 1.
set -euo pipefail
# shellcheck source=run_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" "$ROOT/run_scripts/doctor.py"
