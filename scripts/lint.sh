#!/usr/bin/env bash
# Sets up .venv with the dev extra and checks the code: ruff's rules and format, basedpyright in basic mode.
#   scripts/lint.sh
set -euo pipefail
. "$(dirname "$0")/setup.sh" dev
.venv/bin/ruff check r1vl_jax kernels scripts tests
.venv/bin/ruff format --check r1vl_jax kernels scripts tests
exec .venv/bin/basedpyright --pythonpath .venv/bin/python
