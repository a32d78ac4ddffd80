"""Kernels of infinite networks, estimated by finite ones."""

import functools
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from nt_core import batch
from nt_core.batch import Batching
from nt_core.cells import Mixed
from nt_core.get import Get, parse_get
from nt_core.keywords import split_kwargs
from nt_core.progress import with_progress
from nt_core.tracing import is_traced

from nt_empirical._axes import Axes
from nt_empirical._cost import cost_of
from nt_empirical._kernel import KERNELS, empirical_kernel_fn
from nt_empirical._ntk import NtkImplementation
from nt_empirical._operator import Estimate
from nt_empirical._vmap import VMapAxes

_AXIS = "networks"
# What networks may take at once on a CPU, which is slower beyond its caches; and how many they are at most on a device.
_BYTES, _NETWORKS = 2**26, 256


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
    *,
    standard_errors: bool = False,
    progress: bool = True,
) -> Callable[..., Any]:
    """Mean of the empirical kernels of networks with random parameters.

    The mean converges to the kernels of the infinitely wide network as samples, and width, grow (Novak et al., 2019,
    arXiv:1810.05148).

    Args:
      init_fn: ``init_fn(rng, input_shape)``, returns ``(output_shape, params)``; can be traced.
      apply_fn: ``apply_fn(params, x, **kwargs)``, returns an array or a pytree of arrays. It gets a keyword ``rng``.
      key: key of ``jax.random``. The same key draws the same parameters, whatever the other arguments.
      n_samples: number of networks, or several numbers for estimates on the way.
      batch_size, device_count, store_on_device: with a ``batch_size``, or where the kernel of a network does not fit
        in memory, or for fewer networks than devices, they are computed cell by cell, network after network, as by
        :func:`nt_core.batch`; then the samples are along the first axis of inputs and outputs. Otherwise many networks
        are computed at once, spread over devices.
      trace_axes, diagonal_axes, vmap_axes, implementation: as for :func:`empirical_ntk_fn`; so are the private ones.
      standard_errors: whether to return an ``Estimate``, of the fields ``value`` and ``standard_error``, both like what
        is returned otherwise.
      progress: whether to show a bar, if tqdm is installed, standard error is a terminal, and it takes longer than a
        second.

    Returns:
      ``kernel_fn(x1, x2=None, get=None, **kwargs)``. ``get`` is ``'nngp'`` or ``'ntk'``, for the bare estimate; or a
      tuple of them, for a named tuple ``EmpiricalKernel``; None is both. If ``n_samples`` is an iterable, the result
      is a generator of these, one for each number in increasing order. A pytree of outputs gives pytrees of these.
      Keywords go to ``apply_fn``; a 2-tuple has a value for each of ``x1`` and ``x2``. With several cells, arrays
      among them must be such 2-tuples. Values that are not arrays are compiled in.

      The same key gives the same estimate, whatever the other arguments, but for rounding: products of many networks
      at once, and sums in another order, differ in the last digits (in float32 by some 1e-6 of the largest entry).
      In networks with dropout the masks depend on the cells, as the samples of a block share a key; the expectation
      does not.

    Raises:
      TypeError: ``n_samples`` is neither an integer nor iterable; ``rng`` is given to ``kernel_fn``.
      ValueError: ``n_samples`` has numbers that are no positive integers, or 1 with ``standard_errors``; as
        :func:`nt_core.batch`, and as :func:`empirical_kernel_fn`.

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
    if standard_errors and counts[0] < 2:
        raise ValueError(f"Standard errors need at least 2 networks, got n_samples={n_samples}.")
    batching = Batching(batch_size, device_count, store_on_device, progress)
    empirical = empirical_kernel_fn(apply_fn, trace_axes, diagonal_axes, vmap_axes, implementation)
    in_cells = batch(empirical, batch_size, device_count, store_on_device, progress=False)
    known: dict[Any, _Network] = {}

    @jax.jit
    def draw(sample_key: jax.Array, x1: Any, x2: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        init_key, dropout_key = jax.random.split(sample_key)
        _, params = init_fn(init_key, jax.tree.map(jnp.shape, x1))
        kwargs1, kwargs2 = split_kwargs({"rng": dropout_key}, x1, x2)
        return params, (kwargs1["rng"], kwargs2["rng"])

    def kernels_of(function: Callable[..., Any], sample_key: jax.Array, arguments: Mixed) -> Any:
        x1, x2, get, kwargs = arguments.tree
        params, rng = draw(sample_key, x1, x2)
        return function(x1, x2, get, params, rng=rng, **kwargs)

    def network(arguments: Mixed) -> _Network:
        """Returns what is known of the kernels of a network without computing them, found once."""
        leaves, structure = jax.tree.flatten(arguments)
        kind = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if kind not in known:
            trace = jax.make_jaxpr(functools.partial(kernels_of, empirical), return_shape=True)
            program, shapes = trace(key, arguments)
            finish = jax.jit(functools.partial(_estimate, shapes=shapes))
            known[kind] = _Network(cost_of(program.jaxpr).peak_bytes, finish)
        return known[kind]

    def several(keys: jax.Array, used: jax.Array, arguments: Mixed) -> Moments:
        in_turn = functools.partial(jax.lax.map, lambda k: kernels_of(empirical, k, arguments))
        at_once = jax.vmap(lambda k: kernels_of(empirical, k, arguments))
        # Other generators than this draw other numbers if they draw for several keys at once.
        return moments((at_once if _is_threefry(key) else in_turn)(keys), used, standard_errors)

    @functools.cache
    def compiled(n_devices: int) -> Callable[..., Moments]:
        return jax.jit(several if n_devices == 1 else _over_devices(several, n_devices))

    def estimates(x1: Any, x2: Any, get: Get, kwargs: dict[str, Any]) -> Iterator[Any]:
        arguments = Mixed((x1, x2, get, kwargs))
        traced = any(map(is_traced, (jnp.add(0, 0), *jax.tree.leaves(arguments))))
        n_devices, (bytes_of_one, finish) = batching.n_devices(traced), network(arguments)
        most = min(_memory() // max(bytes_of_one, 1), _NETWORKS)
        whole = not batch_size and most > 0 and (n_devices == 1 or n_devices <= counts[-1])
        n_devices = n_devices if whole else 1
        size = _networks_at_once(counts, most, n_devices) if whole else 1
        keys, total = _sample_keys(key, counts[-1]), None
        if n_devices > 1:
            arguments = jax.device_put(arguments, NamedSharding(_mesh(n_devices), PartitionSpec()))
        for start, stop in with_progress(_chunks(counts, size), progress and not traced, "networks", "chunk"):
            if whole:
                drawn = np.arange(start, start + size)
                part = compiled(n_devices)(keys[np.minimum(drawn, stop - 1)], drawn < stop, arguments)
            else:
                kernels = kernels_of(in_cells, keys[start], arguments)
                part = moments(jax.tree.map(lambda k: jnp.expand_dims(k, 0), kernels), np.ones(1), standard_errors)
            total = part if total is None else merged(total, part)
            if stop in counts:
                estimate = finish(total)
                if whole and not traced:
                    estimate = batching.stored(jax.device_get(estimate) if n_devices > 1 else estimate)
                yield estimate

    def kernel_fn(x1: Any, x2: Any = None, get: Get = None, **kwargs: Any) -> Any:
        if "rng" in kwargs:
            raise TypeError("`rng` is drawn for each network from the `key` given to `monte_carlo_kernel_fn`.")
        parse_get(get, KERNELS)  # at once, not when iterated over
        results = estimates(x1, x2, get, kwargs)
        if not isinstance(n_samples, numbers.Integral):
            return results
        (estimate,) = results
        return estimate

    def batched(batching: Batching) -> Callable[..., Any]:
        """Returns the same estimates cell by cell: for `nt_core.batch`."""
        return monte_carlo_kernel_fn(
            init_fn,
            apply_fn,
            key,
            n_samples if isinstance(n_samples, numbers.Integral) else counts,
            batching.batch_size,
            batching.device_count,
            batching.store_on_device,
            trace_axes,
            diagonal_axes,
            vmap_axes,
            implementation,
            progress=batching.progress,
            standard_errors=standard_errors,
        )

    kernel_fn.batched = batched  # type: ignore[attr-defined]
    return kernel_fn


class _Network(NamedTuple):
    """What computing the kernels of one network takes, and what makes an estimate of the moments of many."""

    peak_bytes: int
    finish: Callable[["Moments"], Any]


class Moments(NamedTuple):
    """Statistics of the kernels of some networks.

    Attributes:
      n: how many they are.
      mean: of their kernels, a tree.
      squares: sums of the squared deviations from the mean; None if they are not wanted.
    """

    n: Any
    mean: Any
    squares: Any


def _estimate(total: Moments, shapes: Any) -> Any:
    """Returns the mean, with its standard error if that is wanted, in the precision of the kernels."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda a, shape: a.astype(shape.dtype), tree, shapes)

    if total.squares is None:
        return cast(total.mean)
    errors = jax.tree.map(lambda s: jnp.sqrt(s / total.n / (total.n - 1)), total.squares)  # n^2 may be no int32
    return Estimate(cast(total.mean), cast(errors))


