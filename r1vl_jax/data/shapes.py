"""Runs `python -m r1vl_jax.data.shapes`, which makes the built-in task (see r1vl_jax/shapes/command.py)."""

from __future__ import annotations

import sys

from r1vl_jax.shapes.command import main

if __name__ == "__main__":
    sys.exit(main())
