"""The gradient of a block of the 21-layer pooling network with respect to its images: time and memory.

.venv/bin/python benchmarks/gradient.py          # 20 x 100 images of 32 x 32: several minutes
.venv/bin/python benchmarks/gradient.py 4 16     # a smaller block
"""

import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from networks import NETWORKS
from neural_tangents import stax


def peak_bytes():
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    """Prints seconds and memory above that of the idle process."""
    n1, n2 = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (20, 100)
    random = np.random.default_rng(0)
    x1, x2 = (jnp.asarray(random.standard_normal((n, 32, 32, 3)), jnp.float32) for n in (n1, n2))
    _, _, kernel_fn = NETWORKS["cnn21-pool"](stax)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(x1))
    idle, start = peak_bytes(), time.perf_counter()
    gradient = jax.jit(jax.grad(lambda x1, x2: jnp.sum(kernel_fn(x1, x2, "ntk")), argnums=(0, 1)))
    results = jax.block_until_ready(gradient(x1, x2))
    seconds = time.perf_counter() - start
    assert all(bool(jnp.isfinite(g).all()) for g in results)
    print(
        f"{n1} x {n2} images: {seconds:.0f} s, {1e3 * seconds / (n1 * n2):.0f} ms per entry, "
        f"{(peak_bytes() - idle) / 1e9:.2f} GB above the {idle / 1e9:.2f} GB of the idle process"
    )


if __name__ == "__main__":
    main()
