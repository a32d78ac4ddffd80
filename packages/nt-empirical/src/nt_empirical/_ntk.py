"""The tangent kernel of a finite network."""

import enum
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from nt_core.manual import varying, varying_axes
from nt_core.tracing import is_traced

from nt_empirical._auto import cheapest, cost_of_implementation
from nt_empirical._axes import Axes, Layout, axis_pairs
from nt_empirical._batches import Batch, make_batches
from nt_empirical._chunks import is_for_one_processor
from nt_empirical._cost import Cost
from nt_empirical._jacobian import ntk_by_jacobians
from nt_empirical._parameters import Parametrised, counted
from nt_empirical._structured import ntk_by_structure
from nt_empirical._tiles import in_tiles
from nt_empirical._vector_products import ntk_by_columns
from nt_empirical._vmap import BatchAxes, VMapAxes, check_first, outputs_of


class NtkImplementation(enum.IntEnum):
    """Ways to compute an empirical NTK (Novak et al., 2022, arXiv:2206.08720).

    Attributes:
      AUTO: of the other three the one with the fewest operations, among those that need at most 4 GiB of memory, both
        by an estimate from what is traced; if all need more, the one with the least memory. All three are traced at
        each call: use it under ``jax.jit``, which does so once.
      JACOBIAN_CONTRACTION: the Jacobians of both batches, and their product; under ``jax.jit`` array by array of the
        parameters.
      NTK_VECTOR_PRODUCTS: the kernel column by column, without Jacobians: each column takes a gradient of one number
        for `x2`, and the derivatives of all outputs for `x1` along it. Of use where Jacobians do not fit into memory,
        or a network costs little beside the number of its outputs times its parameters.
      STRUCTURED_DERIVATIVES: where a parameter enters a product, a convolution, a sum or a table, the derivative of the
        outputs by the result of that, and what the parameter was multiplied with. The kernel is a sum of products of
        these for all places where parameters enter, in loops and branches too: for a Dense layer
        ``(a1 a2') * (g1 g2')``, of its inputs ``a`` and the derivatives ``g`` by its outputs. Jacobians are formed only
        for parameters that enter in other ways (through a nonlinear function, as the state of a loop), or where that
        takes less. Usually the fastest.
    """

    AUTO = 0
    JACOBIAN_CONTRACTION = 1
    NTK_VECTOR_PRODUCTS = 2
    STRUCTURED_DERIVATIVES = 3


