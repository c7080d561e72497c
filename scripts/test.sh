#!/usr/bin/env bash
# Sets up .venv with the test extra and runs pytest, on all cores.
#   scripts/test.sh [pytest arguments, such as -m slow or tests/model/test_parity.py]
set -euo pipefail
. "$(dirname "$0")/setup.sh" test
exec .venv/bin/python -m pytest -n auto --dist loadfile "$@"
