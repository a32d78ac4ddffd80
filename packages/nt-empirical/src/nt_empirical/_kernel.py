"""NNGP and NTK of a finite network, by name."""

from collections.abc import Callable
from typing import Any

import jax
from nt_core.get import Get, as_named, parse_get

from nt_empirical._axes import Axes, Layout
from nt_empirical._batches import make_batches
from nt_empirical._nngp import nngp
from nt_empirical._ntk import NtkImplementation, ntk, pairs_of_axes
from nt_empirical._vmap import BatchAxes, VMapAxes

KERNELS = ("nngp", "ntk")


def empirical_kernel_fn(
    f: Callable[..., Any],
    trace_axes: Axes = (-1,),
    diagonal_axes: Axes = (),
    vmap_axes: VMapAxes = None,
    implementation: NtkImplementation | int = NtkImplementation.JACOBIAN_CONTRACTION,
    _j_rules: bool = True,
    _s_rules: bool = True,
    _fwd: bool | None = None,
    *,
    scale: Any = None,
) -> Callable[..., Any]:
    """Empirical NNGP and NTK of a function.

    Args:
      f: ``f(params, x, **kwargs)``, returns an array or a pytree of arrays.
      trace_axes, diagonal_axes, vmap_axes, implementation: as for :func:`empirical_ntk_fn`; so are the private ones.
      scale: of the NTK, as there.

    Returns:
      ``kernel_fn(x1, x2, get, params, **kwargs)``. ``get`` is ``'nngp'`` or ``'ntk'``, for the bare kernel; or a
      tuple of them, for a named tuple ``EmpiricalKernel``; None is both. What is not asked for is not computed. A
      pytree of outputs gives a pytree of these. The other arguments, and shapes and dtypes of the kernels, are those of
      :func:`empirical_nngp_fn` and :func:`empirical_ntk_fn`.

    Raises:
      KeyError: ``get`` names something else.
      ValueError: ``get`` is empty or has duplicates, and as :func:`empirical_ntk_fn`.
      TypeError: as :func:`empirical_ntk_fn`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_empirical import empirical_kernel_fn
      >>> kernel_fn = empirical_kernel_fn(lambda w, x: x @ w)
      >>> x = jnp.array([[1.0, 1.0]])
      >>> kernel = kernel_fn(x, None, None, jnp.array([[1.0], [2.0]]))
      >>> print(kernel.nngp, kernel.ntk)
      [[9.]] [[2.]]
    """
    implementation = NtkImplementation(implementation)
    layout, batch_axes = Layout(trace_axes, diagonal_axes), BatchAxes.of(vmap_axes)

    def kernel_fn(x1: Any, x2: Any, get: Get, params: Any, **kwargs: Any) -> Any:
        names = parse_get(get, KERNELS)
        batch1, batch2 = make_batches(x1, x2, kwargs)
        kernel_fns = {
            "nngp": lambda: nngp(f, params, batch1, batch2, layout),
            "ntk": lambda: ntk(f, params, batch1, batch2, layout, batch_axes, implementation, scale),
        }
        kernels = [kernel_fns[name]() for name in names]
        return jax.tree.map(
            lambda *values: as_named(get, "EmpiricalKernel", dict(zip(names, values, strict=True))), *kernels
        )

    kernel_fn.axis_pairs = pairs_of_axes(trace_axes, diagonal_axes, batch_axes)  # type: ignore[attr-defined]
    return kernel_fn
