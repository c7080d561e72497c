"""Makes the key steps that the reward StepRAR needs for every question: `python -m r1vl_jax.keysteps --help`.

    rules      takes key steps from solutions, without a model
    extract    asks a model for the key steps of solutions
    convert    reads key steps from a model's raw output
    refine     shortens key steps
    augment    adds other ways to state key steps
    lint       reports what is wrong with key steps

The commands read and write R1-VL-10K rows (arXiv 2503.12937), and do not use JAX. A key step is a group of
alternatives. The rules of r1vl_jax/rewards decide whether a key step occurs in a text. README.md in this folder
describes the commands.
"""
