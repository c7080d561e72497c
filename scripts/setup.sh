#!/usr/bin/env bash
# Makes .venv and installs the package with an extra: `. scripts/setup.sh EXTRA` ("" for none). Does nothing where that
# was done for this pyproject.toml. Sourced by quickstart.sh and test.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-}"
python="${PYTHON:-python3}"
stamp=".venv/installed${extra:+-$extra}"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $python is $("$python" --version); Python 3.11 or newer is needed (set PYTHON)" >&2; exit 2; }
  echo "making .venv with $("$python" --version)" >&2
  "$python" -m venv --clear .venv
fi
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "installing r1vl_jax${extra:+ with the extra '$extra'} (a few minutes the first time)" >&2
  # torch first: asked for by name, pip takes this version and no other build.
  case "$extra" in test | dev) .venv/bin/python -m pip install --quiet torch==2.13.0 ;; esac
  .venv/bin/python -m pip install --quiet --editable ".${extra:+[$extra]}"
  touch "$stamp"
fi
