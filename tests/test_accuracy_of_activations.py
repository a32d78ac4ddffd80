"""What tools/accuracy_of_activations.py compares with, against mpmath."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

TOOL = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "tools" / "accuracy_of_activations.py"))
SCALE, ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
EXACT = {
    "Tanh": mp.tanh,
    "Silu": lambda x: x / (1 + mp.exp(-x)),
    "Selu": lambda x: SCALE * (x if x > 0 else ALPHA * mp.expm1(x)),
}


def expectation(fn, var1, var2, c):
    """`E f(u) f(v)` in 20 digits, for a function that is smooth but for 0."""
    with mp.workdps(20):
        std1, std2, across = mp.sqrt(var1), mp.sqrt(var2), mp.sqrt(1 - mp.mpf(c) ** 2)

        def density(z):
            return mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)

        def given(u):
            edges = sorted({-10, -5, 0, 5, 10, max(-10, min(10, -c * u / across))})
            return mp.quad(lambda z: density(z) * fn(std2 * (c * u + across * z)), edges, maxdegree=6)

        return float(mp.quad(lambda u: density(u) * fn(std1 * u) * given(u), [-10, -5, -1, 0, 1, 5, 10], maxdegree=5))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("var1", "var2", "c"), [(1.0, 1.5, 0.9), (10.0, 10.0, -0.3), (10.0, 10.0, 1 - 1e-7)])
def test_reference_of_the_table_of_errors(name, var1, var2, c):
    fn, kinks = TOOL["FUNCTIONS"][name]
    with jax.enable_x64(True):
        found = TOOL["expectation"](lambda x: np.asarray(fn(jnp.asarray(x))), kinks, var1, var2, c)
    np.testing.assert_allclose(found, expectation(EXACT[name], var1, var2, c), rtol=4e-15)
