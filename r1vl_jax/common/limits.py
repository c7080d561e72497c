"""The largest numbers that the configuration and the command lines take. Imports no other module of r1vl_jax.

They are far above any use. A larger number is a slip: it would fill the memory, or never end.
"""

MAX_TOKENS = 1 << 20  # of a prompt or an answer
MAX_BATCH = 1 << 16  # rows, questions or answers at once
MAX_PIXELS = 178_956_970  # of an image; PIL's own limit: half a GiB of RGB
MAX_ROWS = 1_000_000  # pictures of a split of the built-in task
MAX_WORKERS = 1024  # processes or threads
MAX_SECONDS = 1_000_000  # of a time limit; Python's calls take no more than 2**31 milliseconds
MAX_WHOLE = 2**32 - 1  # any whole number; JAX uses the lower 32 bits of a seed
