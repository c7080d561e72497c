"""Runs `python -m r1vl_jax.data.check`, which reports on a configuration's data (r1vl_jax/data_check/command.py)."""

from __future__ import annotations

import sys

from r1vl_jax.data_check.command import main

if __name__ == "__main__":
    sys.exit(main())
