"""Functions of batches as functions of single samples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from nt_core.cells import NotCut
from nt_core.keywords import is_array

from nt_empirical._axes import non_negative_axis
from nt_empirical._batches import Batch, checked_outputs

VMapAxes = Any


class BatchAxes(NamedTuple):
    """Axes along which a function treats samples one by one.

    Attributes:
      inputs: axes of the inputs, None for those that all samples share; a pytree prefix, as for `jax.vmap`.
      outputs: axes of the outputs, a pytree prefix.
      kwargs: axis of every keyword that is an array or a pytree of arrays, `rng` excepted; or a dict of axes by name,
        those not named are shared.
      in_turn: whether large samples are taken in turn, see `_chunks`.
    """

    inputs: Any
    outputs: Any
    kwargs: dict[str, Any] | int | None
    in_turn: bool = False

    @classmethod
    def of(cls, vmap_axes: VMapAxes) -> "BatchAxes | None":
        """Reads the argument `vmap_axes`: the three axes, or one value for inputs and outputs; None stays None."""
        if vmap_axes is None:
            return None
        if isinstance(vmap_axes, tuple) and len(vmap_axes) == 3:
            return cls(*vmap_axes)
        return cls(vmap_axes, vmap_axes, None)

    def of_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the axes of these keywords."""
        if isinstance(self.kwargs, dict):
            return {name: self.kwargs.get(name) for name in kwargs}
        return {name: self.kwargs if name != "rng" and _is_arrays(kwargs[name]) else None for name in kwargs}


def check_first(axes: BatchAxes | None) -> None:
    """Raises `NotCut` unless samples are along the first axis of everything that has them."""
    given = [] if axes is None else jax.tree.leaves((axes.inputs, axes.outputs), is_leaf=lambda axis: axis is None)
    if any(axis != 0 for axis in given):
        raise NotCut(
            "Cell by cell, samples are along the first axis of all inputs and outputs, but `vmap_axes` has others: "
            f"{axes}."
        )


def map_samples(
    fn: Callable[[Batch], Any],
    batch: Batch,
    axes: BatchAxes,
    mapping: Callable[[Callable[[Any], Any]], Callable[[Any], Any]] = jax.vmap,
) -> Any:
    """Calls `fn` with batches of one sample, and returns arrays with the samples along a new leading axis.

    `mapping` makes a function of a sample one of many, along the leading axis: all at once, or one after the other.
    """
    leaves, structure = jax.tree.flatten((batch.x, batch.kwargs))
    leaf_axes = _axes_of_leaves((axes.inputs, axes.of_kwargs(batch.kwargs)), (batch.x, batch.kwargs))
    if all(axis is None for axis in leaf_axes):
        raise ValueError(
            f"`vmap_axes` must name an axis of the inputs, got {axes.inputs}. For no axes: vmap_axes=None."
        )

    def sample_fn(samples: list[Any]) -> Any:
        remaining = iter(samples)
        x, kwargs = structure.unflatten(
            leaf if axis is None else jnp.expand_dims(next(remaining), axis)
            for leaf, axis in zip(leaves, leaf_axes, strict=True)
        )
        return fn(Batch(x, kwargs))

    mapped = [
        jnp.moveaxis(jnp.asarray(leaf), axis, 0)
        for leaf, axis in zip(leaves, leaf_axes, strict=True)
        if axis is not None
    ]
    return mapping(sample_fn)(mapped)


def outputs_of(f: Callable[..., Any], params: Any, batch: Batch, axes: BatchAxes | None) -> Any:
    """Returns the outputs of `f` for a batch, from one sample at a time if there are `axes`."""
    if axes is None:
        return sample_outputs(f, params, batch, axes)
    outputs = map_samples(lambda sample: sample_outputs(f, params, sample, axes), batch, axes)
    leaves, structure = jax.tree.flatten(outputs)
    return structure.unflatten(
        jnp.moveaxis(y, 0, axis) for y, axis in zip(leaves, output_axes(outputs, axes), strict=True)
    )


def sample_outputs(f: Callable[..., Any], params: Any, batch: Batch, axes: BatchAxes | None) -> Any:
    """Returns the outputs of `f`; if there are `axes`, for a batch of one sample, without its axis."""
    outputs = checked_outputs(f(params, batch.x, **batch.kwargs))
    return outputs if axes is None else _drop_sample_axis(outputs, axes)


def _drop_sample_axis(outputs: Any, axes: BatchAxes) -> Any:
    """Removes the axis of the samples from the outputs for one sample."""
    leaves, structure = jax.tree.flatten(outputs)
    leaf_axes = output_axes(outputs, axes)
    for y, axis in zip(leaves, leaf_axes, strict=True):
        if y.shape[axis] != 1:
            raise ValueError(
                f"`vmap_axes` promises that outputs have one entry per sample along axis {axis}, but for a single "
                f"sample they have shape {y.shape}."
            )
    return structure.unflatten(jnp.squeeze(y, axis) for y, axis in zip(leaves, leaf_axes, strict=True))


def output_axes(outputs: Any, axes: BatchAxes) -> list[int]:
    """Returns the axis of the samples of every output, non-negative."""
    leaf_axes = _axes_of_leaves(axes.outputs, outputs)
    if None in leaf_axes:
        raise ValueError(f"`vmap_axes` must name an axis of every output, got {axes.outputs}.")
    return leaf_axes  # type: ignore[return-value]


def _axes_of_leaves(axes: Any, tree: Any) -> list[int | None]:
    """Returns the axis of every leaf of `tree`, of which `axes` is a prefix."""
    prefix, structure = jax.tree.flatten(axes, is_leaf=lambda axis: axis is None)
    try:
        branches = structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(f"`vmap_axes` has axes {axes} for {jax.tree.structure(tree)}, which do not fit.") from error
    return [
        None if axis is None else non_negative_axis(axis, jnp.ndim(leaf), "vmap_axes")
        for axis, branch in zip(prefix, branches, strict=True)
        for leaf in jax.tree.leaves(branch)
    ]


def _is_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(is_array(leaf) for leaf in leaves)
