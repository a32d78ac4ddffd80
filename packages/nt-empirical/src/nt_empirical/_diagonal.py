"""The diagonal of the tangent kernel, without the kernel."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nt_empirical._axes import Axes, Layout
from nt_empirical._batches import Batch, make_batches
from nt_empirical._ntk import NtkImplementation, ntk
from nt_empirical._vmap import BatchAxes, VMapAxes, map_samples, output_axes, outputs_of

# Samples at once: their derivatives are in memory.
SAMPLES_AT_ONCE = 32


def empirical_ntk_diagonal_fn(
    f: Callable[..., Any],
    trace_axes: Axes = (-1,),
    vmap_axes: VMapAxes = None,
    implementation: NtkImplementation | int = NtkImplementation.JACOBIAN_CONTRACTION,
    *,
    scale: Any = None,
) -> Callable[..., Any]:
    r"""Diagonal of the empirical NTK: squared norms of the gradients of each output of each sample.

    Losses of physics-informed networks are weighted by these (Wang et al., 2022, arXiv:2007.14527), and samples are
    selected by them.

    Args:
      f: ``f(params, x, **kwargs)``, returns an array or a pytree of arrays.
      trace_axes: axes of the outputs to take the mean over, by default the last one (channels).
      vmap_axes, implementation, scale: as for :func:`empirical_ntk_fn`. With ``vmap_axes`` the derivatives of some
        samples only are in memory at once; without, those of all are.

    Returns:
      ``diagonal_fn(x, params, **kwargs)``. Results have the shape of the outputs without the traced axes, and the dtype
      that the arrays in ``params`` promote to: they are the diagonal, along all pairs of axes, of
      ``empirical_ntk_fn(f, trace_axes)(x, None, params)``.

    Raises:
      ValueError, TypeError: as :func:`empirical_ntk_fn`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_empirical import empirical_ntk_diagonal_fn
      >>> diagonal_fn = empirical_ntk_diagonal_fn(lambda w, x: x @ w, vmap_axes=0)
      >>> print(diagonal_fn(jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.ones((2, 3))))
      [1. 2.]
    """
    implementation = NtkImplementation(implementation)
    layout, batch_axes = Layout(trace_axes, diagonal_axes=None), BatchAxes.of(vmap_axes)

    def diagonal_fn(x: Any, params: Any, **kwargs: Any) -> Any:
        batch, _ = make_batches(x, None, kwargs)

        def of_batch(batch: Batch) -> Any:
            return ntk(f, params, batch, batch, layout, batch_axes, implementation, scale)

        if batch_axes is None:
            return of_batch(batch)
        outputs = jax.eval_shape(lambda: outputs_of(f, params, batch, batch_axes))
        in_chunks = functools.partial(functools.partial, jax.lax.map, batch_size=SAMPLES_AT_ONCE)
        leaves, structure = jax.tree.flatten(map_samples(of_batch, batch, batch_axes, in_chunks))
        samples_at, axes = output_axes(outputs, batch_axes), layout.axes_of(outputs, outputs)

        def joined(diagonals: jax.Array, traced: tuple[int, ...], axis: int) -> jax.Array:
            """Puts the samples, along the first axis, where their axis of size 1 is, or takes their mean."""
            if axis in traced:
                return jnp.mean(diagonals, 0)
            axis -= sum(other < axis for other in traced)
            return jnp.moveaxis(jnp.squeeze(diagonals, axis + 1), 0, axis)

        entries = zip(leaves, axes, samples_at, strict=True)
        return structure.unflatten(joined(k, output.traced, axis) for k, output, axis in entries)

    return diagonal_fn
