"""The programs that compute cells: compiled once for each kind of call, and run on one device or several."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nt_core.cells import Call, Mixed, Shape, Taken, compute_cell, finish, join, mirror_axes, put, start
from nt_core.grid import Cell, Grid
from nt_core.progress import one_ahead, with_progress

_T = TypeVar("_T")
_AXIS = "cells"
# What one cell may take where the device does not say how much memory it has, and how many arrays of the size of the
# largest one are taken to exist at once.
_BYTES = 2**31
_N_ARRAYS = 4


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
