#!/usr/bin/env bash
# Says what this machine has for the CUDA kernels, one line each, with a remedy for each fault: bash run_scripts/doctor.sh
# Exit code 0: everything that was checked works; 1: something does not.
set -euo pipefail
# shellcheck source=run_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" "$ROOT/run_scripts/doctor.py"
