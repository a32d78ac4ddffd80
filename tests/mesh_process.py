"""One process of several that compute a kernel over a mesh of all their devices: `mesh_process.py PROCESS OF PORT`."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from neural_tangents import stax


def main(process, of, port):
    """Compares rows of the kernel, and a prediction from them, with those of the whole kernel."""
    if of > 1:
        jax.distributed.initialize(f"localhost:{port}", of, process)
    assert jax.process_count() == of and jax.device_count() == 2 * of
    mesh = jax.sharding.Mesh(jax.devices(), "samples")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(16, 6, 6, 3)).astype("float32"), random.normal(size=(16, 2)).astype("float32")
    x_test = random.normal(size=(8, 6, 6, 3)).astype("float32")
    layers = (stax.Conv(8, (3, 3), padding="SAME"), stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1))
    kernel_fn = stax.serial(*layers)[2]
    over_mesh = nt.batch(kernel_fn, batch_size=3, mesh=mesh)
    kernel, whole = over_mesh(x, None, ("nngp", "ntk")), kernel_fn(x, None, ("nngp", "ntk"))
    for name in ("nngp", "ntk"):
        for shard in getattr(kernel, name).addressable_shards:
            assert shard.data.shape == (16 // mesh.size, 16)
            np.testing.assert_allclose(shard.data, np.asarray(getattr(whole, name))[shard.index], rtol=1e-5)

    @jax.jit
    def predicted(train, test):
        predict = nt.predict.gradient_descent_mse(train, jnp.asarray(y), diag_reg=1e-3)
        return predict(None, 0.0, 0.0, test)[1]

    mean = predicted(kernel.ntk, over_mesh(x_test, x, "ntk"))
    expected = predicted(whole.ntk, kernel_fn(x_test, x, "ntk"))
    for shard in mean.addressable_shards:
        np.testing.assert_allclose(shard.data, np.asarray(expected)[shard.index], atol=1e-4)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
