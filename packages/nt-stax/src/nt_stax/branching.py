"""Layers that part a network into branches, and join them again."""

import functools
import itertools
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from nt_core import Builder, Kernel, Rule, Run, Spec, Value, layer, steps, supports_masking
from nt_core.authoring import NoStep, combine


@layer
def FanOut(num: int):
    """Gives `num` branches the same inputs, as a list.

    >>> from nt_stax import FanOut
    >>> _, apply_fn, _ = FanOut(2)
    >>> print(apply_fn((), 3.0))
    [3.0, 3.0]
    """
    if num < 1:
        raise ValueError(f"FanOut needs at least one branch, got {num}.")

    def init_fn(rng, input_shape):
        return [input_shape] * num, ()

    def apply_fn(params, inputs, **kwargs):
        return [inputs] * num

    rule = Rule("FanOut", emit=lambda _, values: [values] * num)
    return init_fn, apply_fn, rule


@layer
@supports_masking(remask_kernel=False)
def FanInSum(weights: Sequence[float] | None = None):
    """Adds branches, as in residual networks.

    Covariances and tangent kernels are added, which takes branches that are independent: each ends in a layer with
    weights of its own (after that, only in linear layers without weights). Masked is what is masked in all branches.

    Args:
      weights: a number for each branch, that it is multiplied by, as in networks with scaled residuals; by default 1.

    Raises:
      ValueError: branches of different shapes; another number of weights than of branches.
      NotImplementedError: the kernel of branches that are not Gaussian, because one ends in a nonlinearity; or that
        differ in layout.

    >>> from nt_stax import Dense, FanInSum, FanOut, Identity, Relu, parallel, serial
    >>> residual = serial(FanOut(2), parallel(serial(Relu(), Dense(512)), Identity()), FanInSum())
    >>> _, _, kernel_fn = serial(Dense(512), residual)
    >>> print(kernel_fn(jnp.ones((1, 3)), None, ("nngp", "ntk")))
    AnalyticKernel(nngp=Array([[1.5]], dtype=float32), ntk=Array([[2.]], dtype=float32))
    >>> _, apply_fn, _ = FanInSum(weights=(0.5, 2.0))
    >>> print(apply_fn((), [jnp.ones(2), jnp.ones(2)]))
    [2.5 2.5]
    """

    init_fn, apply_fn, mask_fn = _entrywise("FanInSum", operator.add, weights)

    def emit(builder: Builder, values: Sequence[Value]) -> Value:
        specs = _specs_of_equal_branches("FanInSum", values)
        if len(specs) > 1:
            _check_gaussian("FanInSum", specs)
            _warn_of_shared_weights("FanInSum", builder, values)
        squares = tuple(float(w) ** 2 for w in _weights(weights, len(values)))
        return builder.add(steps.Combine(squares), *values)

    return init_fn, apply_fn, Rule("FanInSum", emit=emit), mask_fn


@layer
@supports_masking(remask_kernel=False)
def FanInProd():
    """Multiplies branches, as in gated networks.

    Covariances are multiplied, `K = prod_i K_i`, and tangent kernels follow the product rule, `T = sum_i T_i
    prod_{j != i} K_j`, which takes branches that are independent (see `FanInSum`). They need not be Gaussian, but their
    product is not: end it with a Dense or Conv layer before a nonlinearity. Masked is what is masked in all branches.

    Raises:
      ValueError: branches of different shapes.
      NotImplementedError: the kernel of branches that differ in layout.

    >>> from nt_stax import Dense, FanInProd, FanOut, Relu, parallel, serial
    >>> gated = serial(FanOut(2), parallel(Dense(512), serial(Dense(512), Relu())), FanInProd())
    >>> _, _, kernel_fn = gated
    >>> print(kernel_fn(jnp.ones((1, 3)), None, ("nngp", "ntk")))
    AnalyticKernel(nngp=Array([[0.5]], dtype=float32), ntk=Array([[1.]], dtype=float32))
    """

    init_fn, apply_fn, mask_fn = _entrywise("FanInProd", operator.mul)

    def emit(builder: Builder, values: Sequence[Value]) -> Value:
        specs = _specs_of_equal_branches("FanInProd", values)
        if len(specs) > 1:
            _warn_of_shared_weights("FanInProd", builder, values)
        return builder.add(steps.Multiply(), *values)

    return init_fn, apply_fn, Rule("FanInProd", emit=emit), mask_fn


