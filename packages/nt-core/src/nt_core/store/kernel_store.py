"""A kernel matrix on disk, and its computation tile by tile."""

import dataclasses
import json
import os
import uuid
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from nt_core.get import Get
from nt_core.grid import Cell, Grid
from nt_core.store import workers
from nt_core.store.extras import load
from nt_core.store.fingerprint import differences
from nt_core.store.matrix import StoredMatrix
from nt_core.store.task import NAMES, Task

# Under this name the description of a store stands in the attributes of its group, as zarr has them.
_ATTRIBUTE = "nt_core"
# Above so many files below such a size there is a warning.
_MANY_FILES, _SMALL_BYTES = 10_000, 2**20


@dataclasses.dataclass(frozen=True)
class Status:
    """How far a store is.

    Attributes:
      done: how many tiles are on disk, in all of its matrices.
      total: how many there are to compute; of a symmetric matrix one triangle.
      bytes: what the tiles on disk take.
    """

    done: int
    total: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.done} of {self.total} tiles ({self.bytes / 2**30:.2f} GiB)"


class KernelStore:
    """A kernel matrix on disk that is computed tile by tile, and goes on where it was when it was killed.

    `create` makes or resumes one for a kernel function; `KernelStore(path)` opens one to read. A tile is written all at
    once when it is computed; its file says that it is done. The folder is a group in the zarr format with an array for
    each of NNGP and NTK, one chunk a tile, with checksums; any library for zarr 3 reads it (of a symmetric matrix, the
    upper triangle).

    Several processes may compute at once, on one machine or on several that share a file system: see `compute`.

    Attributes:
      path: the folder.
      grid: the tiles.
      matrices: NNGP and NTK by name, also as `store.nngp` and `store.ntk`: arrays to read from. See `StoredMatrix`.

    >>> import tempfile
    >>> import numpy as np
    >>> from nt_core import KernelStore, make_kernel_fn, step_rule, steps
    >>> kernel_fn = make_kernel_fn((step_rule(steps.Dense(2.0, None, 16)),))
    >>> x = np.random.default_rng(0).normal(size=(10, 3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = KernelStore.create(f"{folder}/kernel", kernel_fn, x, tile=4)
    ...     store.compute()
    ...     print(store.status(), store.ntk[2:7, 1].shape)
    6 of 6 tiles (0.00 GiB) (5,)
    """

    def __init__(self, path: str | os.PathLike[str], task: Task | None = None) -> None:
        """Opens a store, to read if there is no task. See `create`.

        Args:
          path: its folder.
          task: what computes its tiles.

        Raises:
          FileNotFoundError: there is no store.
        """
        self.path = Path(path).absolute()
        self._task = task
        about = _read_description(self.path)
        if about is None:
            raise FileNotFoundError(f"There is no kernel store at {self.path}; `KernelStore.create` makes one.")
        self._about = about
        self.grid = Grid(**about["grid"])
        self.matrices = {
            name: StoredMatrix(self.path / name, self.grid, tuple(m["entry"]), m["dtype"], m["axes"])
            for name, m in about["matrices"].items()
        }

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        kernel_fn: Callable[..., Any],
        x1: Any,
        x2: Any = None,
        *,
        get: Get = NAMES,
        tile: int | None = None,
        **kwargs: Any,
    ) -> "KernelStore":
        """Makes a store for the kernel of two batches, or opens the one that is there, to go on with it.

        Nothing is computed yet, but for one entry, by which the kernel function is known again.

        Args:
          path: the folder, which is made if it is not there.
          kernel_fn: a kernel function as `batch` takes it: of a network, empirical, or of your own. Its batches have
            their samples along the first axis (a network's along its `batch_axis`).
          x1, x2: the batches; `x2=None` stands for `x1`. Arrays that are mapped from files (`numpy.memmap`) stay there,
            and are read tile by tile.
          get: "nngp", "ntk" or both.
          tile: how many samples of each batch there are in a tile. By default at most 1024, and fewer where the file of
            a tile, which holds the covariances of all positions, would be larger than 8 MB. What is lost when a
            computation is killed is a tile.
          **kwargs: for `kernel_fn`, as `batch` takes them.

        Raises:
          ValueError: the store at `path` is of another kernel; the message says what differs.

        Returns:
          The store.
        """
        task = Task(kernel_fn, x1, x2, get, tile, kwargs)
        path, given = Path(path).absolute(), task.describe()
        if _read_description(path) is None:
            _write_description(path, given)
        stored = _read_description(path)  # ours, or that of a process that was faster
        assert stored is not None
        differing = differences(stored["of"], given["of"])
        if stored["grid"] != given["grid"]:
            differing.append(f"tile: the store has {stored['grid']['rows']}, given was {given['grid']['rows']}")
        if differing:
            raise ValueError(
                f"The store at {path} is of another kernel:\n  "
                + "\n  ".join(differing)
                + "\nChoose another path, or remove that folder."
            )
        store = cls(path, task)
        store._warn_of_small_files()
        return store

    @property
    def nngp(self) -> StoredMatrix:
        """The NNGP kernel."""
        return self._matrix("nngp")

    @property
    def ntk(self) -> StoredMatrix:
        """The tangent kernel."""
        return self._matrix("ntk")

    def _matrix(self, name: str) -> StoredMatrix:
        if name not in self.matrices:
            raise AttributeError(f"The store at {self.path} has {' and '.join(self.matrices)} only, not {name}.")
        return self.matrices[name]

    def __repr__(self) -> str:
        return f"KernelStore({str(self.path)!r}): {' and '.join(self.matrices)}, {self.status()}"

    def status(self) -> Status:
        """Says how far the computation is, by what is on disk."""
        done = self._done()
        n_bytes = sum(matrix.n_bytes(tile) for matrix in self.matrices.values() for tile in done)
        return Status(len(done), len(self.grid.cells()), n_bytes)

    def missing(self) -> list[Cell]:
        """Returns the tiles that are not on disk, in the order in which they are computed."""
        done = self._done()
        return [tile for tile in self.grid.cells() if tile not in done]

    def compute(
        self,
        *,
        process: int = 0,
        of: int = 1,
        executor: Executor | None = None,
        device_count: int = -1,
        progress: bool = True,
    ) -> None:
        """Computes the tiles that are missing, and returns when all are there.

        Can be killed at any time, and called again: tiles that are on disk are not computed again.

        Args:
          process, of: this is one of so many processes that were given the same task, for instance by an array of jobs.
            It computes the tiles `process`, `process + of`, ...; then all that are missing, whoever was to compute them
            (so that a tile may be computed twice, with the same result). They do not speak with each other.
          executor: anything with `submit` as `concurrent.futures.Executor` has it: computes the tiles, each in a call
            of its own. Its workers write what they compute themselves, so they must see the same folder; they get the
            kernel function and the inputs through a file in it, which is removed in the end.
          device_count: over how many devices of this process tiles are spread; -1 for all. Not for executors.
          progress: whether to show a bar, if tqdm is installed, standard error is a terminal, and it takes longer than
            a second.

        Raises:
          ValueError: the store was opened to read, or the numbers are no such.
          OSError: a tile could not be written. Those before it are on disk.
        """
        task = self._with_task()
        if not 0 <= process < of:
            raise ValueError(f"`process` must be one of 0, ..., {of - 1} as `of` is {of}, got {process}.")
        if executor is not None:
            return workers.compute(self, task, self.missing()[process::of], executor, progress)
        tiles = self.grid.cells()
        own = tiles[process::of]
        # Where all do what is left over, each begins at another place.
        start = process * len(tiles) // of
        own_and_others = dict.fromkeys((*own, *tiles[start:], *tiles[:start]))
        done = self._done()
        self.write_tiles([tile for tile in own_and_others if tile not in done], device_count, progress)

    def write_tiles(self, tiles: Sequence[Cell], device_count: int = 0, progress: bool = False) -> None:
        """Computes and writes tiles, except those that are on disk when their turn comes.

        Args:
          tiles: which.
          device_count, progress: as for `compute`.
        """
        writing: list[tuple[Cell, Any]] = []
        for tile, values in self._with_task().computed(tiles, device_count, progress, lambda t: not self._has(t)):
            # Written while the next one is computed.
            _finish(writing, self.path)
            writing = [(tile, self.matrices[name].write(tile, value)) for name, value in values.items()]
        _finish(writing, self.path)

    def verify(self) -> list[Cell]:
        """Reads all tiles that are on disk, and removes those that are damaged, which `compute` makes anew.

        Returns:
          The tiles that were damaged.
        """
        damaged = []
        for tile in sorted(self._done()):
            if not all(matrix.is_intact(tile) for matrix in self.matrices.values()):
                damaged.append(tile)
                for matrix in self.matrices.values():
                    matrix.remove(tile)
        return damaged

    def _warn_of_small_files(self) -> None:
        smallest, n_tiles = min(matrix.chunk_bytes for matrix in self.matrices.values()), len(self.grid.cells())
        if smallest < _SMALL_BYTES and n_tiles > _MANY_FILES:
            warnings.warn(
                f"The store at {self.path} will have {n_tiles:,} files of {smallest / 2**10:.0f} KiB for each matrix. "
                f"Most file systems are faster with fewer of 1 to 16 MiB: give a larger `tile` than {self.grid.rows}.",
                stacklevel=3,
            )

    def _with_task(self) -> Task:
        if self._task is None:
            raise ValueError("This store was opened to read. `KernelStore.create`, with its arguments, computes more.")
        return self._task

    def _done(self) -> set[Cell]:
        done = set.intersection(*(matrix.tiles() for matrix in self.matrices.values()))
        return done & set(self.grid.cells())

    def _has(self, tile: Cell) -> bool:
        return all(matrix.has(tile) for matrix in self.matrices.values())


def _finish(writing: list[tuple[Cell, Any]], path: Path) -> None:
    """Waits until what is being written is on disk."""
    for tile, write in writing:
        try:
            write.result()
        except Exception as error:  # of tensorstore, of various types
            raise OSError(
                f"Tile {tile} could not be written to {path}: {error}\n"
                "The tiles before it are on disk. Make room, or see to the permissions, and call `compute` again."
            ) from error


def _read_description(path: Path) -> dict[str, Any] | None:
    file = path / "zarr.json"
    if not file.exists():
        return None
    about = json.loads(file.read_text()).get("attributes", {}).get(_ATTRIBUTE)
    if about is None:
        raise ValueError(f"The folder {path} holds something else in the zarr format. Choose another path.")
    return about


def _write_description(path: Path, about: dict[str, Any]) -> None:
    """Writes the description of a store, at once, unless another process has."""
    load("tensorstore")  # before anything is on disk
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {_ATTRIBUTE: about}}, indent=1)
    temporary = path / f".zarr.json.{uuid.uuid4().hex}"
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path / "zarr.json")
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)
