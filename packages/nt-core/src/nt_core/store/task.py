"""What a store is the result of: a kernel function and its arguments."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from nt_core.cell_programs import Cells, Compiled
from nt_core.cells import Call, Shape
from nt_core.get import Get, parse_get
from nt_core.grid import Cell, Grid
from nt_core.kernel import Kernel
from nt_core.keywords import is_absent
from nt_core.store.fingerprint import fingerprint
from nt_core.trees import nt_tree_leaves

NAMES = ("nngp", "ntk")
# Files of 1 to 16 MB suit disks and the file systems of clusters.
_USUAL_BYTES = 2**23
_LARGEST_USUAL_TILE = 1024


def usual_tile(pair_bytes: int) -> int:
    """Returns how many samples a tile has where none is asked for, by what two samples take in a matrix.

    >>> usual_tile(4), usual_tile(8), usual_tile(4 * 64**2), usual_tile(2**24)
    (1024, 1024, 16, 1)
    """
    tile = _LARGEST_USUAL_TILE
    while tile > 1 and tile**2 * pair_bytes > _USUAL_BYTES:
        tile //= 2
    return tile


class Task:
    """A kernel function and its arguments, of which tiles can be computed."""

    def __init__(
        self, kernel_fn: Callable[..., Any], x1: Any, x2: Any, get: Get, tile: int | None, kwargs: dict[str, Any]
    ) -> None:
        if tile is not None and tile < 1:
            raise ValueError(f"`tile` must be positive, got {tile}.")
        if any(isinstance(leaf, Kernel) for leaf in nt_tree_leaves(x1)):
            raise TypeError("A store is of inputs, not of a Kernel: give arrays and the kernel function of all layers.")
        x2, names = None if is_absent(x2) else x2, parse_get(get, NAMES)
        self._names = names
        self._compiled = Compiled(kernel_fn)
        takes_get = "get" in inspect.signature(kernel_fn).parameters
        self._call = Call.of(kernel_fn, (x1, x2), {**kwargs, **({"get": names} if takes_get else {})})
        self._cells: dict[int, Cells] = {}
        n1, n2 = self._call.n1, self._call.n2
        if 0 in (n1, n2):
            raise ValueError(f"A store needs samples, got batches of {n1} and {n2}.")
        self._probe = self._first_with_last()
        tile = tile or usual_tile(max(value.nbytes for value in self._probe.values()))
        self.arguments = kernel_fn, x1, x2, names, tile, kwargs
        self._grid = Grid(n1, n2, min(tile, n1), min(tile, n2), self._call.symmetric)

    def describe(self) -> dict[str, Any]:
        """Returns all that a store knows of itself."""
        kernel_fn, x1, x2, names, _, _ = self.arguments
        probe, cells = self._probe, self._on(1)
        return {
            "of": fingerprint(kernel_fn, self._call, x1, x2, names, probe),
            "grid": dataclasses.asdict(cells.grid),
            "matrices": {
                name: {
                    "dtype": str(value.dtype),
                    "entry": list(value.shape[2:]),
                    "axes": self._named(cells.axes[0])[name] if cells.grid.symmetric else None,
                }
                for name, value in probe.items()
            },
        }

    def computed(
        self, tiles: Sequence[Cell], device_count: int, progress: bool, is_wanted: Callable[[Cell], bool]
    ) -> Iterator[tuple[Cell, dict[str, np.ndarray]]]:
        """Yields tiles and their covariances by name."""
        n_devices = len(jax.local_devices()) if device_count == -1 else max(1, device_count)
        cells = self._on(min(n_devices, max(1, len(tiles))))
        for tile, out in cells.computed(tiles, progress, is_wanted):
            yield tile, self._named(out["fields"][0])

    def _on(self, n_devices: int) -> Cells:
        if n_devices not in self._cells:
            self._cells[n_devices] = Cells(self._compiled, self._call, self._grid, n_devices)
        return self._cells[n_devices]

    def _first_with_last(self) -> dict[str, np.ndarray]:
        """Returns the covariances of the first sample of the one batch with the last one of the other."""
        first, last, at = np.zeros((1, 1), int), np.full((1, 1), self._call.n2 - 1), np.zeros((1, 2), int)
        out = self._compiled.cells(Shape(1, 1, 1), 1)(self._call.common, self._call.take(first, last, at))
        fields = jax.device_get(out).tree["fields"]
        if len(fields) != 1:
            raise TypeError(
                f"A store holds the kernels of one pair of batches, the kernel function returns {len(fields)}."
            )
        return {name: value[0] for name, value in self._named(fields[0]).items()}

    def _named(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The covariances that are wanted; an array that has no name has the one that was asked for."""
        names = self._names
        if len(fields) == 1 and len(names) == 1:
            return dict(zip(names, fields.values(), strict=True))
        if any(fields.get(name) is None for name in names):
            has = [name for name in NAMES if fields.get(name) is not None]
            raise ValueError(
                f"The kernel function returns {' and '.join(has)}, but `get` asks for {' and '.join(names)}."
            )
        return {name: fields[name] for name in names}