@layer
@supports_masking(remask_kernel=False)
def FanInConcat(axis: int = -1):
    """Concatenates branches along an axis.

    Along the channel axis, covariances and tangent kernels are averages over the branches, weighted by their numbers of
    channels. Along another axis, branches must be independent (see `FanInSum`), so that the covariance of entries of
    different branches is zero.

    Args:
      axis: the axis, of the activations. By default the last one, which by default is the channel axis.

    Raises:
      ValueError: branches whose shapes differ in more than `axis`.
      NotImplementedError: the kernel of branches that differ in layout; or, along another axis than the channel axis,
        that are not Gaussian.

    >>> from nt_stax import Dense, FanInConcat, FanOut, parallel, serial
    >>> _, _, kernel_fn = serial(FanOut(2), parallel(Dense(100), Dense(300, W_std=2.0)), FanInConcat())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp"))  # (100 * 1 + 300 * 4) / 400
    [[3.25]]
    """

    def init_fn(rng, input_shape):
        return _concatenated_shape(_branches("FanInConcat", input_shape), axis), ()

    def apply_fn(params, inputs, **kwargs):
        _concatenated_shape([x.shape for x in _branches("FanInConcat", inputs)], axis)
        return jnp.concatenate(list(inputs), axis)

    def mask_fn(mask, input_shape):
        return _concatenated_masks(mask, input_shape, axis)

    def emit(builder: Builder, values: Sequence[Value]) -> Value:
        specs = [value.spec for value in _branches("FanInConcat", values)]
        _check_layouts("FanInConcat", specs)
        _concatenated_shape([spec.shape1 for spec in specs], axis)
        _concatenated_shape([spec.shape2 for spec in specs], axis)
        if axis % specs[0].ndim != specs[0].channel_axis:
            raise NoStep
        widths = [spec.n_channels for spec in specs]
        return builder.add(steps.Combine(tuple(n / sum(widths) for n in widths), concat=True), *values)

    def concatenate(kernels: Sequence[Kernel], run: Run) -> Kernel:
        return _concatenate_apart(kernels, axis % kernels[0].spec.ndim)

    return init_fn, apply_fn, Rule("FanInConcat", emit=emit, function=concatenate), mask_fn


def _entrywise(
    name: str, operation: Callable[[Any, Any], Any], weights: Sequence[float] | None = None
) -> tuple[Callable, Callable, Callable]:
    """Returns `init_fn`, `apply_fn` and `mask_fn` of a layer that joins branches entry by entry."""

    def init_fn(rng, input_shape):
        shapes = _branches(name, input_shape)
        _check_equal(name, shapes)
        return shapes[0], ()

    def apply_fn(params, inputs, **kwargs):
        _check_equal(name, [x.shape for x in _branches(name, inputs)])
        if weights is not None:
            inputs = [w * x for w, x in zip(_weights(weights, len(inputs)), inputs, strict=True)]
        return functools.reduce(operation, inputs)

    def mask_fn(mask, input_shape):
        return functools.reduce(jnp.logical_and, [m for m in mask if m is not None])

    return init_fn, apply_fn, mask_fn


def _weights(weights: Sequence[float] | None, n_branches: int) -> Sequence[float]:
    if weights is None:
        return (1.0,) * n_branches
    if len(weights) != n_branches:
        raise ValueError(f"FanInSum takes a weight for each of the {n_branches} branches, got weights={weights!r}.")
    return weights


def _specs_of_equal_branches(name: str, values: Sequence[Value]) -> list[Spec]:
    specs = [value.spec for value in _branches(name, values)]
    _check_layouts(name, specs)
    _check_equal(name, [spec.shape1 for spec in specs])
    _check_equal(name, [spec.shape2 for spec in specs])
    return specs


def _concatenate_apart(kernels: Sequence[Kernel], axis: int) -> Kernel:
    """Concatenates independent branches along an axis that is not the channel axis."""
    specs = [kernel.spec for kernel in kernels]
    _check_layouts("FanInConcat", specs)
    if len(specs) > 1:
        _check_gaussian("FanInConcat", specs)
    reverse = _most_are_reversed(specs)
    kernels = [kernel.reverse() if kernel.is_reversed != reverse else kernel for kernel in kernels]
    first = kernels[0]
    if axis == first.batch_axis:
        warnings.warn(
            "FanInConcat along the batch axis: branches become samples, and samples of different branches have "
            "covariance 0. The kernel can be neither batched nor compared between branches.",
            stacklevel=2,
        )

    return _combined(kernels, axis).replace(
        shape1=_concatenated_shape([kernel.shape1 for kernel in kernels], axis),
        shape2=_concatenated_shape([kernel.shape2 for kernel in kernels], axis),
        is_gaussian=all(kernel.is_gaussian for kernel in kernels),
        is_reversed=reverse,
        is_input=all(kernel.is_input for kernel in kernels),
    )


@functools.partial(jax.jit, static_argnames="axis")
def _combined(kernels: Sequence[Kernel], axis: int) -> Kernel:
    """Returns the first kernel with the covariances of all, concatenated."""

    def concatenate(*covariances: Array) -> Array:
        stored, is_pair = _stored_axis(kernels[0].spec, axis, covariances[0].ndim)
        return _block_diagonal(covariances, stored) if is_pair else jnp.concatenate(covariances, stored)

    return combine(concatenate, kernels)


def _stored_axis(spec: Spec, axis: int, ndim: int) -> tuple[int, bool]:
    """Returns where a covariance of rank `ndim` stores an axis of the activations, and whether it stores it twice."""
    n_batch = ndim - len(spec.space) * (1 if spec.diagonal_spatial else 2)
    if axis == spec.batch_axis:
        return 0, n_batch == 2
    i = spec.spatial_axes.index(axis)
    if spec.diagonal_spatial:
        return n_batch + i, False
    return n_batch + 2 * (len(spec.space) - 1 - i if spec.is_reversed else i), True


