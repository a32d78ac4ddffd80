"""`make bench`: how long a kernel takes. `python benchmarks/peer.py` compares with the archived library."""

import jax
import numpy as np
import pytest
from networks import NETWORKS
from neural_tangents import stax

# network, shape of one input, block of the kernel matrix
BLOCKS = [
    ("cnn21-pool", (32, 32, 3), (2, 16)),
    ("cnn21-flatten", (32, 32, 3), (64, 64)),
    ("wide-resnet", (32, 32, 3), (2, 16)),
    ("myrtle10", (32, 32, 3), (4, 16)),
    ("fcn5", (784,), (4000, 4000)),
]


def batches(shape, block):
    """Two batches of random inputs in float32."""
    rng = np.random.default_rng(0)
    return [jax.device_put(rng.standard_normal((n, *shape)).astype(np.float32)) for n in block]


def time_kernel(benchmark, kernel_fn, x1, x2, get):
    """Times the compiled or plain function; the first call, which compiles, does not count."""
    result = benchmark.pedantic(
        lambda: jax.block_until_ready(kernel_fn(x1, x2, get)), rounds=5, iterations=1, warmup_rounds=1
    )
    assert np.isfinite(result).all()
    benchmark.extra_info["ms per entry"] = 1e3 * benchmark.stats.stats.median / result.size


@pytest.mark.parametrize("get", ["nngp", "ntk"])
@pytest.mark.parametrize(("network", "shape", "block"), BLOCKS, ids=[b[0] for b in BLOCKS])
def test_block(benchmark, network, shape, block, get):
    """A block of a kernel matrix of two different batches, compiled."""
    kernel_fn = jax.jit(NETWORKS[network](stax)[2], static_argnames="get")
    time_kernel(benchmark, kernel_fn, *batches(shape, block), get)


def test_symmetric_block(benchmark):
    """x2 = None: one triangle is enough. Compare with test_block on as many entries."""
    kernel_fn = jax.jit(NETWORKS["cnn21-flatten"](stax)[2], static_argnames="get")
    (x,) = batches((32, 32, 3), (64,))
    time_kernel(benchmark, kernel_fn, x, None, "ntk")


def test_call_without_jit(benchmark):
    """What a call costs by itself: next to no arithmetic, and no jit."""
    kernel_fn = NETWORKS["cnn21-pool"](stax)[2]
    time_kernel(benchmark, kernel_fn, *batches((2, 2, 3), (2, 2)), "ntk")
