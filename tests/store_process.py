"""One process of several that compute the same store: `store_process.py PATH PROCESS OF`."""

import sys

import neural_tangents as nt
import numpy as np
from neural_tangents import stax

if __name__ == "__main__":
    x = np.random.default_rng(0).normal(size=(60, 24, 24, 3)).astype("float32")
    layers = [layer for _ in range(2) for layer in (stax.Conv(8, (3, 3), padding="SAME"), stax.Relu())]
    kernel_fn = stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1))[2]
    store = nt.KernelStore.create(sys.argv[1], kernel_fn, x, tile=4)
    store.compute(process=int(sys.argv[2]), of=int(sys.argv[3]))
