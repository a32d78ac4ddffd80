"""Single precision against double, on the networks of the benchmarks and on real data."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from neural_tangents import stax

NETWORKS = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "benchmarks" / "networks.py"))["NETWORKS"]

# Of the largest entry. What a pool leaves of nearly equal images has lost digits (its deficits are differences of
# means), which shows where one convolution is all that follows: 2e-5 of the tangent kernel for images 1e-5 apart.
# The covariances of the odd error function, averaged over images, are small beside the variances that they come from.
TOLERANCE = dict.fromkeys(NETWORKS, 1e-6) | {"conv-pool": 4e-5, "conv3-erf": 4e-6}


def kernels(network, x1, x2, dtype):
    """The NNGP and the NTK, computed in a precision from inputs that single precision holds."""
    with jax.enable_x64(dtype == "float64"):
        x1, x2 = (None if x is None else jnp.asarray(x.astype("float32"), dtype) for x in (x1, x2))
        pair = NETWORKS[network](stax)[2](x1, x2, ("nngp", "ntk"))
        return {name: np.asarray(kernel, float) for name, kernel in pair._asdict().items()}


def check(network, x1, x2):
    single, double = (kernels(network, x1, x2, dtype) for dtype in ("float32", "float64"))
    for name, expected in double.items():
        error = np.abs(single[name] - expected)
        assert error.max() <= TOLERANCE[network] * np.abs(expected).max(), name
        assert (error / np.abs(expected)).max() <= 10 * TOLERANCE[network], name


@pytest.mark.parametrize("network", NETWORKS)
def test_headline_networks(network):
    """Independent, nearly equal and equal inputs; and the diagonal of the kernel of a batch with itself."""
    random = np.random.default_rng(0)
    shape = {"fcn5": (784,), "fcn3-gelu": (784,), "imdb": (500, 50)}.get(network, (32, 32, 3))
    x1 = random.standard_normal((2, *shape))
    others = [x1[0] + noise * random.standard_normal(shape) for noise in (0.0, 1e-5, 1e-3, 1e-1)]
    check(network, x1, np.stack([*others, random.standard_normal(shape)]))
    check(network, x1, None)


def test_gram_matrix_of_digits_is_positive_semi_definite():
    """500 images, 21 layers, single precision."""
    digits = sklearn.datasets.load_digits().images[:500, :, :, None] / 16
    check("cnn21-pool", digits[:100], None)
    for name, gram in kernels("cnn21-pool", digits, None, "float32").items():
        np.testing.assert_array_equal(gram, gram.T)
        eigenvalues = np.linalg.eigvalsh(gram)
        assert eigenvalues[0] > -1e-6 * eigenvalues[-1], name
