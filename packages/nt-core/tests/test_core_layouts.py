"""`nt_core.layouts` against the index formulas, written out with loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nt_core import layouts

# Every new shape is compiled once: a deadline would be decided by the machine.
few_examples = settings(deadline=None, max_examples=25)
SIZES = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def numbered(shape):
    """An array of which every entry is different."""
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


def interleaved(p, q):
    return tuple(itertools.chain.from_iterable(zip(p, q, strict=True)))


@few_examples
@given(lead=SIZES, pairs=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=3))
def test_zip_axes(lead, pairs):
    first, second = (tuple(pair[i] for pair in pairs) for i in (0, 1))
    x = numbered(lead + first + second)
    zipped = np.asarray(layouts.zip_axes(x, len(lead)))
    assert zipped.shape == lead + interleaved(first, second)
    for b, p, q in itertools.product(np.ndindex(lead), np.ndindex(first), np.ndindex(second)):
        assert zipped[b + interleaved(p, q)] == x[b + p + q]
    np.testing.assert_array_equal(layouts.unzip_axes(zipped, len(lead)), x)


@few_examples
@given(lead=SIZES, data=st.data(), first=SIZES)
def test_transpose_zipped(lead, first, data):
    order = data.draw(st.permutations(range(len(first))))
    second = tuple(n + 1 for n in first)
    x = numbered(lead + interleaved(first, second))
    y = np.asarray(layouts.transpose_zipped(x, order, len(lead)))
    for b, p, q in itertools.product(np.ndindex(lead), np.ndindex(first), np.ndindex(second)):
        permuted = interleaved([p[i] for i in order], [q[i] for i in order])
        assert y[b + permuted] == x[b + interleaved(p, q)]


def test_reverse_zipped():
    x = numbered((2, 3, 4, 5, 6))
    np.testing.assert_array_equal(layouts.reverse_zipped(x, 1), np.transpose(x, (0, 3, 4, 1, 2)))
    np.testing.assert_array_equal(layouts.reverse_zipped(layouts.reverse_zipped(x, 1), 1), x)


@few_examples
@given(lead=SIZES, space=SIZES)
def test_zipped_diagonal(lead, space):
    x = numbered(lead + interleaved(space, space))
    diagonal = np.asarray(layouts.zipped_diagonal(jnp.asarray(x), len(lead)))
    assert diagonal.shape == lead + space
    for b, p in itertools.product(np.ndindex(lead), np.ndindex(space)):
        assert diagonal[b + p] == x[b + interleaved(p, p)]


def test_zipped_diagonal_ignores_what_is_off_the_diagonal():
    x = jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]])
    np.testing.assert_array_equal(layouts.zipped_diagonal(x), [1.0, 2.0])
    np.testing.assert_array_equal(jax.grad(lambda x: layouts.zipped_diagonal(x).sum())(x), np.eye(2))


def test_interleave_ones_lays_out_pairs():
    first, second = numbered((2, 3, 4)), numbered((2, 5, 6))
    a = layouts.interleave_ones(first, 1, 3, second=False)
    b = layouts.interleave_ones(second, 1, 3, second=True)
    pairs = np.asarray(1000 * a + b)
    assert pairs.shape == (2, 3, 5, 4, 6)
    for n, i, j, k, m in np.ndindex(pairs.shape):
        assert pairs[n, i, j, k, m] == 1000 * first[n, i, k] + second[n, j, m]


def test_interleave_ones_leaves_other_axes_alone():
    assert layouts.interleave_ones(numbered((2, 3, 4)), 0, 1, second=False).shape == (2, 1, 3, 4)
    assert layouts.interleave_ones(numbered((2, 3, 4)), 0, 1, second=True).shape == (1, 2, 3, 4)
    assert layouts.interleave_ones(numbered((2, 3, 4)), 1, 1, second=True).shape == (2, 3, 4)


def test_make_2d():
    x = numbered((2, 3, 4, 5, 6))
    matrix = np.asarray(layouts.make_2d(x, 1))
    assert matrix.shape == (2, 3 * 5, 4 * 6)
    for n, i, j, k, m in np.ndindex(x.shape):
        assert matrix[n, i * 5 + k, j * 6 + m] == x[n, i, j, k, m]


@pytest.mark.parametrize("fn", [layouts.zip_axes, layouts.unzip_axes, layouts.reverse_zipped, layouts.zipped_diagonal])
def test_an_axis_without_partner_is_refused(fn):
    with pytest.raises(ValueError, match=r"even number of axes from axis 1 on, got an array of shape \(2, 3\)"):
        fn(jnp.zeros((2, 3)), 1)