def empirical_ntk_fn(
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
    per_leaf: bool = False,
    max_bytes: int | None = None,
) -> Callable[..., Any]:
    r"""Empirical NTK of a function, :math:`J(x_1) J(x_2)^\top` with :math:`J = \partial f / \partial \theta`.

    It governs gradient descent on the parameters (Jacot et al., 2018, arXiv:1806.07572). With a `scale` it is
    :math:`J(x_1) S J(x_2)^\top`, which governs descent with a learning rate for each parameter.

    Args:
      f: ``f(params, x, **kwargs)``, of arrays or pytrees of arrays, returns an array or a pytree of arrays.
      trace_axes: axes of the outputs to take the mean over, by default the last one (channels).
      diagonal_axes: axes of the outputs of which only the kernel of equal positions is wanted.
      vmap_axes: axes along which ``f`` treats samples one by one. The Jacobian is then computed per sample, which takes
        much less time and memory. One value for inputs and outputs, or ``(inputs, outputs, keywords)``: for inputs
        and outputs an int or a pytree prefix of ints as for ``jax.vmap`` (None for inputs that all samples share); for
        keywords a dict from names to axes, or one int for all arrays except ``rng``. ``f`` is called with one
        sample at a time, its axes kept with size 1. Not for functions in which samples interact (batch
        normalisation), or where ``rng`` draws different masks for the samples of a batch (dropout): samples would
        share theirs. None promises nothing.
      implementation: how to compute it; the results are the same.
      _j_rules, _s_rules, _fwd: accepted for compatibility, of no effect.
      scale: the diagonal matrix :math:`S`: a pytree of numbers or arrays that broadcast to the parameters, with their
        structure or that of their first levels. ``{"body": 0, "head": 1}`` is the kernel of the head alone (where a
        number is 0, nothing is computed); other diagonals are those of Adam, or of a Laplace approximation.
      per_leaf: return a pytree as ``params`` with a kernel for each of its arrays in the place of their sum.
      max_bytes: how much memory may be taken at once, by an estimate that counts all arrays but the whole kernel. If it
        is less than needed, tiles of samples are computed one after another, as by :func:`nt_core.batch`: samples must
        be along the first axis of everything, and ``vmap_axes`` say that they are independent. What fits is compiled,
        as by ``jax.jit``: what ``f`` reads besides its arguments is then what it was at the first call with such
        shapes. None is no bound.

    Returns:
      ``ntk_fn(x1, x2, params, **kwargs)``. Each axis of the outputs becomes two axes side by side, a diagonal axis
      one, a trace axis none: outputs ``(4, 5, 7)`` and ``(6, 5, 7)`` give ``(4, 6, 5, 5)``, with ``diagonal_axes=1``
      they give ``(4, 6, 5)``. A pytree of outputs gives a pytree of kernels, of each output with itself.
      ``x2=None`` stands for ``x1`` and gives an exactly symmetric kernel. Kernels have the dtype that the arrays in
      ``params`` promote to.

      A keyword that is a 2-tuple has a value for each of ``x1`` and ``x2``. ``rng`` is one key, or two: equal inputs
      get the same key, different inputs get different keys.

    Raises:
      ValueError: axes do not exist or overlap, outputs for ``x1`` and ``x2`` do not fit, ``vmap_axes`` does not
        hold, ``scale`` does not broadcast to ``params``, or ``max_bytes`` is not enough for one sample.
      TypeError: parameters or outputs are not real floating-point arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_empirical import empirical_ntk_fn
      >>> ntk_fn = empirical_ntk_fn(lambda w, x: x @ w, vmap_axes=0)
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> print(ntk_fn(x, None, jnp.ones((2, 3))))
      [[1. 1.]
       [1. 2.]]
      >>> second_input = jnp.array([[0.0], [1.0]])
      >>> print(empirical_ntk_fn(lambda w, x: x @ w, scale=second_input)(x, None, jnp.ones((2, 3))))
      [[0. 0.]
       [0. 1.]]
    """
    implementation = NtkImplementation(implementation)
    layout, batch_axes = Layout(trace_axes, diagonal_axes), BatchAxes.of(vmap_axes)

    def ntk_fn(x1: Any, x2: Any, params: Any, **kwargs: Any) -> Any:
        batches = make_batches(x1, x2, kwargs)
        return ntk(f, params, *batches, layout, batch_axes, implementation, scale, per_leaf, max_bytes)

    def costs(x1: Any, x2: Any, params: Any, **kwargs: Any) -> dict[NtkImplementation, Cost]:
        numbers = counted(scale, params)
        network = Parametrised.of(f, params, scale).only(numbers)
        implemented = _implemented(network, *make_batches(x1, x2, kwargs), layout, batch_axes, True, per_leaf)
        if not numbers:
            return {}
        return {name: cost_of_implementation(by, network.weights) for name, by in implemented.items()}

    ntk_fn.costs = costs  # type: ignore[attr-defined]
    pairs = ntk_fn.axis_pairs = pairs_of_axes(trace_axes, diagonal_axes, batch_axes)  # type: ignore[attr-defined]
    if max_bytes is None:
        return ntk_fn
    if batch_axes is None:
        raise ValueError("`max_bytes` cuts batches into tiles: `vmap_axes` must say that samples are independent.")
    check_first(batch_axes)
    bounded = in_tiles(ntk_fn, max_bytes)
    bounded.axis_pairs = pairs  # type: ignore[attr-defined]
    return bounded


