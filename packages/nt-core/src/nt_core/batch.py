"""Kernels of any size, cell by cell, on one device or several."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nt_core.cells import (
    Call,
    Mixed,
    NotCut,
    Shape,
    Taken,
    attribute,
    compute_cell,
    finish,
    join,
    mirror_axes,
    put,
    start,
)
from nt_core.grid import Cell, Grid, evenly
from nt_core.over_mesh import rows_over_mesh
from nt_core.progress import one_ahead, with_progress
from nt_core.tracing import is_traced

_T = TypeVar("_T")
_AXIS = "cells"
# What one cell may take where the device does not say how much memory it has, and how many arrays of the size of the
# largest one are taken to exist at once.
_BYTES = 2**31
_N_ARRAYS = 4


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
            return rows_over_mesh(compiled, Call.of(kernel_fn, args, kwargs), batching, mesh)
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


class Compiled:
    """A kernel function, compiled once for each kind of call."""

    def __init__(self, kernel_fn: Callable[..., Any]) -> None:
        self.kernel_fn = kernel_fn
        self._cells: dict[tuple[Shape, int], Callable[..., Mixed]] = {}
        self._known: dict[Any, Any] = {}
        self.whole = jax.jit(lambda arguments: Mixed(kernel_fn(*arguments.tree[0], **arguments.tree[1])))

    def cells(self, shape: Shape, n_devices: int) -> Callable[..., Mixed]:
        """Returns a function of what all cells take and what some do, one for each device; see `compute_cell`."""
        key = shape, n_devices
        if key not in self._cells:

            def one(common: Mixed, taken: Taken) -> Mixed:
                cell = jax.tree.map(lambda a: a[0], taken)
                return jax.tree.map(lambda a: a[None], compute_cell(self.kernel_fn, shape, cell, common))

            if n_devices > 1:
                whole, cut = PartitionSpec(), PartitionSpec(_AXIS)
                # Nothing goes between devices, and what `kernel_fn` does inside is its own matter: no checks.
                one = jax.shard_map(one, mesh=_mesh(n_devices), in_specs=(whole, cut), out_specs=cut, check_vma=False)
            self._cells[key] = jax.jit(one)
        return self._cells[key]

    def fits(self, call: Call, size: int) -> bool:
        """Whether a cell of this size fits in memory, by a rough estimate: the largest array in it, a few times."""
        rows, columns = min(size, call.n1), min(size, call.n2)
        shape = Shape(rows, columns, columns)

        def estimate() -> int:
            example = call.take(*_indices([(0, 0)], Grid(call.n1, call.n2, rows, columns), shape))
            return _N_ARRAYS * _largest_array(jax.make_jaxpr(self.cells(shape, 1))(call.common, example).jaxpr)

        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2 * _BYTES)
        return self.remember(("bytes", shape), call, estimate) <= memory // 2

    def remember(self, what: Any, call: Call, find: Callable[[], _T]) -> _T:
        """Returns what is the same for all calls like this one, found when it is first asked for."""
        leaves, structure = jax.tree.flatten(call)
        key = what, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]


def _cells(compiled: Compiled, call: Call, batching: Batching, n_devices: int) -> "Cells | None":
    """Returns the cells of a call, or None if there is no more than one."""
    grid = batching.grid(call.n1, call.n2, call.symmetric, n_devices, functools.partial(compiled.fits, call))
    if grid is None or grid.shape == (1, 1):
        return None
    return Cells(compiled, call, grid, min(n_devices, len(grid.cells())))


class Cells:
    """The cells of one call."""

    def __init__(self, compiled: Compiled, call: Call, grid: Grid, n_devices: int) -> None:
        self._compiled, self._call, self._n_devices = compiled, call, n_devices
        # On all devices, once.
        self._common = call.common if n_devices == 1 else jax.device_put(call.common, self._sharding())
        self.grid = grid
        self.axes = compiled.remember(("axes", grid, n_devices), call, self._mirror_axes)
        if any(pairs is None for axes in self.axes for pairs in axes.values()):
            self.grid = dataclasses.replace(grid, symmetric=False)

    def collected(self, progress: bool) -> Any:
        """Returns the kernels, each cell in the memory of the CPU as soon as it is computed."""
        kernels: list[dict[str, Any]] = []
        for cell, out in self.computed(self.grid.cells(), progress):
            kernels = kernels or [start(self.grid, fields) for fields in out["fields"]]
            for kernel, fields, axes in zip(kernels, out["fields"], self.axes, strict=True):
                put(kernel, self.grid, cell, fields, axes)
        return finish(out, kernels)

    def computed(
        self, wanted: Sequence[Cell], progress: bool, is_wanted: Callable[[Cell], bool] = lambda cell: True
    ) -> Iterator[tuple[Cell, Any]]:
        """Yields cells, and what `compute_cell` returns for them, in the memory of the CPU.

        Args:
          wanted: which cells; of those that are computed alike, in this order.
          progress: whether to show a bar.
          is_wanted: asked before each of them is computed.
        """
        chunks = with_progress(self._chunks(wanted), progress, "kernel", "cell")
        kept = (([cell for cell in cells if is_wanted(cell)], shape) for cells, shape in chunks)
        for cells, out in one_ahead(self._dispatched(*chunk) for chunk in kept if chunk[0]):
            fetched = jax.device_get(out).tree
            for number, cell in enumerate(cells):
                fields = [{k: _entry(v, number) for k, v in fields.items()} for fields in fetched["fields"]]
                yield cell, {**fetched, "fields": fields}

    def _mirror_axes(self) -> list[dict[str, Any]]:
        cells, shape = _groups(self.grid, self._call, self.grid.cells())[0]
        template = jax.eval_shape(lambda: self._compute(cells[:1] * self._n_devices, shape)).tree
        return [mirror_axes(self._compiled.kernel_fn, fields) for fields in template["fields"]]

    def joined(self) -> Any:
        """Returns the kernels, in a computation that is being traced."""
        groups = _groups(self.grid, self._call, self.grid.cells())
        order = {cell: number for number, cell in enumerate(cell for cells, _ in groups for cell in cells)}
        numbers = np.array([order[cell] for cell in self.grid.cells()])
        outs = [self._map(cells, shape) for cells, shape in groups]
        out = jax.tree.map(lambda *a: jnp.concatenate(a)[numbers], *outs).tree
        kernels = [join(self.grid, fields, axes) for fields, axes in zip(out["fields"], self.axes, strict=True)]
        return finish(out, kernels)

    def _map(self, cells: list[Cell], shape: Shape) -> Mixed:
        """Computes cells in a loop, whose derivative keeps nothing of what is within them."""
        n = self._n_devices
        padded = cells + cells[-1:] * (-len(cells) % n)
        call = jax.tree.map(jnp.asarray, self._call)
        compute = self._compiled.cells(shape, n)
        body = jax.checkpoint(lambda chunk: compute(call.common, call.take(*chunk)), prevent_cse=False)
        chunks = [jnp.asarray(a).reshape(-1, n, a.shape[1]) for a in _indices(padded, self.grid, shape)]
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[: len(cells)], lax.map(body, chunks))

    def _chunks(self, wanted: Sequence[Cell]) -> list[tuple[list[Cell], Shape]]:
        """Returns the cells that are computed at the same time."""
        groups, n = _groups(self.grid, self._call, wanted), self._n_devices
        return [(cells[i : i + n], shape) for cells, shape in groups for i in range(0, len(cells), n)]

    def _dispatched(self, cells: list[Cell], shape: Shape) -> tuple[list[Cell], Mixed]:
        return cells, self._compute(cells + cells[-1:] * (self._n_devices - len(cells)), shape)

    def _compute(self, cells: list[Cell], shape: Shape) -> Mixed:
        """Computes one cell on each device."""
        compute = self._compiled.cells(shape, self._n_devices)
        taken = self._call.take(*_indices(cells, self.grid, shape))
        if self._n_devices == 1:
            return compute(self._common, taken)
        return compute(self._common, jax.device_put(taken, self._sharding(_AXIS)))

    def _sharding(self, *axes: str) -> NamedSharding:
        return NamedSharding(_mesh(self._n_devices), PartitionSpec(*axes))


def _groups(grid: Grid, call: Call, cells: Sequence[Cell]) -> list[tuple[list[Cell], Shape]]:
    """Returns cells, and how they are computed.

    Those on the diagonal of a batch with itself are kernels of a batch with itself. That two batches are the same is
    otherwise decided by their sizes and values. Where it matters, cells that are not about the same samples, but may be
    about equal ones, get one column more, which makes them differ.
    """
    plain = Shape(grid.rows, grid.columns, grid.columns)
    if not (call.symmetric or call.knows_samples):
        return [(list(cells), plain)]
    same: list[Cell] = []
    others: list[Cell] = []
    for i, j in cells:
        (same if i == j and grid.n1 == grid.n2 else others).append((i, j))
    wider = call.knows_samples and grid.columns == grid.rows
    groups = [
        (same, dataclasses.replace(plain, alone=call.symmetric)),
        (others, dataclasses.replace(plain, columns=grid.columns + wider)),
    ]
    return [(cells, shape) for cells, shape in groups if cells]


def _indices(cells: Sequence[Cell], grid: Grid, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the samples of some cells, as `Call.take` wants them; beyond the end of a batch its last, repeated."""
    at = np.array(cells, np.int32)
    rows = at[:, :1] * grid.rows + np.arange(shape.rows)
    columns = at[:, 1:] * grid.columns + np.arange(shape.columns)
    return np.minimum(rows, grid.n1 - 1), np.minimum(columns, grid.n2 - 1), at


def _mesh(n_devices: int) -> Mesh:
    return Mesh(np.array(jax.local_devices()[:n_devices]), _AXIS)


def _entry(value: Any, number: int) -> Any:
    return value[number] if isinstance(value, np.ndarray) else value


def _largest_array(jaxpr: Any) -> int:
    """Returns the size in bytes of the largest array that is computed."""
    sizes = [v.aval.size * v.aval.dtype.itemsize for v in (*jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars))]
    inner = [value for e in jaxpr.eqns for value in jax.tree.leaves(list(e.params.values()))]
    inner = [getattr(value, "jaxpr", value) for value in inner]
    return max([*sizes, *(_largest_array(value) for value in inner if hasattr(value, "eqns"))], default=0)
