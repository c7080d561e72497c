"""Pallas kernels of r1vl_jax: a module for each, with one public function of the module's name.

    step_group_advantage      rewards by step -> each token's advantage within its group
    kl_policy_loss            token log-probabilities -> the StepGRPO loss, KL and entropy of each sequence
    prefix_decode_attention   one decoded token against the prompt that a group shares and the answer so far

Each takes `backend`: "reference" (plain jax.numpy, on every device), "pallas" (the kernel: Triton on a GPU, Mosaic on a
TPU, an error elsewhere) or "interpret" (the kernel's body run by jax, slowly, for tests).

`reference` holds the advantage's equation for NumPy and jax arrays alike and does not load jax, `reference_jax` the
rest. Nothing is re-exported here, so that the first of them can be imported alone.
"""
