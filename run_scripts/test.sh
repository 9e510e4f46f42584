#!/usr/bin/env bash
# Sets up the environment and runs the tests, two at a time. With arguments, which go to pytest, one at a time:
#   bash run_scripts/test.sh -k rational --runslow
set -euo pipefail
# shellcheck source=run_scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
# On a busy machine, threads wait for each other longer than they compute.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ $# -eq 0 ] || exec "$PYTHON" -m pytest -q "$@"
"$PYTHON" -m pytest -q -n 2 --dist loadfile -m "not alone"
exec "$PYTHON" -m pytest -q -m alone
