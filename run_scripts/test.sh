#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments go to pytest: bash run_scripts/test.sh -k rational --runslow
set -euo pipefail
# shellcheck source=run_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # threads that wait do not spin: on a busy machine that costs tenfold
exec "$PYTHON" -m pytest -q "$@"
