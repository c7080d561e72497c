"""Pallas kernels of r1vl_jax, one public function each. None yet: StepGRPO's advantage and loss run through XLA."""
