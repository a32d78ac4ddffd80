"""Kernels of infinite networks, estimated by finite ones."""

import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from nt_core import batch
from nt_core.batch import Batching
from nt_core.get import Get, parse_get
from nt_core.keywords import split_kwargs

from nt_empirical._axes import Axes
from nt_empirical._kernel import KERNELS, empirical_kernel_fn
from nt_empirical._ntk import NtkImplementation
from nt_empirical._vmap import VMapAxes


def monte_carlo_kernel_fn(
    init_fn: Callable[..., Any],
    apply_fn: Callable[..., Any],
    key: jax.Array,
    n_samples: int | Iterable[int],
    batch_size: int = 0,
    device_count: int = -1,
    store_on_device: bool = True,
    trace_axes: Axes = (-1,),
    diagonal_axes: Axes = (),
    vmap_axes: VMapAxes = None,
    implementation: NtkImplementation | int = NtkImplementation.JACOBIAN_CONTRACTION,
    _j_rules: bool = True,
    _s_rules: bool = True,
    _fwd: bool | None = None,
) -> Callable[..., Any]:
    """Mean of the empirical kernels of networks with random parameters.

    The mean converges to the kernels of the infinitely wide network as samples, and width, grow (Novak et al., 2019,
    arXiv:1810.05148).

    Args:
      init_fn: ``init_fn(rng, input_shape)``, returns ``(output_shape, params)``; can be traced.
      apply_fn: ``apply_fn(params, x, **kwargs)``, returns an array or a pytree of arrays. It gets a keyword ``rng``.
      key: key of ``jax.random``. The same key draws the same parameters, whatever the other arguments.
      n_samples: number of networks, or several numbers for estimates on the way.
      batch_size, device_count, store_on_device: how the kernel of each network is computed cell by cell, as for
        :func:`nt_core.batch`. The samples are along the first axis of inputs and outputs; where they are not, and
        ``batch_size`` is 0, there is one cell.
      trace_axes, diagonal_axes, vmap_axes, implementation: as for :func:`empirical_ntk_fn`; so are the private ones.

    Returns:
      ``kernel_fn(x1, x2=None, get=None, **kwargs)``. ``get`` is ``'nngp'`` or ``'ntk'``, for the bare estimate; or a
      tuple of them, for a named tuple ``EmpiricalKernel``; None is both. If ``n_samples`` is an iterable, the result
      is a generator of these, one for each number in increasing order. A pytree of outputs gives pytrees of these.
      Keywords go to ``apply_fn``; a 2-tuple has a value for each of ``x1`` and ``x2``. With several cells, arrays
      among them must be such 2-tuples. Values that are not arrays are compiled in.

      In networks with dropout the masks depend on the cells, as the samples of a block share a key; the expectation
      does not.

    Raises:
      TypeError: ``n_samples`` is neither an integer nor iterable; ``rng`` is given to ``kernel_fn``.
      ValueError: ``n_samples`` has numbers that are no positive integers; as :func:`nt_core.batch`, and as
        :func:`empirical_kernel_fn`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nt_empirical import monte_carlo_kernel_fn
      >>> def init_fn(rng, input_shape):
      ...     return input_shape[:-1] + (100,), jax.random.normal(rng, (input_shape[-1], 100))
      >>> def apply_fn(w, x, **kwargs):
      ...     return x @ w
      >>> kernel_fn = monte_carlo_kernel_fn(init_fn, apply_fn, jax.random.key(0), n_samples=1000)
      >>> print(kernel_fn(jnp.array([[1.0, 0.0], [1.0, 1.0]]), None, "nngp").round(1))
      [[1. 1.]
       [1. 2.]]
    """
    counts = _sample_counts(n_samples)
    empirical = empirical_kernel_fn(apply_fn, trace_axes, diagonal_axes, vmap_axes, implementation)
    sample_fn = batch(empirical, batch_size, device_count, store_on_device, progress=False)

    @jax.jit
    def draw(sample_key: jax.Array, x1: Any, x2: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        init_key, dropout_key = jax.random.split(sample_key)
        _, params = init_fn(init_key, jax.tree.map(jnp.shape, x1))
        kwargs1, kwargs2 = split_kwargs({"rng": dropout_key}, x1, x2)
        return params, (kwargs1["rng"], kwargs2["rng"])

    def estimates(x1: Any, x2: Any, get: Get, kwargs: dict[str, Any]) -> Iterator[Any]:
        next_key, total = key, None
        for n in range(1, counts[-1] + 1):
            next_key, sample_key = jax.random.split(next_key)
            params, rng = draw(sample_key, x1, x2)
            kernels = sample_fn(x1, x2, get, params, rng=rng, **kwargs)
            # Sums in half precision would stop growing.
            wide = jax.tree.map(lambda k: k.astype(jnp.promote_types(k.dtype, jnp.float32)), kernels)
            total = wide if total is None else jax.tree.map(jnp.add, total, wide)
            if n in counts:
                yield jax.tree.map(lambda s, k, n=n: (s / n).astype(k.dtype), total, kernels)

    def kernel_fn(x1: Any, x2: Any = None, get: Get = None, **kwargs: Any) -> Any:
        if "rng" in kwargs:
            raise TypeError("`rng` is drawn for each network from the `key` given to `monte_carlo_kernel_fn`.")
        parse_get(get, KERNELS)  # at once, not when iterated over
        results = estimates(x1, x2, get, kwargs)
        return next(results) if isinstance(n_samples, numbers.Integral) else results

    def batched(batching: Batching) -> Callable[..., Any]:
        """Returns the same estimates cell by cell: for `nt_core.batch`."""
        return monte_carlo_kernel_fn(
            init_fn,
            apply_fn,
            key,
            n_samples,
            batching.batch_size,
            batching.device_count,
            batching.store_on_device,
            trace_axes,
            diagonal_axes,
            vmap_axes,
            implementation,
        )

    kernel_fn.batched = batched  # type: ignore[attr-defined]
    return kernel_fn


def _sample_counts(n_samples: int | Iterable[int]) -> list[int]:
    """Returns the numbers of samples after which an estimate is wanted, in increasing order."""
    if not isinstance(n_samples, numbers.Integral | Iterable):
        raise TypeError(f"`n_samples` must be a positive integer or an iterable of them, got {n_samples!r}.")
    counts = list(n_samples) if isinstance(n_samples, Iterable) else [n_samples]
    if not counts or not all(isinstance(n, numbers.Integral) and int(n) > 0 for n in counts):
        raise ValueError(f"`n_samples` must consist of positive integers, got {counts}.")
    return sorted({int(n) for n in counts})