def ntk(
    f: Callable[..., Any],
    params: Any,
    batch1: Batch,
    batch2: Batch,
    layout: Layout,
    batch_axes: BatchAxes | None,
    implementation: NtkImplementation,
    scale: Any = None,
    per_leaf: bool = False,
    max_bytes: int | None = None,
) -> Any:
    """Returns the empirical NTK of two batches."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        outputs = [jax.eval_shape(lambda b=batch: outputs_of(f, params, b, batch_axes)) for batch in (batch1, batch2)]
        params = varying(params, varying_axes(outputs))
    whole, numbers = Parametrised.of(f, params, scale), counted(scale, params)
    network = whole.only(numbers)
    # In turn, the Jacobians by all arrays are in memory in the end; and without `jit` loops are compiled in each call.
    in_turn = max_bytes is None and is_traced(jnp.add(0, 0))
    implemented = _implemented(network, batch1, batch2, layout, batch_axes, in_turn, per_leaf)
    if not numbers:
        found = []
    elif implementation == NtkImplementation.AUTO:
        found = cheapest(list(implemented.values()), network.weights, max_bytes)
    else:
        found = implemented[implementation](network.weights)

    def nothing() -> Any:
        outputs1, outputs2 = (outputs_of(f, params, batch, batch_axes) for batch in (batch1, batch2))
        return _no_kernel(outputs1, outputs2, layout)

    if per_leaf:
        of_array = dict(zip(numbers, found, strict=True))
        kernels = jax.tree.structure(params).unflatten(
            of_array[number] if number in of_array else nothing() for number in range(len(whole.weights))
        )
    else:
        kernels = functools.reduce(functools.partial(jax.tree.map, jnp.add), found) if found else nothing()
    if not whole.weights:
        return kernels
    return jax.tree.map(lambda kernel: kernel.astype(jnp.result_type(*whole.weights)), kernels)


def _implemented(
    network: Parametrised,
    batch1: Batch,
    batch2: Batch,
    layout: Layout,
    batch_axes: BatchAxes | None,
    in_turn: bool,
    per_leaf: bool,
) -> dict[NtkImplementation, Callable[[list[Any]], list[Any]]]:
    """Returns each implementation as a function of the arrays of a network; large samples may be taken in turn."""
    if batch_axes is not None and in_turn and is_for_one_processor():
        batch_axes = batch_axes._replace(in_turn=True)

    def by(implement: Callable[..., list[Any]]) -> Callable[[list[Any]], list[Any]]:
        return lambda weights: implement(network.at(weights), batch1, batch2, layout, batch_axes, per_leaf)

    return {name: by(implement) for name, implement in _IMPLEMENTATIONS.items()}


def _no_kernel(outputs1: Any, outputs2: Any, layout: Layout) -> Any:
    """Returns the tangent kernels of networks without parameters."""
    (leaves1, structure), leaves2 = jax.tree.flatten(outputs1), jax.tree.leaves(outputs2)
    axes = layout.axes_of(outputs1, outputs2)
    return structure.unflatten(
        output.contract(jnp.zeros_like(y1), jnp.zeros_like(y2)).astype(y1.dtype)
        for output, y1, y2 in zip(axes, leaves1, leaves2, strict=True)
    )


def empirical_ntk_vp_fn(f: Callable[..., Any], x1: Any, x2: Any, params: Any, **kwargs: Any) -> Callable[[Any], Any]:
    r"""Product of the empirical NTK with vectors, without the NTK.

    Returns :math:`v \mapsto J(x_1) J(x_2)^\top v` with :math:`J = \partial f / \partial \theta`, at the cost of one
    backward and one forward pass through the derivatives of ``f``.

    Args:
      f: ``f(params, x, **kwargs)``, returns an array or a pytree of arrays.
      x1: inputs.
      x2: other inputs, or None for ``x1``.
      params: an array or a pytree of arrays.
      **kwargs: keywords of ``f``; a 2-tuple has a value for each of ``x1`` and ``x2``. ``rng`` is as for
        :func:`empirical_ntk_fn`.

    Returns:
      A linear function. It takes what is shaped as ``f`` of ``x2`` and returns what is shaped as ``f`` of ``x1``.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_empirical import empirical_ntk_vp_fn
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> ntk_vp_fn = empirical_ntk_vp_fn(lambda w, x: x @ w, x, None, jnp.ones((2, 1)))
      >>> print(ntk_vp_fn(jnp.array([[1.0], [1.0]])))
      [[2.]
       [3.]]
    """
    batch1, batch2 = make_batches(x1, x2, kwargs)
    _, push_forward = jax.linearize(lambda p: f(p, batch1.x, **batch1.kwargs), params)
    _, pull_back = jax.vjp(lambda p: f(p, batch2.x, **batch2.kwargs), params)
    return lambda v: push_forward(*pull_back(v))


def pairs_of_axes(
    trace_axes: Axes, diagonal_axes: Axes, batch_axes: BatchAxes | None = None
) -> Callable[[int], list[tuple[int, int]] | None]:
    """Returns what `nt_core.batch` asks of a kernel function: which axes of its kernels are pairs."""

    def pairs(kernel_ndim: int) -> list[tuple[int, int]] | None:
        check_first(batch_axes)
        return axis_pairs(kernel_ndim, trace_axes, diagonal_axes)

    return pairs


_IMPLEMENTATIONS = {
    NtkImplementation.JACOBIAN_CONTRACTION: ntk_by_jacobians,
    NtkImplementation.NTK_VECTOR_PRODUCTS: ntk_by_columns,
    NtkImplementation.STRUCTURED_DERIVATIVES: ntk_by_structure,
}
