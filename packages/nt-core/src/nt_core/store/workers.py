"""Tiles computed by the workers of an executor, which write them themselves."""

import functools
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from nt_core.grid import Cell
from nt_core.progress import with_progress
from nt_core.store.extras import load
from nt_core.store.task import Task

if TYPE_CHECKING:
    from nt_core.store.kernel_store import KernelStore


class Mapped(NamedTuple):
    """An array that lies in a file, which workers open themselves."""

    filename: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]


def compute(store: "KernelStore", task: Task, tiles: Sequence[Cell], executor: Executor, progress: bool) -> None:
    """Computes tiles, each in a call of its own. See `KernelStore.compute`."""
    if not tiles:
        return
    file = store.path / f".task.{uuid.uuid4().hex}"
    file.write_bytes(load("cloudpickle").dumps((jax.config.read("jax_enable_x64"), *_closed(task))))
    futures = []
    try:
        futures = [executor.submit(compute_tile, str(file), tile) for tile in tiles]
        # In their order, and not as they are completed, which is for futures of the standard library only.
        for future in with_progress(futures, progress, "kernel", "tile"):
            future.result()
    finally:
        for future in futures:
            future.cancel()
        file.unlink(missing_ok=True)


def compute_tile(file: str, tile: Cell) -> None:
    """Computes one tile, in a worker."""
    x64, store = _store_of(file)
    with jax.enable_x64(x64):
        store.write_tiles([tile])


@functools.lru_cache(maxsize=1)  # a worker computes many tiles, and compiles once
def _store_of(file: str) -> tuple[bool, "KernelStore"]:
    from nt_core.store.kernel_store import KernelStore

    x64, kernel_fn, x1, x2, *rest = load("cloudpickle").loads(Path(file).read_bytes())
    x1, x2 = (jax.tree.map(_opened, x, is_leaf=lambda leaf: isinstance(leaf, Mapped)) for x in (x1, x2))
    with jax.enable_x64(x64):
        return x64, KernelStore(Path(file).parent, Task(kernel_fn, x1, x2, *rest))


def _closed(task: Task) -> tuple[Any, ...]:
    """The arguments of a task, without what lies in files."""
    kernel_fn, x1, x2, *rest = task.arguments
    return kernel_fn, *(jax.tree.map(_mapped, x) for x in (x1, x2)), *rest


def _mapped(array: Any) -> Any:
    if not isinstance(array, np.memmap) or array.filename is None or not array.flags.c_contiguous:
        return array
    whole = array  # of which `array` may be a part
    while isinstance(whole.base, np.memmap):
        whole = whole.base
    return Mapped(os.fspath(array.filename), array.dtype, whole.offset + _address(array) - _address(whole), array.shape)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _opened(x: Any) -> Any:
    return np.memmap(x.filename, x.dtype, "r", x.offset, x.shape) if isinstance(x, Mapped) else x
