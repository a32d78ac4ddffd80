"""The covariance of the outputs of a finite network."""

from collections.abc import Callable
from typing import Any

import jax

from nt_empirical._axes import Axes, Layout, axis_pairs
from nt_empirical._batches import Batch, checked_outputs, make_batches


def empirical_nngp_fn(f: Callable[..., Any], trace_axes: Axes = (-1,), diagonal_axes: Axes = ()) -> Callable[..., Any]:
    r"""Empirical NNGP of a function: products of its outputs for pairs of inputs, at given parameters.

    Their mean over random parameters is the covariance of the Gaussian process that a wide network is at initialisation
    (Lee et al., 2018, arXiv:1711.00165).

    Args:
      f: ``f(params, x, **kwargs)``, returns an array or a pytree of arrays.
      trace_axes: axes of the outputs to take the mean of the products over, by default the last one (channels).
      diagonal_axes: axes of the outputs of which only products of equal positions are wanted.

    Returns:
      ``nngp_fn(x1, x2, params, **kwargs)``. Each axis of the outputs becomes two axes side by side, a diagonal axis
      one, a trace axis none: outputs ``(4, 5, 7)`` and ``(6, 5, 7)`` give ``(4, 6, 5, 5)``, with ``diagonal_axes=1``
      they give ``(4, 6, 5)``. A pytree of outputs gives a pytree of kernels, of each output with itself.
      ``x2=None`` stands for ``x1`` and gives an exactly symmetric kernel. Kernels have the dtype of the outputs.

      A keyword that is a 2-tuple has a value for each of ``x1`` and ``x2``. ``rng`` is one key, or two: equal inputs
      get the same key, different inputs get different keys.

    Raises:
      ValueError: axes do not exist or overlap, or outputs for ``x1`` and ``x2`` do not fit.
      TypeError: outputs are not real floating-point arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_empirical import empirical_nngp_fn
      >>> nngp_fn = empirical_nngp_fn(lambda w, x: x @ w)
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> print(nngp_fn(x, None, jnp.array([[1.0, 1.0], [2.0, 0.0]])))
      [[1. 2.]
       [2. 5.]]
    """

    def nngp_fn(x1: Any, x2: Any, params: Any, **kwargs: Any) -> Any:
        return nngp(f, params, *make_batches(x1, x2, kwargs), Layout(trace_axes, diagonal_axes))

    nngp_fn.axis_pairs = lambda ndim: axis_pairs(ndim, trace_axes, diagonal_axes)  # type: ignore[attr-defined]
    return nngp_fn


def nngp(f: Callable[..., Any], params: Any, batch1: Batch, batch2: Batch, layout: Layout) -> Any:
    """Returns the empirical NNGP of two batches."""
    outputs1 = checked_outputs(f(params, batch1.x, **batch1.kwargs))
    outputs2 = outputs1 if batch2 is batch1 else checked_outputs(f(params, batch2.x, **batch2.kwargs))
    (leaves1, structure), leaves2 = jax.tree.flatten(outputs1), jax.tree.leaves(outputs2)
    axes = layout.axes_of(outputs1, outputs2)
    return structure.unflatten(
        output.contract(y1, y2).astype(y1.dtype) for output, y1, y2 in zip(axes, leaves1, leaves2, strict=True)
    )
