"""A kernel matrix of any size as a linear map: tile by tile, in passes over all of it.

Vectors are NumPy arrays in double precision in the memory of the CPU, and a tile's products are computed in double
precision on the device that the tile is on, whatever precision the kernel is in.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from nt_core.grid import Cell, Grid, evenly
from nt_core.products import products
from nt_core.progress import one_ahead, with_progress

from nt_predict._memory import fits_in_memory
from nt_predict._tiles_on_disk import TilesOnDisk, has_room_for

# How fast a disk is read at least.
_READ_PER_SECOND = 1e8
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
      hold: whether tiles are kept in memory once they are known, half a matrix. None chooses: in memory if they fit,
        else on disk if they are read from there sooner than they are computed, else nowhere.
      progress: whether to show a bar during a pass that takes longer than a second.
      multiple: tiles begin at multiples of so many samples, where what is read begins.
    """

    def __init__(
        self,
        n: int,
        positions: int,
        block: Callable[[np.ndarray, np.ndarray | None], jax.Array],
        hold: bool | None,
        progress: bool,
        multiple: int = 1,
    ):
        self._block = block
        self._progress = progress
        self._positions = positions
        size = multiple * -(-evenly(n, max(1, _TILE // positions)) // multiple)
        self._grid = Grid(n, n, size, size, symmetric=True)
        self.passes = 0
        self.dtype = block(np.zeros(1, int), None).dtype
        self._kept = self._place(hold)

    @property
    def kept(self) -> str:
        """Where tiles are between passes."""
        return "nowhere" if self._kept is None else "on disk" if isinstance(self._kept, TilesOnDisk) else "in memory"

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
        result = shift * padded
        cells = with_progress(self._grid.cells(), self._progress, f"pass {self.passes + 1}", "tile")
        for (rows, columns), (direct, mirrored) in one_ahead((cell, self._products(cell, padded)) for cell in cells):
            result[self._slice(rows)] += np.asarray(direct)
            if rows != columns:
                result[self._slice(columns)] += np.asarray(mirrored)
        self.passes += 1
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

    def _place(self, hold: bool | None) -> "dict[Cell, jax.Array] | TilesOnDisk | None":
        """Returns where tiles are kept."""
        if hold is None and not fits_in_memory(self.dimension, copies=0.5):
            return self._place_on_disk()
        return None if hold is False else {}

    def _place_on_disk(self) -> TilesOnDisk | None:
        """Returns a place on disk, where tiles are read from there sooner than they are computed again."""
        cell, began = (0, min(1, self._grid.shape[1] - 1)), 0.0
        for _ in range(2):  # the first one compiles
            began = time.monotonic()
            tile = jax.block_until_ready(self._compute(cell))
        seconds = time.monotonic() - began
        is_dear = tile.nbytes < _READ_PER_SECOND * seconds
        return TilesOnDisk() if is_dear and has_room_for(len(self._grid.cells()) * tile.nbytes) else None

    def _products(self, cell: Cell, vectors: np.ndarray) -> tuple[jax.Array, jax.Array]:
        tile = self._tile(cell)
        rows, columns = (vectors[self._slice(i)] for i in cell)
        with jax.enable_x64(True):
            return _products(tile, columns, rows)

    def _tile(self, cell: Cell) -> jax.Array:
        if self._kept is not None and cell in self._kept:
            return self._kept[cell]
        tile = self._compute(cell)
        if self._kept is not None:
            self._kept[cell] = tile
        return tile

    def _compute(self, cell: Cell) -> jax.Array:
        rows, columns = (self._samples(i) for i in cell)
        return self._block(rows, None if cell[0] == cell[1] else columns)

    def _samples(self, i: int) -> np.ndarray:
        """Returns the samples of a row of tiles; beyond the last one it, repeated, which vectors of zeros meet."""
        size = self._grid.rows
        return np.minimum(np.arange(i * size, (i + 1) * size), self._grid.n1 - 1)

    def _slice(self, i: int) -> slice:
        size = self._grid.rows * self._positions
        return slice(i * size, (i + 1) * size)


def _padded(samples: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([samples, np.full(size - len(samples), samples[-1])])
