"""Kernels that are computed by all devices of a mesh, of one process or several, and stay where they are computed."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nt_core.cells import Call, Mixed
from nt_core.grid import Grid
from nt_core.keywords import is_array

if TYPE_CHECKING:
    from nt_core.batch import Batching, Compiled


def rows_over_mesh(compiled: "Compiled", call: Call, batching: "Batching", mesh: Mesh) -> Any:
    """Returns a kernel of which each device of a mesh has computed, and keeps, some rows.

    Args:
      compiled: the kernel function.
      call: its arguments.
      batching: how the rows of a device are computed.
      mesh: the devices.
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
    rows, columns = _fitting(compiled, call, batching, call.n1 // mesh.size)
    compute = compiled.remember(
        ("mesh", mesh, rows, columns), call, lambda: _computation(compiled, call.n1, call.n2, rows, columns, mesh)
    )
    places = PartitionSpec(mesh.axis_names), PartitionSpec(), PartitionSpec()
    arguments = (call.first, call.second, call.common)
    return compute(*(_placed(a, NamedSharding(mesh, place)) for a, place in zip(arguments, places, strict=True)))


def _fitting(compiled: "Compiled", call: Call, batching: "Batching", n_rows: int) -> tuple[int, int]:
    """How many samples of each batch the cells of a device have."""
    grid = batching.grid(n_rows, call.n2, False, 1, functools.partial(compiled.fits, call))
    return (n_rows, call.n2) if grid is None else (grid.rows, grid.columns)


def _computation(compiled: "Compiled", n1: int, n2: int, rows: int, columns: int, mesh: Mesh) -> Callable[..., Any]:
    from nt_core.batch import Cells

    def rows_of_device(first: Mixed, second: Mixed, common: Mixed) -> Any:
        call = Call(n1 // mesh.size, n2, False, False, first, second, Mixed([]), common)
        kernels = Cells(compiled, call, Grid(call.n1, n2, rows, columns), 1).joined()
        if not all(is_array(leaf) and leaf.shape[:2] == (call.n1, n2) for leaf in jax.tree.leaves(kernels)):
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
