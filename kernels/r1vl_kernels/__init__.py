"""Pallas kernels of r1vl_jax: one module for each, with one public function of the module's name.

    step_group_advantage      rewards by step -> each token's advantage within its group
    kl_policy_loss            token log-probabilities -> the StepGRPO loss, KL and entropy of each answer
    prefix_decode_attention   one decoded token's attention to the prompt its group shares and to its own answer

Each takes `backend`: "reference" (plain jax.numpy, any device), "pallas" (the kernel: Triton on a GPU, Mosaic on a TPU,
an error elsewhere) or "interpret" (jax runs the kernel's body op by op: slow, for tests on a CPU).

`reference` holds the equation of the advantage, for NumPy and jax arrays alike, and does not load jax. `reference_jax`
holds the other two. Import the modules directly: this file imports nothing, so that `reference` loads without jax.
The letters in array names are explained in r1vl_jax/types.py.
"""
