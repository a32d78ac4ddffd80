"""One covariance matrix of a store: an array in the zarr format, one chunk a tile."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nt_core.grid import Cell, Grid, mirrored, swapped
from nt_core.store.extras import load


class MissingTiles(LookupError):
    """What was asked for is not computed yet."""


class DamagedTiles(OSError):
    """What was asked for is on disk, but not what was written."""


class StoredMatrix:
    """A matrix over pairs of samples that lies on disk; read it like an array of NumPy.

    Indexing takes integers, slices, and arrays of integers or booleans for each of the two axes of samples, which
    choose rows and columns independently of each other, and integers and slices for further axes. It reads the tiles
    that are needed, and computes nothing. Of a symmetric matrix the tiles below the diagonal are mirrored.

    Attributes:
      path: its folder, an array that every library for zarr 3 reads (the upper triangle only, if it is symmetric).
      grid: the tiles.
      shape, dtype: of the matrix.
    """

    def __init__(
        self, path: Path, grid: Grid, entry: tuple[int, ...], dtype: str, axes: list[list[int]] | None
    ) -> None:
        """Opens an array, and makes it if it is not there.

        Args:
          path: its folder.
          grid: the tiles.
          entry: the shape of the covariances of two samples.
          dtype: of the array.
          axes: of a symmetric matrix, the pairs of axes that its mirror image has exchanged.
        """
        self.path, self.grid, self.dtype = path, grid, np.dtype(dtype)
        self.shape = (grid.n1, grid.n2, *entry)
        self._axes = axes
        self._array = _open(path, self.shape, (grid.rows, grid.columns, *entry), dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredMatrix({str(self.path)!r}, shape={self.shape}, dtype={self.dtype})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("A matrix on disk cannot become an array without a copy.")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        if any(k is Ellipsis for k in key):
            at = next(i for i, k in enumerate(key) if k is Ellipsis)
            key = (*key[:at], *[slice(None)] * (self.ndim - len(key) + 1), *key[at + 1 :])
        if len(key) > self.ndim:
            raise IndexError(f"{len(key)} indices for a matrix with {self.ndim} axes.")
        both = (*key, *[slice(None)] * (2 - len(key)))[:2]
        rows, columns = (_numbers(k, n) for k, n in zip(both, self.shape, strict=False))
        block = self._read(rows, columns)
        squeezed = tuple(slice(None) if isinstance(k, slice) or np.ndim(k) else 0 for k in both)
        return block[(*squeezed, *key[2:])]

    def write(self, tile: Cell, values: np.ndarray) -> Any:
        """Begins to write a tile, all at once or not at all; the result's `result()` waits for its end."""
        rows, columns = self.grid.samples(tile)
        inside = values[: rows.stop - rows.start, : columns.stop - columns.start]
        return self._array[rows, columns].write(inside)

    def has(self, tile: Cell) -> bool:
        """Whether a tile is on disk."""
        return self._file(tile).exists()

    def n_bytes(self, tile: Cell) -> int:
        """What a tile takes on disk."""
        return self._file(tile).stat().st_size

    @property
    def chunk_bytes(self) -> int:
        """What a whole tile takes on disk, without its checksum."""
        return self.grid.rows * self.grid.columns * math.prod(self.shape[2:]) * self.dtype.itemsize

    def tiles(self) -> set[Cell]:
        """Returns the tiles that are on disk."""
        found = set()
        for row in _names(self.path / "c"):
            found.update((int(row), int(column)) for column in _names(self.path / "c" / row))
        return found

    def is_intact(self, tile: Cell) -> bool:
        """Whether a tile can be read, and is what was written."""
        try:
            self._tile(tile)
        except DamagedTiles:
            return False
        return True

    def remove(self, tile: Cell) -> None:
        """Removes a tile from the disk."""
        self._file(tile).unlink(missing_ok=True)

    def _file(self, tile: Cell) -> Path:
        return self.path / self.grid.key(tile)

    def _read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), len(columns), *self.shape[2:]), self.dtype)
        in_row, in_column = rows // self.grid.rows, columns // self.grid.columns
        for i in np.unique(in_row):
            for j in np.unique(in_column):
                at = np.flatnonzero(in_row == i), np.flatnonzero(in_column == j)
                local = rows[at[0]] - i * self.grid.rows, columns[at[1]] - j * self.grid.columns
                out[np.ix_(*at)] = self._mirrored_tile((int(i), int(j)))[np.ix_(*local)]
        return out

    def _mirrored_tile(self, tile: Cell) -> np.ndarray:
        """Reads a tile of a matrix of which, if it is symmetric, the upper triangle is stored."""
        if self._axes is None or tile[0] < tile[1]:
            return self._tile(tile)
        if tile[0] == tile[1]:
            return mirrored(self._tile(tile), [(a, b) for a, b in self._axes])
        return swapped(self._tile((tile[1], tile[0])), [(a, b) for a, b in self._axes])

    def _tile(self, tile: Cell) -> np.ndarray:
        if not self.has(tile):
            raise MissingTiles(
                f"Tile {tile} of {self.path} is not computed yet: see `KernelStore.status` and `compute`."
            )
        try:
            return self._array[self.grid.samples(tile)].read().result()
        except ValueError as error:  # as tensorstore says that the checksum does not fit, or bytes are missing
            raise DamagedTiles(
                f"Tile {tile} of {self.path} is damaged: `KernelStore.verify` removes it, and `compute` makes it anew."
            ) from error


def _open(path: Path, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str) -> Any:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": shape,
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default"},  # as `Grid.key`
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "fill_value": "NaN",
        },
    }
    return load("tensorstore").open(spec, open=True, create=True).result()


def _numbers(key: Any, n: int) -> np.ndarray:
    """The numbers of the samples that an index chooses."""
    if isinstance(key, slice):
        return np.arange(n)[key]
    if key is None or np.ndim(key) > 1:
        raise IndexError(f"Samples are chosen by integers, slices, or arrays of one axis, not by {key!r}.")
    return np.atleast_1d(np.arange(n)[key])


def _names(folder: Path) -> Sequence[str]:
    return [name for name in os.listdir(folder) if name.isdigit()] if folder.is_dir() else []
