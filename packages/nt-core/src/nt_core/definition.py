"""What steps do to covariances, written out from the definitions: documentation, and the judge of all backends.

Every covariance is stored between all pairs of positions, as a NumPy array `(n1, n2, *space, *space)` in float64, and
carried as it is: no deficits, no planes, no tiles. Slow, and meant to be read.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from nt_core import activations, steps
from nt_core.program import Program
from nt_core.spec import Spec

Array = np.ndarray


class Covariances(NamedTuple):
    """The covariances of two batches of activations.

    Attributes:
      nngp, ntk: covariance and tangent kernel, `(n1, n2, *space, *space)`.
      cov1, cov2: the covariance of each sample of a batch with itself, `(n, *space, *space)`.
    """

    nngp: Array
    ntk: Array
    cov1: Array
    cov2: Array


def propagate(program: Program, *inputs: tuple[Array, Array]) -> Covariances:
    """Carries the covariances of inputs through a program.

    Args:
      program: of one output, which starts from inputs.
      *inputs: for each source a pair of batches `(n1, *space, channels)` and `(n2, *space, channels)`. If the two of
        each pair are equal, equal samples share what dropout leaves out.

    Returns:
      The covariances at the output.

    >>> import numpy as np
    >>> from nt_core import Builder, Spec, activations, steps
    >>> builder = Builder()
    >>> x = builder.source(Spec((1, 2), (1, 2), batch_axis=0, channel_axis=1))
    >>> y = builder.add(steps.Dual(activations.ABRelu(0.0, 1.0)), builder.add(steps.Dense(2.0, None, 8), x))
    >>> x1, x2 = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> print(propagate(builder.build(y), (x1, x2)).nngp.round(4))  # 1 / (2 pi)
    [[0.1592]]
    """
    x1, x2 = inputs[0]
    same = np.eye(len(x1), len(x2), dtype=bool) & all(np.array_equal(first, second) for first, second in inputs)
    values = [_of_inputs(first, second) for first, second in inputs]
    for node in program.nodes:
        values.append(_step(node.step, [values[i] for i in node.inputs], program.spec(node.inputs[0]), same))
    return values[program.outputs[0]]


def _of_inputs(x1: Array, x2: Array) -> Covariances:
    """Means of products over the channels."""

    def covariance(a: Array, b: Array) -> Array:
        product = np.tensordot(a, b, (-1, -1)) / a.shape[-1]  # (n1, *space, n2, *space)
        return np.moveaxis(product, a.ndim - 1, 1)

    nngp = covariance(x1, x2)
    return Covariances(nngp, np.zeros_like(nngp), *(_own(covariance(x, x)) for x in (x1, x2)))


def _own(k: Array) -> Array:
    """Of the covariances of a batch with itself, those of each sample with itself."""
    return np.moveaxis(np.diagonal(k, axis1=0, axis2=1), -1, 0)


def _step(step: steps.Step, inputs: Sequence[Covariances], spec: Spec, same: Array) -> Covariances:
    k, n_space = inputs[0], len(spec.space)
    match step:
        case steps.Linear():
            return _linear(step, k, spec)
        case steps.Dual():
            return _dual(step.activation, k, n_space)
        case steps.Normalize():
            return _rescaled(k, *_normalizers(step, k, n_space))
        case steps.Scale():
            first = np.asarray(step.first, float)
            return _rescaled(k, first, first if step.second is None else np.asarray(step.second, float))
        case steps.Dropout():
            return _dropout(step.rate, k, spec.space, same)
        case steps.Combine():
            return Covariances(*(_weighted(step.weights, parts) for parts in zip(*inputs, strict=True)))
        case steps.TakeChannels():
            return k
        case steps.Multiply():
            for other in inputs[1:]:
                ntk = k.ntk * other.nngp + k.nngp * other.ntk
                k = Covariances(k.nngp * other.nngp, ntk, k.cov1 * other.cov1, k.cov2 * other.cov2)
            return k
        case steps.Pool():
            return Covariances(*(_pool(part, step, spec) for part in k))
        case steps.Gather():
            return Covariances(*(_gathered(part, step.positions) for part in k))
        case steps.Untie():
            equal = np.eye(int(np.prod(spec.space))).reshape(spec.space * 2)
            return Covariances(*(part * equal for part in k))
        case steps.GlobalPool():
            axes = tuple(range(-2 * n_space, 0))
            return Covariances(*(part.mean(axes) if step.mean else part.sum(axes) for part in k))
        case steps.Flatten():
            return Covariances(*(_diagonal(part, n_space).mean(tuple(range(-n_space, 0))) for part in k))
    raise NotImplementedError(f"No definition of the step {type(step).__name__}.")


def _linear(step: steps.Linear, k: Covariances, spec: Spec) -> Covariances:
    """`K' = w_var A(K) + b_var` and `T' = w_var A(T) + own_w A(K) + own_b`, with `A` an average over windows."""
    averages = k
    if isinstance(step, steps.Conv):
        taps = list(itertools.product(*map(range, step.window)))
        sums = (_windows(part, step, spec, step.dilation, [(tap, tap) for tap in taps]) for part in k)
        order = step.space_order(spec)
        averages = Covariances(*(_permuted(part, order) / step.window_size for part in sums))
    bias = 0.0 if step.b_var is None else step.b_var
    own_weight, own_bias = step.ntk_coefficients(spec)
    ntk = step.w_var * averages.ntk + own_weight * averages.nngp + own_bias
    nngp, cov1, cov2 = (step.w_var * part + bias for part in (averages.nngp, averages.cov1, averages.cov2))
    return Covariances(nngp, ntk, cov1, cov2)


def _permuted(k: Array, order: tuple[int, ...]) -> Array:
    """Reorders spatial axes."""
    n, n_batch = len(order), k.ndim - 2 * len(order)
    axes = [n_batch + half + axis for half in (0, n) for axis in order]
    return np.transpose(k, (*range(n_batch), *axes))


def _dual(activation: activations.Activation, k: Covariances, n_space: int) -> Covariances:
    var1, var2 = (_diagonal(own, n_space) for own in (k.cov1, k.cov2))
    nngp, factor = _expectations(activation, k.nngp, *_both(var1[:, None], var2[None], n_space))
    cov1, cov2 = (
        _expectations(activation, own, *_both(var, var, n_space))[0] for own, var in ((k.cov1, var1), (k.cov2, var2))
    )
    return Covariances(nngp, k.ntk * factor, cov1, cov2)


def _expectations(activation: activations.Activation, k: Array, var1: Array, var2: Array) -> tuple[Array, Array]:
    """Returns `E f(u) f(v)` and `E f'(u) f'(v)`; for the ReLU family from the angle between `u` and `v`."""
    if isinstance(activation, activations.ABRelu):
        a, b = activation.a, activation.b
        (with_same, same_dot), (with_opposite, opposite_dot) = _relu(k, var1, var2), _relu(-k, var1, var2)
        value = (a * a + b * b) * with_same - 2 * a * b * with_opposite
        return value, (a * a + b * b) * same_dot + 2 * a * b * opposite_dot
    var1, var2 = (np.broadcast_to(var, k.shape) for var in (var1, var2))
    deficit, factor = map(np.asarray, activation.dual(*map(jnp.asarray, (var1, var2, (var1 + var2) / 2 - k))))
    own1, own2 = (np.asarray(activation.variance(jnp.asarray(var))) for var in (var1, var2))
    return (own1 + own2) / 2 - deficit, factor


def _relu(k: Array, var1: Array, var2: Array) -> tuple[Array, Array]:
    """Returns `E max(u, 0) max(v, 0)` and `P(u > 0, v > 0)`."""
    scale = np.sqrt(var1 * var2) * np.ones_like(k)
    correlation = np.clip(np.divide(k, scale, out=np.zeros_like(k), where=scale > 0), -1, 1)
    angle = np.arccos(correlation)
    out = scale * (np.sqrt(1 - correlation**2) + (np.pi - angle) * correlation) / (2 * np.pi)
    return out, (np.pi - angle) / (2 * np.pi)


def _normalizers(step: steps.Normalize, k: Covariances, n_space: int) -> list[Array]:
    """One over the root of `eps` and the mean variance, over the positions that count; 0 where that is 0."""
    scales = []
    for own, weights in ((k.cov1, step.first), (k.cov2, step.first if step.second is None else step.second)):
        variance = _diagonal(own, n_space)
        counted = variance if weights is None else variance * np.asarray(weights, float)
        total = step.eps + counted.mean(tuple(1 + a for a in step.space_axes), keepdims=True) + np.zeros_like(variance)
        scales.append(np.divide(1, np.sqrt(total), out=np.zeros_like(total), where=total > 0))
    return scales


def _rescaled(k: Covariances, scale1: Array, scale2: Array) -> Covariances:
    """`K'(p, p') = s1(p) s2(p') K(p, p')`, with `s` as `(n, *space)`."""
    n_space = scale1.ndim - 1
    first, second = _both(scale1[:, None], scale2[None], n_space)
    cov1, cov2 = (own * np.multiply(*_both(s, s, n_space)) for own, s in ((k.cov1, scale1), (k.cov2, scale2)))
    return Covariances(k.nngp * first * second, k.ntk * first * second, cov1, cov2)


def _dropout(rate: float, k: Covariances, space: tuple[int, ...], same: Array) -> Covariances:
    """What is averaged with itself grows: the mean of `b^2 / rate^2` is `1 / rate`, for `b` 1 or 0."""
    positions = np.eye(int(np.prod(space)), dtype=bool).reshape(space + space)
    both = same.reshape(same.shape + (1,) * positions.ndim) & positions
    nngp, ntk = (np.where(both, part / rate, part) for part in (k.nngp, k.ntk))
    return Covariances(nngp, ntk, *(np.where(positions, own / rate, own) for own in (k.cov1, k.cov2)))


def _weighted(weights: Sequence[float], parts: Sequence[Array]) -> Array:
    return sum(w * part for w, part in zip(weights, parts, strict=True))  # type: ignore[return-value]


def _gathered(k: Array, positions: tuple[tuple[int, ...], ...]) -> Array:
    """Copies positions; zero where there is -1."""
    start = k.ndim - 2 * len(positions)
    for axis, from_ in enumerate(positions * 2, start):
        copied = np.take(k, np.maximum(from_, 0), axis)
        k = copied * np.expand_dims(np.array(from_) >= 0, [a for a in range(k.ndim) if a != axis])
    return k


def _diagonal(k: Array, n_space: int) -> Array:
    """The entries of equal positions, `(..., *space)`."""
    letters = "abcdefgh"[:n_space]
    return np.einsum(f"...{letters}{letters}->...{letters}", k)


def _both(first: Array, second: Array, n_space: int) -> tuple[Array, Array]:
    """Lays numbers of both samples, `(..., *space)`, out for pairs of positions."""
    return np.expand_dims(first, tuple(range(-n_space, 0))), np.expand_dims(
        second, tuple(range(-2 * n_space, -n_space))
    )


def _pool(k: Array, step: steps.Pool, spec: Spec) -> Array:
    taps = list(itertools.product(*map(range, step.window)))
    pairs, ones = list(itertools.product(taps, taps)), (1,) * len(step.window)
    total = _windows(k, step, spec, ones, pairs)
    if not step.mean:
        return total
    if step.normalize_edges:
        return total / _windows(np.ones(spec.space * 2), step, spec, ones, pairs)
    return total / np.prod(step.window) ** 2


def _windows(
    k: Array, step: steps.Conv | steps.Pool, spec: Spec, dilation: Sequence[int], pairs: Sequence[tuple]
) -> Array:
    """Sums entries under pairs of taps, one for the first and one for the second position."""
    n_space = len(spec.space)
    pads = steps.window_pads(spec.space, step.window, step.strides, step.padding, dilation)
    space = steps.window_space(spec.space, step.window, step.strides, step.padding, dilation, "window")

    def position(window: int, tap: int, axis: int) -> int | None:
        p = window * step.strides[axis] + tap * dilation[axis] - pads[axis][0]
        if step.padding == "CIRCULAR":
            return p % spec.space[axis]
        return p if 0 <= p < spec.space[axis] else None

    out = np.zeros(k.shape[: k.ndim - 2 * n_space] + space + space)
    for windows in itertools.product(*map(range, space + space)):
        for first, second in pairs:
            taps = (*first, *second)
            at = [position(w, tap, i % n_space) for i, (w, tap) in enumerate(zip(windows, taps, strict=True))]
            if None not in at:
                out[(..., *windows)] += k[(..., *at)]
    return out
