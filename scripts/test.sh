#!/usr/bin/env bash
# Runs the tests: bash scripts/test.sh [PYTEST ARGUMENTS ...]. Slow and GPU tests run with -m "slow or gpu".
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install test
WORKERS="$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)"
# One thread a process, since the test processes share the cores. A file stays on one of them, so that its fixtures are made once
export OMP_NUM_THREADS=1
"$VENV/bin/python" -m pytest -n "$WORKERS" --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" "$@"
