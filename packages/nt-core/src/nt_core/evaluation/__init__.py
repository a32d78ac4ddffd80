"""Programs evaluated on blocks of pairs of samples, in JAX: the xla backend, and what the others leave to it."""
