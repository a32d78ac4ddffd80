"""Kernels of deep ReLU networks from nt-core alone: covariance programs built by hand, no layers."""

import jax
import jax.numpy as jnp
from nt_core import Builder, Inputs, Kernel, Program, Spec, activations, propagate, steps

RELU = activations.ABRelu(0.0, 1.0)


def fully_connected(shape1: tuple[int, int], shape2: tuple[int, int], depth: int) -> Program:
    """`depth` hidden layers with ReLU and a linear readout, weights of variance 2 and biases of variance 0.1."""
    builder = Builder()
    x = builder.source(Spec(shape1, shape2, batch_axis=0, channel_axis=1))
    for _ in range(depth):
        x = builder.add(steps.Dual(RELU), builder.add(steps.Dense(2.0, 0.1, 64), x))
    return builder.build(builder.add(steps.Dense(2.0, 0.1, 1), x))


def convolutional(shape1: tuple[int, ...], shape2: tuple[int, ...], depth: int) -> Program:
    """`depth` convolutions 3 x 3 with ReLU on periodic images, and the average over all pixels."""
    builder = Builder()
    x = builder.source(Spec(shape1, shape2, batch_axis=0, channel_axis=3))
    for _ in range(depth):
        x = builder.add(steps.Conv(2.0, None, 64, (3, 3), (1, 1), "CIRCULAR", (1, 1)), x)
        x = builder.add(steps.Dual(RELU), x)
    return builder.build(builder.add(steps.GlobalPool(mean=True), x))


def kernel(program: Program, x1: jax.Array, x2: jax.Array) -> Kernel:
    """The NNGP and tangent kernels of a program for two batches of inputs."""
    (spec,) = program.sources
    (result,) = propagate(program, [Inputs(jnp.asarray(x1), jnp.asarray(x2), spec)])
    return result
