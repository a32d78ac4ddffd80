"""Kernels that are computed by all devices of a mesh, of one process or several, and stay where they are computed."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nt_core.cell_programs import Cells, Compiled
from nt_core.cells import Call, Mixed
from nt_core.grid import Grid
from nt_core.keywords import is_array


def rows_over_mesh(compiled: Compiled, call: Call, mesh: Mesh, grid_of: Callable[[int], Grid | None]) -> Any:
    """Returns a kernel of which each device of a mesh has computed, and keeps, some rows.

    Args:
      compiled: the kernel function.
      call: its arguments.
      mesh: the devices.
      grid_of: returns the cells of so many rows, None if they are empty.
    """
    if call.pairs.tree:
        raise TypeError("Over a mesh, a kernel function takes inputs, not a Kernel: give that of all layers.")
    if call.knows_samples:
        raise NotImplementedError("Over a mesh there are no kernels with dropout or `rng`: give no `mesh`.")
    if call.n1 == 0 or call.n1 % mesh.size:
        raise ValueError(
            f"Each of the {mesh.size} devices of the mesh gets as many rows, but x1 has {call.n1} samples. Leave some "
            f"out, or repeat the last one, and cut the result."
        )
    grid = grid_of(call.n1 // mesh.size)
    if grid is None:
        raise ValueError("Over a mesh, x2 must have samples, got none.")
    compute = compiled.remember(("mesh", mesh, grid), call, lambda: _computation(compiled, grid, mesh))
    places = PartitionSpec(mesh.axis_names), PartitionSpec(), PartitionSpec()
    arguments = (call.first, call.second, call.common)
    return compute(*(_placed(a, NamedSharding(mesh, place)) for a, place in zip(arguments, places, strict=True)))


def _computation(compiled: Compiled, grid: Grid, mesh: Mesh) -> Callable[..., Any]:
    def rows_of_device(first: Mixed, second: Mixed, common: Mixed) -> Any:
        call = Call(grid.n1, grid.n2, False, False, first, second, Mixed([]), common)
        kernels = Cells(compiled, call, grid, 1).joined()
        if not all(is_array(leaf) and leaf.shape[:2] == (grid.n1, grid.n2) for leaf in jax.tree.leaves(kernels)):
            raise ValueError("Over a mesh, ask for covariances by name: get='ntk', or get=('nngp', 'ntk').")
        return kernels

    whole, cut = PartitionSpec(), PartitionSpec(mesh.axis_names)
    # Nothing goes between devices, and what `kernel_fn` does inside is its own matter: no checks.
    return jax.jit(
        jax.shard_map(rows_of_device, mesh=mesh, in_specs=(cut, whole, whole), out_specs=cut, check_vma=False)
    )


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    """Puts arrays that every process has onto the devices of all."""

    def placed(array: Any) -> Any:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return array
        known = np.asarray(array)
        spread = sharding if known.ndim else NamedSharding(sharding.mesh, PartitionSpec())
        return jax.make_array_from_callback(known.shape, spread, lambda index: known[index])

    return jax.tree.map(placed, tree)
