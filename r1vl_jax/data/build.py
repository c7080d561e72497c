"""Runs `python -m r1vl_jax.data.build`, which builds a TFDS data set (see r1vl_jax/data/builders/command.py)."""

from __future__ import annotations

import sys

from r1vl_jax.data.builders.command import main

if __name__ == "__main__":
    sys.exit(main())