def _block_diagonal(blocks: Sequence[Array], axis: int) -> Array:
    """Puts arrays on the diagonal of `axis` and `axis + 1`, and zeros elsewhere."""
    total = sum(block.shape[axis + 1] for block in blocks)
    rows, start = [], 0
    for block in blocks:
        widths = [(0, 0, 0)] * block.ndim
        widths[axis + 1] = (start, total - start - block.shape[axis + 1], 0)
        rows.append(lax.pad(block, jnp.zeros((), block.dtype), widths))
        start += block.shape[axis + 1]
    return jnp.concatenate(rows, axis)


def _concatenated_shape(shapes: Sequence[Sequence[int]], axis: int) -> tuple[int, ...]:
    ndim = len(shapes[0])
    if not -ndim <= axis < ndim:
        raise ValueError(f"FanInConcat: inputs of shape {tuple(shapes[0])} have no axis {axis}.")
    others = [[n for a, n in enumerate(shape) if a != axis % ndim] for shape in shapes]
    if any(other != others[0] for other in others) or any(len(shape) != ndim for shape in shapes):
        raise ValueError(
            f"FanInConcat along axis {axis} takes branches that differ in that axis only, got shapes "
            f"{', '.join(str(tuple(shape)) for shape in shapes)}."
        )
    sizes = [shape[axis] for shape in shapes]
    joined = list(shapes[0])
    joined[axis] = -1 if min(sizes) < 0 else sum(sizes)
    return tuple(joined)


def _concatenated_masks(masks: Sequence[Array | None], shapes: Sequence[Sequence[int]], axis: int) -> Array:
    """Concatenates masks, of which each may have size 1 along any axis. None masks nothing."""
    ndim = len(shapes[0])
    filled = [jnp.zeros((1,) * ndim, bool) if mask is None else mask for mask in masks]
    sizes = [max(sizes) for sizes in zip(*(mask.shape for mask in filled), strict=True)]

    def block_shape(shape: Sequence[int]) -> list[int]:
        return [shape[a] if a == axis % ndim else n for a, n in enumerate(sizes)]

    blocks = [jnp.broadcast_to(mask, block_shape(shape)) for mask, shape in zip(filled, shapes, strict=True)]
    return jnp.concatenate(blocks, axis)


def _branches(name: str, inputs: Any) -> Sequence[Any]:
    if not isinstance(inputs, list | tuple) or not inputs or isinstance(inputs[0], int):
        given = f"one of shape {inputs.spec.shape1}" if isinstance(inputs, Value) else repr(inputs)
        raise ValueError(f"{name} takes a list or tuple of branches, e.g. from `parallel` or `FanOut`, got {given}.")
    return inputs


def _check_equal(name: str, shapes: Sequence[Sequence[int]]) -> None:
    if any(tuple(shape) != tuple(shapes[0]) for shape in shapes):
        raise ValueError(
            f"{name} takes branches of equal shapes, got {', '.join(str(tuple(shape)) for shape in shapes)}."
        )


def _check_layouts(name: str, specs: Sequence[Spec]) -> None:
    for field in ("diagonal_batch", "diagonal_spatial", "batch_axis", "channel_axis"):
        values = [getattr(spec, field) for spec in specs]
        if any(value != values[0] for value in values):
            raise NotImplementedError(f"{name} takes branches with the same {field}, got {values}.")


def _check_gaussian(name: str, specs: Sequence[Spec]) -> None:
    if not all(spec.is_gaussian for spec in specs):
        others = [i for i, spec in enumerate(specs) if not spec.is_gaussian]
        raise NotImplementedError(
            f"{name} has a kernel for Gaussian branches only, and branches {others} are not. End each with a Dense or "
            "Conv layer."
        )


def _most_are_reversed(specs: Sequence[Spec]) -> bool:
    return sum(spec.is_reversed for spec in specs) > len(specs) / 2


def _warn_of_shared_weights(name: str, builder: Builder, values: Sequence[Value]) -> None:
    """Warns of branches that are not independent, as far as the program shows."""
    weights = [_last_weights(builder, value) for value in values]
    if any(a & b for a, b in itertools.combinations(weights, 2)):
        warnings.warn(
            f"{name}: two branches end in the weights of the same layer, before they were parted, so they are not "
            "independent and the kernel of what joins them is wrong. End all but one with a Dense or Conv layer.",
            stacklevel=2,
        )


def _last_weights(builder: Builder, value: Value) -> set[int]:
    """Returns the values in which a branch last met weights: outputs of layers with weights, or sources."""
    found: set[int] = set()
    pending = [value.number]
    while pending:
        number = pending.pop()
        node = builder.node(number)
        if node is None or isinstance(node.step, steps.Linear):
            found.add(number)
        else:
            pending.extend(node.inputs)
    return found
