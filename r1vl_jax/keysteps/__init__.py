"""The making of key steps, the missing half of StepRAR: `python -m r1vl_jax.keysteps --help`.

    rules, extract, convert    a solution, a model or its raw output -> key steps
    refine, augment            shorter ones, and more ways to say them
    lint                       what is wrong with them

Reads and writes R1-VL-10K rows (arXiv 2503.12937). A key step is a group of alternatives, as in r1vl_jax/rewards, whose
rules say what counts as found. No JAX.
"""