@functools.partial(jax.jit, static_argnames="with_squares")
def moments(kernels: Any, used: Any, with_squares: bool) -> Moments:
    """Returns the statistics of those kernels along the first axis of arrays that are `used`, in float32 at least."""
    n = jnp.sum(used)

    def total(k: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(jnp.expand_dims(used, range(1, k.ndim)), k, 0), 0)

    # Sums in half precision would stop growing.
    wide = jax.tree.map(lambda k: k.astype(jnp.promote_types(k.dtype, jnp.float32)), kernels)
    mean = jax.tree.map(lambda k: total(k) / jnp.maximum(n, 1).astype(k.dtype), wide)
    squares = jax.tree.map(lambda k, m: total((k - jnp.expand_dims(m, 0)) ** 2), wide, mean)
    return Moments(n, mean, squares if with_squares else None)


@jax.jit
def merged(a: Moments, b: Moments) -> Moments:
    """Returns the statistics of two sets of networks together (Chan et al., 1979)."""
    n = a.n + b.n
    apart = jax.tree.map(jnp.subtract, b.mean, a.mean)

    share = b.n / jnp.maximum(n, 1)
    mean = jax.tree.map(lambda m, d: m + d * share.astype(d.dtype), a.mean, apart)
    if a.squares is None:
        return Moments(n, mean, None)
    weight = a.n * share  # n^2 may be no int32
    squares = jax.tree.map(lambda s, t, d: s + t + d**2 * weight.astype(d.dtype), a.squares, b.squares, apart)
    return Moments(n, mean, squares)


