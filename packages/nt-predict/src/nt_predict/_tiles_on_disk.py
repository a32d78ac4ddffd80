"""Tiles of a kernel in a file that ends with the process."""

import math
import shutil
import tempfile
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
from nt_core.grid import Cell


class TilesOnDisk:
    """A place for tiles of one shape and type, which behaves like a dictionary.

    They lie in a file of the system's directory for temporary files (`TMPDIR`). It has no name, and the system takes it
    back however the process ends.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it is open as long as this object is there)
        weakref.finalize(self, self._file.close)
        self._places: dict[Cell, int] = {}
        self._shape: tuple[int, ...] = ()
        self._dtype = np.dtype(float)

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._places

    def __setitem__(self, cell: Cell, tile: jax.Array) -> None:
        """Writes a tile. Raises `OSError` if the disk is full."""
        numbers = np.asarray(tile)
        self._shape, self._dtype = numbers.shape, numbers.dtype
        place = len(self._places)
        self._file.seek(place * numbers.nbytes)
        self._file.write(numbers.tobytes())
        self._places[cell] = place

    def __getitem__(self, cell: Cell) -> jax.Array:
        size = math.prod(self._shape) * self._dtype.itemsize
        self._file.seek(self._places[cell] * size)
        return jnp.asarray(np.frombuffer(self._file.read(size), self._dtype).reshape(self._shape))


def has_room_for(size: float) -> bool:
    """Whether the directory for temporary files has room for so many bytes; warns if it has not."""
    directory = tempfile.gettempdir()
    free = shutil.disk_usage(directory).free
    if size < 0.9 * free:
        return True
    warnings.warn(
        f"The kernel is computed again in every pass, which takes longer than to read it: {directory} has room for "
        f"{free / 2**30:.3g} GB, and half of the kernel takes {size / 2**30:.3g} GB. Let the environment variable "
        "TMPDIR name a directory with more room, or write it to a `KernelStore`, and give `Gram(store, get=...)`.",
        stacklevel=2,
    )
    return False
