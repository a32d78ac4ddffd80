"""Kernels of any size, cell by cell, on one device or several."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nt_core.cell_programs import Cells, Compiled
from nt_core.cells import Call, Mixed, NotCut, attribute
from nt_core.grid import Grid, evenly
from nt_core.over_mesh import rows_over_mesh
from nt_core.tracing import is_traced


def batch(
    kernel_fn: Callable[..., Any],
    batch_size: int = 0,
    device_count: int = -1,
    store_on_device: bool = True,
    *,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> Callable[..., Any]:
    """Returns a function that computes the same kernel cell by cell, for batches of any size.

    The matrix over all pairs of samples is cut into square cells of one size, which one compiled program computes. Of a
    kernel of a batch with itself (`x2=None`) one triangle is computed and mirrored, exactly. Results do not depend on
    the size of the cells or the number of devices, but for rounding.

    Args:
      kernel_fn: `kernel_fn(x1, x2, ...)`, of a network, empirical, a Monte Carlo estimate, or a function of your own
        that returns kernels: arrays whose first two axes are the samples of `x1` and `x2`, a `Kernel`, a named tuple of
        its fields, or trees of these. It can be traced by `jax.jit`.
      batch_size: how many samples of each batch a cell has at most; 0 for as many as fit in memory.
      device_count: over how many of this process's devices the cells are spread; -1 for all, 0 for the one that JAX
        chooses. Under `jax.jit` -1 is 0: there the caller says where things are.
      store_on_device: whether the result is put on the default device; otherwise it stays in the memory of the CPU, and
        may be larger than a device.
      progress: whether to show a bar, if tqdm is installed, standard error is a terminal, and it takes longer than a
        second.
      mesh: devices, of several processes too (`jax.distributed`), in the place of `device_count`. Each of them computes
        some rows, in cells, and keeps them: the result is sharded along its first axis, over all axes of the mesh. All
        processes call with the same arguments, with a number of samples of `x1` that the number of devices divides, and
        ask for covariances by name. No triangle is left out.

    Returns:
      A function with the arguments and results of `kernel_fn`. Samples are along the first axis of all inputs (along
      the `batch_axis` of a network); arrays with no axes, and what is passed by position after `x2` (`params`) or under
      a name that `kernel_fn` declares as such, go to all cells. Arrays among the other keywords (`pattern`, ...) must
      be tuples of two, for `x1` and `x2`, with samples along the first axis. `rng` is one key or two, from which every
      block of samples gets its own. What is no array (`get`, `mask_constant`, flags) is compiled in, and must be
      hashable.

      Kernels as inputs, with `x2=None`, must hold covariances of a batch with itself between equal samples only
      (`diagonal_batch`).

    Raises:
      ValueError: sizes or counts that are no such; inputs or results of which the samples cannot be told.
      NotImplementedError: covariances without `diagonal_batch`, which go across cells.

    >>> import jax.numpy as jnp
    >>> from nt_core import batch, make_kernel_fn, step_rule, steps
    >>> kernel_fn = make_kernel_fn((step_rule(steps.Dense(2.0, None, 16)),))
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> print(batch(kernel_fn, batch_size=2)(x, None, "nngp"))
    [[1. 0. 1.]
     [0. 1. 1.]
     [1. 1. 2.]]
    """
    batching = Batching(batch_size, device_count, store_on_device, progress)
    batched = attribute(kernel_fn, "batched")
    if batched is not None and mesh is None:
        return batched(batching)
    compiled = Compiled(kernel_fn)

    @functools.wraps(kernel_fn)
    def batched_fn(*args: Any, **kwargs: Any) -> Any:
        if mesh is not None:
            call = Call.of(kernel_fn, args, kwargs)
            fits = functools.partial(compiled.fits, call)
            return rows_over_mesh(compiled, call, mesh, lambda n1: batching.grid(n1, call.n2, False, 1, fits))
        traced = any(map(is_traced, (jnp.add(0, 0), *jax.tree.leaves((args, kwargs)))))
        cells = None
        try:
            cells = _cells(compiled, Call.of(kernel_fn, args, kwargs), batching, batching.n_devices(traced))
        except (NotCut, NotImplementedError):
            if batching.batch_size:  # otherwise one cell will do
                raise
        if cells is not None:
            return cells.joined() if traced else batching.stored(cells.collected(batching.progress))
        return kernel_fn(*args, **kwargs) if traced else batching.stored(compiled.whole(Mixed((args, kwargs))).tree)

    batched_fn.batching = batching  # type: ignore[attr-defined]
    return batched_fn


@dataclasses.dataclass(frozen=True)
class Batching:
    """How the cells of a kernel are computed: the arguments of `batch`."""

    batch_size: int = 0
    device_count: int = -1
    store_on_device: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise ValueError(f"`batch_size` must be positive, or 0 for what fits in memory, got {self.batch_size}.")
        # Devices are asked for where they matter only: asking starts all of JAX.
        available = len(jax.local_devices()) if self.device_count > 1 else 1
        if not -1 <= self.device_count <= available:
            raise ValueError(
                f"`device_count` must be -1 (all devices), 0 (the one that JAX chooses) or at most {available}, the "
                f"number of devices of this process; got {self.device_count}."
            )

    def n_devices(self, traced: bool) -> int:
        """Over how many devices cells are spread."""
        if self.device_count == -1:
            return 1 if traced else len(jax.local_devices())
        return max(1, self.device_count)

    def grid(self, n1: int, n2: int, symmetric: bool, n_devices: int, fits: Callable[[int], bool]) -> Grid | None:
        """Returns the cells of a matrix; None if it is empty.

        Args:
          n1, n2, symmetric: the matrix.
          n_devices: over how many devices they are spread.
          fits: whether cells of that size fit in memory; asked where no size was chosen.
        """
        if 0 in (n1, n2):
            return None
        size = self.batch_size
        if not size:
            # Of a symmetric matrix with 2 d cells to a side, d (2 d + 1) are computed: as many on each of d devices.
            size = max(n1, n2) if n_devices == 1 else -(-max(n1, n2) // (2 * n_devices))
            while size > 1 and not fits(size):
                size = -(-size // 2)
        return Grid(n1, n2, evenly(n1, size), evenly(n2, size), symmetric)

    def describe(self, n1: int, n2: int, symmetric: bool) -> str:
        """Says how a matrix is computed, outside of `jax.jit`."""
        n_devices = self.n_devices(traced=False)
        devices = "1 device" if n_devices == 1 else f"{n_devices} devices"
        grid = self.grid(n1, n2, symmetric, n_devices, fits=lambda size: True)
        if grid is None:
            return "nothing"
        more = "" if self.batch_size else ", or more and smaller ones if these do not fit in memory"
        return f"{len(grid.cells())} cells of {grid.rows} x {grid.columns} samples on {devices}{more}"

    def stored(self, kernels: Any) -> Any:
        """Puts results where they are to stay."""
        device = None if self.store_on_device else jax.local_devices(backend="cpu")[0]
        arrays = np.ndarray | np.generic | jax.Array
        return jax.tree.map(lambda a: jax.device_put(a, device) if isinstance(a, arrays) else a, kernels)


def _cells(compiled: Compiled, call: Call, batching: Batching, n_devices: int) -> Cells | None:
    """Returns the cells of a call, or None if there is no more than one."""
    grid = batching.grid(call.n1, call.n2, call.symmetric, n_devices, functools.partial(compiled.fits, call))
    if grid is None or grid.shape == (1, 1):
        return None
    return Cells(compiled, call, grid, min(n_devices, len(grid.cells())))