def _over_devices(several: Callable[..., Moments], n_devices: int) -> Callable[..., Moments]:
    """Spreads networks over devices."""
    cut, whole = PartitionSpec(_AXIS), PartitionSpec()

    def one_device(*arguments: Any) -> Moments:
        return jax.tree.map(lambda a: jnp.expand_dims(a, 0), several(*arguments))

    # Nothing goes between devices, and what networks do inside is their own matter: no checks.
    parts = jax.shard_map(one_device, mesh=_mesh(n_devices), in_specs=(cut, cut, whole), out_specs=cut, check_vma=False)

    def all_devices(*arguments: Any) -> Moments:
        found = parts(*arguments)
        return functools.reduce(merged, [jax.tree.map(lambda a, i=i: a[i], found) for i in range(n_devices)])

    return all_devices


def _mesh(n_devices: int) -> Mesh:
    return Mesh(np.array(jax.local_devices()[:n_devices]), _AXIS)


def _is_threefry(key: jax.Array) -> bool:
    return "threefry" in str(jax.random.key_impl(key))


@functools.partial(jax.jit, static_argnums=1)
def _sample_keys(key: jax.Array, n: int) -> jax.Array:
    """Returns a key for each network."""

    def step(key: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        next_key, sample_key = jax.random.split(key)
        return next_key, sample_key

    return jax.lax.scan(step, key, None, length=n)[1]


def _memory() -> int:
    """Returns how many bytes the networks that are computed at once may take on a device."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2 * _BYTES) // 2


def _networks_at_once(counts: list[int], most: int, n_devices: int) -> int:
    """Returns how many networks are best computed at once, with at most so many on each device.

    There is one compiled program, for one number; where fewer are left before an estimate, some are computed in vain.
    """
    steps = np.diff(counts, prepend=0)

    def cost(size: int) -> int:
        return sum(-(-int(step) // size) for step in steps) * (
            size + n_devices
        )  # a dispatch costs as much as a network

    largest = min(most, -(-int(max(steps)) // n_devices))
    return min(range(n_devices, n_devices * largest + 1, n_devices), key=cost)


def _chunks(counts: list[int], size: int) -> list[tuple[int, int]]:
    """Returns the first network of each chunk and the one after its last; chunks end at all counts."""
    chunks = []
    for begin, end in itertools.pairwise((0, *counts)):
        chunks += [(start, min(start + size, end)) for start in range(begin, end, size)]
    return chunks


def _sample_counts(n_samples: int | Iterable[int]) -> list[int]:
    """Returns the numbers of samples after which an estimate is wanted, in increasing order."""
    if not isinstance(n_samples, numbers.Integral | Iterable):
        raise TypeError(f"`n_samples` must be a positive integer or an iterable of them, got {n_samples!r}.")
    counts = list(n_samples) if isinstance(n_samples, Iterable) else [n_samples]
    if not counts or not all(isinstance(n, numbers.Integral) and int(n) > 0 for n in counts):
        raise ValueError(f"`n_samples` must consist of positive integers, got {counts}.")
    return sorted({int(n) for n in counts})
