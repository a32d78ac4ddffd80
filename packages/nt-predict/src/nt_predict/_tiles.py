"""A kernel matrix of any size as a linear map: tile by tile, in passes over all of it.

Vectors are NumPy arrays in double precision in the memory of the CPU, and a tile's products are computed in double
precision on the device that the tile is on, whatever precision the kernel is in.
"""

import time
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from nt_core.grid import Cell, Grid, evenly
from nt_core.products import products
from nt_core.progress import one_ahead, with_progress

# A pass that takes so many seconds is long, and a disk is read at so many bytes per second at least.
_LONG, _READ_PER_SECOND = 60, 1e8
# Rows and columns of a tile at most: large enough to keep a device busy, and small enough for any memory.
_TILE = 2048
_products = jax.jit(products)


class Tiles:
    """A symmetric kernel of samples, cut into tiles that are computed, or read, in every pass.

    Args:
      n: how many samples there are.
      positions: rows of the matrix that belong to one sample.
      block: `(samples, samples) -> (rows, columns)`, the kernel between some samples and others, of which None stands
        for the same.
      hold: whether tiles are kept once they are known: half a matrix.
      progress: whether to show a bar during a pass that takes longer than a second.
      multiple: tiles begin at multiples of so many samples, where what is read begins.
      computed: whether `block` computes the kernel, and does not read it.
    """

    def __init__(
        self,
        n: int,
        positions: int,
        block: Callable[[np.ndarray, np.ndarray | None], jax.Array],
        hold: bool,
        progress: bool,
        multiple: int = 1,
        computed: bool = False,
    ):
        self._block = block
        self._progress = progress
        self._computed = computed
        self._kept: dict[Cell, jax.Array] | None = {} if hold else None
        self._positions = positions
        size = multiple * -(-evenly(n, max(1, _TILE // positions)) // multiple)
        self._grid = Grid(n, n, size, size, symmetric=True)
        self.passes = 0
        self.dtype = block(np.zeros(1, int), None).dtype

    @property
    def dimension(self) -> int:
        """Rows of the matrix."""
        return self._grid.n1 * self._positions

    def multiply(self, vectors: np.ndarray, shift: float = 0.0) -> np.ndarray:
        """Returns `(K + shift) @ vectors` for vectors (n, columns): one pass.

        Raises:
          ValueError: the kernel has infinities or NaN.
        """
        padded = np.zeros((self._grid.padded[0] * self._positions, vectors.shape[1]))
        padded[: len(vectors)] = vectors
        result, began = shift * padded, time.monotonic()
        cells = with_progress(self._grid.cells(), self._progress, f"pass {self.passes + 1}", "tile")
        for (rows, columns), (direct, mirrored) in one_ahead((cell, self._products(cell, padded)) for cell in cells):
            result[self._slice(rows)] += np.asarray(direct)
            if rows != columns:
                result[self._slice(columns)] += np.asarray(mirrored)
        self.passes += 1
        if self._computed and self.passes == 1:
            self._advise(time.monotonic() - began)
        if not np.isfinite(result).all():
            raise ValueError("The kernel, or `diag_reg`, is infinite or not a number somewhere.")
        return result[: len(vectors)]

    def diagonal(self) -> np.ndarray:
        """Returns the diagonal, (n,)."""
        diagonal = [np.asarray(jnp.diagonal(self._tile((i, i))), np.float64) for i in range(self._grid.shape[0])]
        return np.concatenate(diagonal)[: self.dimension]

    def between(self, rows: np.ndarray) -> np.ndarray:
        """Returns the matrix between some of its rows."""
        samples, inverse = np.unique(rows // self._positions, return_inverse=True)
        at = inverse * self._positions + rows % self._positions
        block = self._block(_padded(samples, len(rows)), None)
        return np.asarray(block, np.float64)[np.ix_(at, at)]

    def columns(self, columns: np.ndarray, width: int) -> np.ndarray:
        """Returns some columns of the matrix, (n, columns).

        Args:
          columns: which.
          width: the most that is ever asked for: kernels of so many samples are computed, to be compiled once.
        """
        samples, inverse = np.unique(columns // self._positions, return_inverse=True)
        samples, at = _padded(samples, width), inverse * self._positions + columns % self._positions
        blocks = []
        for i in range(self._grid.shape[0]):
            blocks.append(np.asarray(self._block(self._samples(i), samples), np.float64)[:, at])
        return np.concatenate(blocks)[: self.dimension]

    def _advise(self, seconds: float) -> None:
        """Warns, after the first pass, where to compute the kernel again takes longer than to read it."""
        size = 0.5 * self.dimension**2 * self.dtype.itemsize
        if self._kept is None and seconds > _LONG and size < _READ_PER_SECOND * seconds:
            warnings.warn(
                f"The first pass over the kernel took {seconds:.0f} s, and each of the next ones computes it again. "
                "Write it to disk once, by `KernelStore`, and give `Gram(store, get=...)`.",
                stacklevel=2,
            )

    def _products(self, cell: Cell, vectors: np.ndarray) -> tuple[jax.Array, jax.Array]:
        tile = self._tile(cell)
        rows, columns = (vectors[self._slice(i)] for i in cell)
        with jax.enable_x64(True):
            return _products(tile, columns, rows)

    def _tile(self, cell: Cell) -> jax.Array:
        if self._kept is not None and cell in self._kept:
            return self._kept[cell]
        rows, columns = (self._samples(i) for i in cell)
        tile = self._block(rows, None if cell[0] == cell[1] else columns)
        if self._kept is not None:
            self._kept[cell] = tile
        return tile

    def _samples(self, i: int) -> np.ndarray:
        """Returns the samples of a row of tiles; beyond the last one it, repeated, which vectors of zeros meet."""
        size = self._grid.rows
        return np.minimum(np.arange(i * size, (i + 1) * size), self._grid.n1 - 1)

    def _slice(self, i: int) -> slice:
        size = self._grid.rows * self._positions
        return slice(i * size, (i + 1) * size)


def _padded(samples: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([samples, np.full(size - len(samples), samples[-1])])
