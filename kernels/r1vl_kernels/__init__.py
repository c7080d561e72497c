"""Contains the Pallas kernels of r1vl_jax. Each module has one public function, named like the module:

    step_group_advantage      computes each token's advantage within its group, from rewards per step
    kl_policy_loss            computes each answer's StepGRPO loss, KL and entropy, from token log-probabilities
    prefix_decode_attention   computes the attention of one decoded token to its prompt and to its own answer

Each function takes `backend`: "reference" (plain jax.numpy, any device), "pallas" (Triton on a GPU, Mosaic on a TPU, an
error on other platforms) or "interpret" (jax runs the kernel's body op by op, which is slow; for tests on a CPU).

`reference` defines the equation of the advantage for NumPy and jax arrays and does not load jax. `reference_jax`
defines the equations of the other two kernels. Import the modules directly: this file imports nothing, so that
`reference` can be used without jax. r1vl_jax/types.py explains the letters in array names.
"""
