#!/usr/bin/env bash
# Sets up .venv and runs the whole path on the built-in task: warm-up, StepGRPO, export. About 10 minutes on 2 cores.
#   [EXTRA=gpu|tpu] scripts/quickstart.sh [overrides, such as --rl.steps 20 or --resume]
set -euo pipefail
. "$(dirname "$0")/setup.sh" "${EXTRA:-}"
case " $* " in *" --resume "*) again=() ;; *) again=(--overwrite) ;; esac
exec .venv/bin/python -m r1vl_jax.train --config configs/quickstart.yaml ${again[@]+"${again[@]}"} "$@"
