"""Makes key steps, which StepRAR needs for every question: `python -m r1vl_jax.keysteps --help`.

    rules      takes key steps from solutions, without a model
    extract    asks a model for the key steps of solutions
    convert    reads key steps from a model's raw output
    refine     shortens key steps
    augment    adds other ways to state them
    lint       reports what is wrong with them

Reads and writes R1-VL-10K rows (arXiv 2503.12937). A key step is a group of alternatives, as in r1vl_jax/rewards, whose
rules decide whether it occurs in a text. No JAX. README.md in this folder has the commands.
"""
