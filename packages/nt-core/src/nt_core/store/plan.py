"""How long a kernel matrix will take, from a tile that is timed."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from nt_core.get import Get
from nt_core.grid import Grid
from nt_core.store.task import Task, usual_tile

_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("s", 1.0))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel matrix takes. Print it.

    Attributes:
      grid: the tiles.
      names: of the covariances that are stored.
      bytes_per_pair: of them all, for two samples.
      seconds_per_pair: what the computation took here for two samples.
      timed: samples along a side of the tile that was timed.
    """

    grid: Grid
    names: tuple[str, ...]
    bytes_per_pair: int
    seconds_per_pair: float
    timed: int

    @property
    def n_tiles(self) -> int:
        """How many tiles there are to compute."""
        return len(self.grid.cells())

    @property
    def bytes(self) -> int:
        """What they take on disk."""
        return self.n_tiles * self.grid.rows * self.grid.columns * self.bytes_per_pair

    def seconds(self, nodes: int = 1) -> float:
        """Returns how long so many machines like this one take, of which each computes whole tiles."""
        return math.ceil(self.n_tiles / nodes) * self.grid.rows * self.grid.columns * self.seconds_per_pair

    def __str__(self) -> str:
        grid, pair = self.grid, self.seconds_per_pair
        lines = [
            f"{grid.n1} x {grid.n2} samples, {' and '.join(self.names)}{', one triangle' if grid.symmetric else ''}: "
            f"{self.n_tiles:,} tiles of {grid.rows} x {grid.columns}, {self.bytes / 2**30:,.1f} GiB",
            f"{self.timed} x {self.timed} pairs took {1e3 * pair:.3g} ms each",
            *(f"{nodes:3} x this machine: {_in_words(self.seconds(nodes))}" for nodes in (1, 8, 64)),
        ]
        return "\n".join(lines)


def plan(
    kernel_fn: Callable[..., Any],
    x1: Any,
    x2: Any = None,
    *,
    n1: int | None = None,
    n2: int | None = None,
    get: Get = ("nngp", "ntk"),
    tile: int | None = None,
    timed: int = 32,
    **kwargs: Any,
) -> Plan:
    """Times a small tile of a kernel matrix, and says what the whole of it will take.

    Args:
      kernel_fn, x1, x2, get, tile, kwargs: as for `KernelStore.create`. A part of the batches will do.
      n1, n2: how many samples there will be; by default those that are given.
      timed: how many samples of each batch the tile that is timed has at most. Where a pair takes microseconds, small
        tiles take longer for each.

    Returns:
      A plan, to be printed.

    >>> import numpy as np
    >>> from nt_core import make_kernel_fn, step_rule, steps
    >>> from nt_core.store import plan
    >>> kernel_fn = make_kernel_fn((step_rule(steps.Dense(2.0, None, 16)),))
    >>> whole = plan(kernel_fn, np.ones((10, 3)), n1=60_000)
    >>> whole.n_tiles, f"{whole.bytes / 2**30:.1f} GiB", whole.seconds(8) < whole.seconds(1)
    (1770, '13.8 GiB', True)
    """
    task = Task(kernel_fn, x1, x2, get, timed, kwargs)
    described = task.describe()
    small, entries = Grid(**described["grid"]), described["matrices"]
    first_and_last = small.cells()[0], small.cells()[-1]
    for _ in task.computed(first_and_last, 1, False, lambda _: True):  # compiles both kinds of tiles
        pass
    timed_cell = small.cells()[min(1, len(small.cells()) - 1)]  # not on the diagonal, if there is another
    start = time.perf_counter()
    for _ in task.computed([timed_cell], 1, False, lambda _: True):
        pass
    seconds = time.perf_counter() - start
    n1 = small.n1 if n1 is None else n1
    n2 = n1 if small.symmetric else small.n2 if n2 is None else n2
    pair_bytes = [math.prod(m["entry"]) * int(m["dtype"][-2:]) // 8 for m in entries.values()]
    tile = tile or usual_tile(max(pair_bytes))
    return Plan(
        Grid(n1, n2, min(tile, n1), min(tile, n2), small.symmetric),
        tuple(entries),
        sum(pair_bytes),
        seconds / (small.rows * small.columns),
        small.rows,
    )


def _in_words(seconds: float) -> str:
    name, unit = next((u for u in _UNITS if seconds >= 2 * u[1]), _UNITS[-1])
    return f"{seconds / unit:,.3g} {name}"
