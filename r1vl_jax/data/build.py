"""python -m r1vl_jax.data.build: builds a TFDS data set (r1vl_jax.data.builders.build)."""

from __future__ import annotations

import sys

from r1vl_jax.data.builders.build import main

if __name__ == "__main__":
    sys.exit(main())
