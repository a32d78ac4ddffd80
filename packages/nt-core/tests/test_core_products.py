"""Products of tiles with vectors, natively and by XLA, against NumPy in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_core import _native
from nt_core.backends.cpu import native
from nt_core.products import products

SHAPES = [(1, 1, 1), (3, 7, 2), (5, 300, 11), (66, 515, 7), (300, 256, 10), (0, 3, 2), (3, 0, 2), (3, 4, 0)]


def operands(rows, columns, n, dtype="float32"):
    random = np.random.default_rng(0)
    matrix = random.normal(size=(rows, columns)).astype(dtype)
    return matrix, random.normal(size=(columns, n)), random.normal(size=(rows, n))


def check(computed, matrix, right, left):
    matrix = matrix.astype(np.float64)
    for actual, expected in zip(computed, (matrix @ right, matrix.T @ left), strict=True):
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13 * max(matrix.size, 1) ** 0.5)


@pytest.fixture(params=["baseline", "avx2", "avx512", "xla"])
def way(request, monkeypatch):
    """Runs a test with every instruction set that the machine has, and without the native module."""
    if request.param == "xla":
        monkeypatch.setattr(native, "refusal", lambda: "as if it were not there")
        yield
        return
    _native.choose_level(request.param)
    yield
    _native.choose_level("")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_products(way, shape, dtype, x64):
    given = operands(*shape, dtype)
    check(jax.jit(lambda *args: products(*args))(*given), *given)


def test_bits_do_not_depend_on_the_threads(x64):
    given = operands(500, 1000, 10)
    first = products(*given)
    for _ in range(20):
        for one, other in zip(first, products(*given), strict=True):
            np.testing.assert_array_equal(one, other)


def test_values_that_are_not_numbers_are_not_lost(way, x64):
    for value in (np.nan, np.inf):
        matrix, right, left = operands(9, 17, 3)
        matrix[8, 16] = value
        direct, transposed = products(matrix, right, left)
        assert not np.isfinite(direct[8]).any() and np.isfinite(direct[:8]).all()
        assert not np.isfinite(transposed[16]).any() and np.isfinite(transposed[:16]).all()


def test_vmap(x64):
    given = operands(6, 9, 2)
    stacked = [np.stack([array, 2 * array]) for array in given]
    for actual, expected in zip(jax.vmap(products)(*stacked), products(*given), strict=True):
        np.testing.assert_allclose(actual, jnp.stack([expected, 4 * expected]), rtol=1e-14)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_sizes_that_do_not_match(changed, x64):
    given = list(operands(6, 9, 2))
    given[changed] = given[changed][:-1]
    with pytest.raises(ValueError, match=r"takes vectors of shapes"):
        products(*given)


def test_vectors_are_in_double_precision():
    with pytest.raises(TypeError, match="double precision, got float32"):
        products(*operands(6, 9, 2))


def test_matrices_have_two_axes(x64):
    with pytest.raises(ValueError, match=r"takes vectors of shapes"):
        products(np.ones(3), np.ones((3, 1)), np.ones((3, 1)))


def test_many_vectors(way, x64):
    given = operands(20, 300, 123)
    check(products(*given), *given)
