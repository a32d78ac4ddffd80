"""Matrices over pairs of samples, cut into cells of one size."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Cell = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A matrix over the pairs of samples of two batches, cut into cells.

    All cells have the same size, so that what computes one is compiled once. The last row and the last column of cells
    may reach beyond the matrix; what they hold there is cut off when the cells are joined.

    Attributes:
      n1, n2: sizes of the batches.
      rows, columns: sizes of a cell.
      symmetric: the matrix is its own mirror image, and cells below the diagonal are not computed.

    >>> grid = Grid(5, 5, rows=2, columns=2, symmetric=True)
    >>> grid.shape, grid.cells()
    ((3, 3), [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)])
    """

    n1: int
    n2: int
    rows: int
    columns: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        if min(self.n1, self.n2, self.rows, self.columns) < 1:
            raise ValueError(f"A grid needs samples, and cells of at least 1 x 1, got {self}.")
        if self.symmetric and self.n1 != self.n2:
            raise ValueError(f"A symmetric grid is square, got {self.n1} x {self.n2}.")

    @property
    def shape(self) -> tuple[int, int]:
        """How many cells there are along each axis."""
        return -(-self.n1 // self.rows), -(-self.n2 // self.columns)

    @property
    def padded(self) -> tuple[int, int]:
        """Sizes of the matrix that the cells cover."""
        return self.shape[0] * self.rows, self.shape[1] * self.columns

    def cells(self) -> list[Cell]:
        """The cells that are to be computed, `(row, column)`.

        Of a symmetric grid those that lie above the diagonal, or reach it.
        """
        n_rows, n_columns = self.shape
        return [(i, j) for i in range(n_rows) for j in range(n_columns) if not self._is_below((i, j))]

    def key(self, cell: Cell) -> str:
        """A name of a cell, the same in every run with the same grid: that of its chunk in a zarr array.

        >>> Grid(5, 7, rows=2, columns=2).key((0, 3))
        'c/0/3'
        """
        return f"c/{cell[0]}/{cell[1]}"

    def samples(self, cell: Cell) -> tuple[slice, slice]:
        """Which samples of each batch a cell is about; slices that end with the batch.

        >>> Grid(5, 7, rows=2, columns=2).samples((1, 3))
        (slice(2, 4, None), slice(6, 7, None))
        """
        starts = cell[0] * self.rows, cell[1] * self.columns
        stops = min(starts[0] + self.rows, self.n1), min(starts[1] + self.columns, self.n2)
        return slice(starts[0], stops[0]), slice(starts[1], stops[1])

    def join(self, blocks: Array, axis: int = 0) -> Array:
        """Joins cells to the matrix.

        Args:
          blocks: the blocks of `cells()`, in their order, along the first axis.
          axis: of a block, the axis of its rows; that of its columns follows.

        Returns:
          The matrix, with its rows at `axis`. Below the diagonal of a symmetric grid it holds anything: see `mirrored`.
        """
        axis = range(blocks.ndim - 1)[axis]
        n_rows, n_columns = self.shape
        if self.symmetric:
            numbers = np.zeros((n_rows, n_columns), int)
            for number, cell in enumerate(self.cells()):
                numbers[cell] = number
            x = blocks[numbers]
        else:
            x = blocks.reshape(n_rows, n_columns, *blocks.shape[1:])
        x = jnp.moveaxis(x, (0, 1), (axis, axis + 2))
        x = x.reshape(*x.shape[:axis], *self.padded, *x.shape[axis + 4 :])
        return lax.slice_in_dim(lax.slice_in_dim(x, 0, self.n1, axis=axis), 0, self.n2, axis=axis + 1)

    def _is_below(self, cell: Cell) -> bool:
        return self.symmetric and cell[0] * self.rows >= (cell[1] + 1) * self.columns


def evenly(n: int, size: int) -> int:
    """Returns the size of blocks that are alike, of which `n` samples need as many as of blocks of the given size.

    >>> evenly(10, 8), evenly(10, 100)
    (5, 10)
    """
    return -(-n // -(-n // size))


def mirrored(x: Any, pairs: Sequence[tuple[int, int]]) -> Any:
    """Makes covariances of a batch with itself exactly symmetric.

    Of each two entries that must be equal, that with the earlier sample (or position, for a sample with itself) counts.

    Args:
      x: covariances, an array of JAX or NumPy.
      pairs: the axes of the first and of the second samples; then of each spatial axis the first and the second
        positions, unless only equal positions are stored.

    >>> print(mirrored(np.array([[1, 2], [0, 3]]), [(0, 1)]))
    [[1 2]
     [2 3]]
    """
    pairs = [(first % x.ndim, second % x.ndim) for first, second in pairs]
    later, equal = np.zeros((1,) * x.ndim, bool), np.ones((1,) * x.ndim, bool)
    for first, second in pairs:
        i, j = _positions(x, first), _positions(x, second)
        later, equal = later | (equal & (i > j)), equal & (i == j)
    return (jnp if isinstance(x, Array) else np).where(later, swapped(x, pairs), x)


def swapped(x: Any, pairs: Sequence[tuple[int, int]]) -> Any:
    """Exchanges the axes of each pair: the covariances of `(x2, x1)`, of those of `(x1, x2)`."""
    order = list(range(x.ndim))
    for first, second in pairs:
        order[first], order[second] = order[second], order[first]
    return x.transpose(order)


def _positions(x: Any, axis: int) -> Any:
    """Returns the positions along an axis, as an array that broadcasts against `x`."""
    sizes = [1] * x.ndim
    sizes[axis] = x.shape[axis]
    # Under `jit`, numbers that are counted when they are needed; NumPy's would be constants of the program.
    return lax.broadcasted_iota(int, sizes, axis) if isinstance(x, Array) else np.arange(x.shape[axis]).reshape(sizes)
