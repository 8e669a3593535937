#!/usr/bin/env bash
# From nothing to a trained, sampled and scored model: bash scripts/quickstart.sh [KEY=VALUE ...]
# Run it again: it resumes where it was stopped, or says that it is done.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install ""
# waiting threads sleep rather than spin: many times faster where other programs use the cores too
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
"$VENV/bin/difftrain" train recipes/digits.yaml "$@"
"$VENV/bin/python" scripts/digits_bars.py recipes/digits.yaml "$@"
