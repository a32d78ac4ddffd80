"""Kernels of large batches, block by block."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from nt_core.keywords import is_array

from nt_empirical._batches import Batch


def tiled_kernels(
    kernels_fn: Callable[[Batch, Batch], Any],
    output_axes: Any,
    batch1: Batch,
    batch2: Batch,
    batch_size: int,
) -> Any:
    """Computes kernels in blocks of at most `batch_size` rows and columns.

    Args:
      kernels_fn: takes two batches, and returns a list of pytrees of kernels.
      output_axes: pytree of the `OutputAxes` of every output.
      batch1, batch2: samples are along the first axis of all arrays; blocks below the diagonal are mirrored if both are
        the same object.
      batch_size: at least 1.
    """
    rows = split_batch(batch1, batch_size)
    columns = rows if batch2 is batch1 else split_batch(batch2, batch_size)
    grid: list[list[Any]] = []
    for i, row in enumerate(rows):
        mirrored = [_swap(grid[j][i], output_axes) for j in range(i)] if columns is rows else []
        grid.append(mirrored + [kernels_fn(row, column) for column in columns[len(mirrored) :]])
    return _concatenate([_concatenate(blocks, axis=1) for blocks in grid], axis=0)


def split_batch(batch: Batch, batch_size: int) -> list[Batch]:
    """Cuts a batch into blocks; each gets its own `rng`."""
    n = _n_samples(batch)
    starts = range(0, n, batch_size)
    if len(starts) < 2:
        return [batch]

    def block(index: int, start: int) -> Batch:
        def cut(leaf: Any) -> Any:
            return leaf[start : start + batch_size] if is_array(leaf) and leaf.ndim > 0 else leaf

        x, kwargs = jax.tree.map(cut, (batch.x, {k: v for k, v in batch.kwargs.items() if k != "rng"}))
        if batch.kwargs.get("rng") is not None:
            # The children of `fold_in(rng, 2)`: `rng` itself and `fold_in(rng, 1)` may be the keys of x1 and x2.
            kwargs["rng"] = jax.random.fold_in(jax.random.fold_in(batch.kwargs["rng"], 2), index)
        return Batch(x, kwargs)

    return [block(index, start) for index, start in enumerate(starts)]


def check_tileable(kwargs: dict[str, Any], output_axes: Any) -> None:
    """Raises a ValueError if blocks of rows and columns cannot be computed on their own."""
    for name, value in kwargs.items():
        is_pair = isinstance(value, tuple) and len(value) == 2
        if not is_pair and any(is_array(leaf) and leaf.ndim > 0 for leaf in jax.tree.leaves(value)):
            raise ValueError(
                f"With a positive `batch_size`, the array `{name}` must be given as a tuple of two arrays, for x1 and "
                "x2, with the samples along their first axis."
            )
    for axes in jax.tree.leaves(output_axes):
        if 0 in (*axes.traced, *axes.diagonal):
            raise ValueError(
                "With a positive `batch_size`, the first axis of the outputs holds the samples, and can be neither a "
                f"trace nor a diagonal axis; got trace_axes={axes.traced} and diagonal_axes={axes.diagonal}."
            )


def _n_samples(batch: Batch) -> int:
    arrays = jax.tree.leaves((batch.x, {k: v for k, v in batch.kwargs.items() if k != "rng"}))
    sizes = {leaf.shape[0] for leaf in arrays if is_array(leaf) and leaf.ndim > 0}
    if len(sizes) != 1:
        raise ValueError(
            "With a positive `batch_size`, all inputs and keywords that are arrays must have the same size along their "
            f"first axis, got sizes {sorted(sizes)}."
        )
    return sizes.pop()


def _swap(kernels: Any, output_axes: Any) -> Any:
    return [jax.tree.map(lambda axes, kernel: axes.swap(kernel), output_axes, tree) for tree in kernels]


def _concatenate(blocks: list[Any], axis: int) -> Any:
    return blocks[0] if len(blocks) == 1 else jax.tree.map(lambda *b: jnp.concatenate(b, axis=axis), *blocks)
