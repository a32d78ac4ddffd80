"""Cells of a matrix: each entry is computed once at least, and lands where it belongs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nt_core.grid import Grid, evenly, mirrored, swapped

SIZES = st.integers(1, 12)


@st.composite
def grids(draw):
    symmetric = draw(st.booleans())
    n1 = draw(SIZES)
    return Grid(n1, n1 if symmetric else draw(SIZES), draw(SIZES), draw(SIZES), symmetric)


def matrix(grid):
    return np.arange(grid.n1 * grid.n2).reshape(grid.n1, grid.n2)


def blocks_of(grid, x):
    """Cuts a matrix, `(n1, n2, ...)`, by hand; what lies beyond it is -1."""
    widths = [(0, grid.padded[0] - grid.n1), (0, grid.padded[1] - grid.n2)] + [(0, 0)] * (x.ndim - 2)
    x = np.pad(x, widths, constant_values=-1)
    rows, columns = grid.rows, grid.columns
    return np.stack([x[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] for i, j in grid.cells()])


@given(grids())
@settings(deadline=None)
def test_samples_of_cells_cover_the_matrix_once(grid):
    covered = np.zeros((grid.n1, grid.n2), int)
    for cell in grid.cells():
        covered[grid.samples(cell)] += 1
    upper = np.triu(np.ones_like(covered)) if grid.symmetric else np.ones_like(covered)
    assert covered.max() == 1 and (covered >= upper).all()


@given(grids())
@settings(deadline=None, max_examples=30)
def test_joined_cells_are_the_matrix(grid):
    x = matrix(grid)
    joined = np.asarray(grid.join(jnp.array(blocks_of(grid, x))))
    if grid.symmetric:
        joined, x = np.triu(joined), np.triu(x)
    np.testing.assert_array_equal(joined, x)


@pytest.mark.parametrize("axis", [1, -2])
def test_rows_may_be_any_axis_of_a_block(axis):
    grid = Grid(5, 4, rows=2, columns=3)
    x = np.arange(20 * 6).reshape(5, 4, 6)  # and 6 positions
    blocks = np.moveaxis(blocks_of(grid, x), 3, 1)
    joined = grid.join(jnp.array(blocks), axis)
    np.testing.assert_array_equal(joined, np.moveaxis(x, 2, 0))


def test_cells_have_names_of_their_own():
    grid = Grid(23, 11, rows=2, columns=1)
    keys = [grid.key(cell) for cell in grid.cells()]
    assert len(set(keys)) == len(keys) == 12 * 11


@given(SIZES, SIZES)
def test_even_blocks_are_as_many_and_no_larger(n, size):
    even = evenly(n, size)
    assert even <= size and -(-n // even) == -(-n // size)
    assert even * -(-n // even) - n < -(-n // even)  # at most one sample of padding for each block


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_mirrored_keeps_the_earlier_of_two_entries(array):
    x = np.random.default_rng(0).normal(size=(3, 3, 2, 2, 4, 4)).astype(np.float32)
    pairs = [(0, 1), (2, 3), (4, 5)]
    symmetric = np.asarray(mirrored(array(x), pairs))
    for index in np.ndindex(*x.shape):
        first, second = index[::2], index[1::2]
        partner = tuple(i for pair in zip(second, first, strict=True) for i in pair)
        assert symmetric[index] == (x[index] if first <= second else x[partner])
    np.testing.assert_array_equal(swapped(symmetric, pairs), symmetric)


def test_mirrored_takes_axes_in_any_place():
    x = np.random.default_rng(0).normal(size=(2, 2, 5, 3, 3))
    expected = mirrored(x.transpose(3, 4, 0, 1, 2), [(0, 1), (2, 3)])
    actual = jax.jit(lambda x: mirrored(x, [(-2, -1), (0, 1)]))(x.astype(np.float32))
    np.testing.assert_array_equal(actual, expected.transpose(2, 3, 4, 0, 1).astype(np.float32))


def test_grids_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="square"):
        Grid(3, 4, 1, 1, symmetric=True)
    with pytest.raises(ValueError, match="at least 1 x 1"):
        Grid(3, 4, 0, 1)
