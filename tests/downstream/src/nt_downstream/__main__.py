"""Checks the package where it is installed: against the arc-cosine recursion, written out in numpy."""

import importlib.util

import jax
import numpy as np

import nt_downstream

jax.config.update("jax_enable_x64", True)
RNG = np.random.default_rng(0)


def arc_cosine(x1, x2, depth):
    """NNGP and NTK of the fully connected network (Cho & Saul 2009; Jacot et al., arXiv:1806.07572)."""
    nngp, var1, var2 = x1 @ x2.T, np.sum(x1**2, 1, keepdims=True), np.sum(x2**2, 1)[None, :]
    nngp, var1, var2 = (2.0 * v / x1.shape[1] + 0.1 for v in (nngp, var1, var2))
    ntk = nngp
    for _ in range(depth):
        scale = np.sqrt(var1 * var2)
        angle = np.arccos(np.clip(nngp / scale, -1, 1))
        relu = scale * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
        slope = (np.pi - angle) / (2 * np.pi)
        nngp, ntk = 2.0 * relu + 0.1, 2.0 * relu + 0.1 + 2.0 * slope * ntk
        var1, var2 = var1 + 0.1, var2 + 0.1  # 2 E[relu^2] = variance
    return nngp, ntk


def check_fully_connected():
    x1, x2 = RNG.standard_normal((5, 7)), RNG.standard_normal((4, 7))
    kernel = nt_downstream.kernel(nt_downstream.fully_connected(x1.shape, x2.shape, 3), x1, x2)
    nngp, ntk = arc_cosine(x1, x2, 3)
    np.testing.assert_allclose(kernel.nngp, nngp, rtol=1e-12)
    np.testing.assert_allclose(kernel.ntk, ntk, rtol=1e-12)


def check_convolutional():
    """Periodic images are the same to the network wherever they begin."""
    x1, x2 = RNG.standard_normal((3, 6, 5, 2)), RNG.standard_normal((2, 6, 5, 2))
    program = nt_downstream.convolutional(x1.shape, x2.shape, 3)
    kernel = nt_downstream.kernel(program, x1, x2)
    shifted = nt_downstream.kernel(program, np.roll(x1, (2, 3), (1, 2)), x2)
    assert kernel.nngp.shape == kernel.ntk.shape == (3, 2)
    np.testing.assert_allclose(kernel.nngp, shifted.nngp, rtol=1e-12)
    np.testing.assert_allclose(kernel.ntk, shifted.ntk, rtol=1e-12)


def check_no_other_package():
    others = ["nt_stax", "nt_predict", "nt_empirical", "neural_tangents"]
    assert not [name for name in others if importlib.util.find_spec(name)]


if __name__ == "__main__":
    check_no_other_package()
    check_fully_connected()
    check_convolutional()
    print("fully connected and convolutional programs, built by hand: right")
