"""nt-core in an environment of its own. `--native`: the extension must serve; `--pure`: it is absent, said once."""

import sys
import warnings

import jax.numpy as jnp
import numpy as np
from nt_core import Builder, Inputs, Spec, activations, propagate, steps

builder = Builder()
x = builder.source(Spec((2, 3), (2, 3), batch_axis=0, channel_axis=1))
dense = builder.add(steps.Dense(2.0, None, 16), x)
program = builder.build(builder.add(steps.Dual(activations.ABRelu(0.0, 1.0)), dense))
inputs = Inputs(jnp.eye(2, 3), None, program.sources[0])
expected = np.array([[1 / 3, 1 / (3 * np.pi)], [1 / (3 * np.pi), 1 / 3]])

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        (kernel,) = propagate(program, [inputs])
        np.testing.assert_allclose(kernel.nngp, expected, rtol=1e-6)

messages = [str(warning.message) for warning in said]
if "--native" in sys.argv:
    assert not messages, messages
    (kernel,) = propagate(program, [inputs], implementation="cpu")
    np.testing.assert_allclose(kernel.nngp, expected, rtol=1e-6)
if "--pure" in sys.argv:
    assert len(messages) == 1 and "pure JAX" in messages[0], messages
