"""Covariance propagation written out from the definitions, entry by entry, in float64: the judge of all backends.

Everything is stored over all pairs of positions of two spatial axes, `(n1, n2, H, W, H, W)`, and covariances (not
deficits) are propagated. Slow, and meant to be read.
"""

import itertools

import numpy as np
from nt_core.steps import (
    Combine,
    Conv,
    Dense,
    Dual,
    Flatten,
    GlobalPool,
    Multiply,
    Normalize,
    Pool,
    window_pads,
    window_space,
)


def propagate(program, x1, x2):
    """Returns `(nngp, ntk, cov1, cov2)` at the output of a program whose source are inputs `(n, H, W, channels)`."""
    values = [
        (_outer(x1, x2), np.zeros_like(_outer(x1, x2)), _own(x1), _own(x2)),
    ]
    for node in program.nodes:
        values.append(_step(node.step, [values[i] for i in node.inputs], program.spec(node.inputs[0])))
    return values[program.outputs[0]]


def _outer(x1, x2):
    return np.einsum("ihwc,jklc->ijhwkl", x1, x2) / x1.shape[-1]


def _own(x):
    return np.einsum("ihwc,iklc->ihwkl", x, x) / x.shape[-1]


def _step(step, inputs, spec):
    nngp, ntk, cov1, cov2 = inputs[0]
    match step:
        case Dense() | Conv():
            average = (
                (lambda k: k) if isinstance(step, Dense) else (lambda k: _convolve(k, step, spec) / step.window_size)
            )
            bias = 0.0 if step.b_var is None else step.b_var
            own_weight, own_bias = step.ntk_coefficients(spec)
            new = [step.w_var * average(k) + bias for k in (nngp, cov1, cov2)]
            return new[0], step.w_var * average(ntk) + own_weight * average(nngp) + own_bias, new[1], new[2]
        case Dual():
            var1, var2 = _diagonal(cov1), _diagonal(cov2)
            out, dot = _abrelu(step.activation, nngp, *_outer_variances(var1[:, None], var2[None]))
            own = [_abrelu(step.activation, c, *_outer_variances(v, v))[0] for c, v in ((cov1, var1), (cov2, var2))]
            return out, ntk * dot, *own
        case Normalize():
            axes = tuple(1 + a for a in step.space_axes)
            scales = [
                (step.eps + _diagonal(c)).mean(axes, keepdims=True) ** -0.5 * np.ones_like(_diagonal(c))
                for c in (cov1, cov2)
            ]
            first, second = _outer_variances(scales[0][:, None], scales[1][None])
            own = [c * np.multiply(*_outer_variances(s, s)) for c, s in zip((cov1, cov2), scales, strict=True)]
            return nngp * first * second, ntk * first * second, *own
        case Combine():
            return tuple(
                sum(w * part for w, part in zip(step.weights, parts, strict=True))
                for parts in zip(*inputs, strict=True)
            )
        case Multiply():
            for other in inputs[1:]:
                ntk = ntk * other[0] + nngp * other[1]
                nngp, cov1, cov2 = nngp * other[0], cov1 * other[2], cov2 * other[3]
            return nngp, ntk, cov1, cov2
        case Pool():
            return tuple(_pool(k, step, spec) for k in inputs[0])
        case GlobalPool():
            return tuple(k.mean((-4, -3, -2, -1)) if step.mean else k.sum((-4, -3, -2, -1)) for k in inputs[0])
        case Flatten():
            return tuple(_diagonal(k).mean((-2, -1)) for k in inputs[0])
    raise NotImplementedError(step)


def _diagonal(k):
    return k if k.ndim < 4 else np.einsum("...hwhw->...hw", k)


def _outer_variances(var1, var2):
    if var1.ndim < 3:
        return var1, var2
    return var1[..., :, :, None, None], var2[..., None, None, :, :]


def _abrelu(activation, k, var1, var2):
    """`f(x) = b relu(x) - a relu(-x)`, from the arc-cosine kernels of both signs of the correlation."""
    a, b = activation.a, activation.b
    (same, same_dot), (opposite, opposite_dot) = _relu(k, var1, var2), _relu(-k, var1, var2)
    return (a * a + b * b) * same - 2 * a * b * opposite, (a * a + b * b) * same_dot + 2 * a * b * opposite_dot


def _relu(k, var1, var2):
    scale = np.sqrt(var1 * var2) * np.ones_like(k)
    correlation = np.clip(np.divide(k, scale, out=np.zeros_like(k), where=scale > 0), -1, 1)
    angle = np.arccos(correlation)
    out = scale * (np.sqrt(1 - correlation**2) + (np.pi - angle) * correlation) / (2 * np.pi)
    return out, (np.pi - angle) / (2 * np.pi)


def _convolve(k, step, spec):
    taps = list(itertools.product(*map(range, step.window)))
    return _windows(k, step, spec, step.dilation, [(t, t) for t in taps])


def _pool(k, step, spec):
    taps = list(itertools.product(*map(range, step.window)))
    pairs = list(itertools.product(taps, taps))
    total = _windows(k, step, spec, (1, 1), pairs)
    if not step.mean:
        return total
    if step.normalize_edges:
        return total / _windows(np.ones(spec.space * 2), step, spec, (1, 1), pairs)
    return total / step.window[0] ** 2 / step.window[1] ** 2


def _windows(k, step, spec, dilation, pairs):
    """Sums entries under pairs of taps, one for the first and one for the second position."""
    pads = window_pads(spec.space, step.window, step.strides, step.padding, dilation)
    space = window_space(spec.space, step.window, step.strides, step.padding, dilation, "window")

    def position(window, tap, axis):
        p = window * step.strides[axis] + tap * dilation[axis] - pads[axis][0]
        if step.padding == "CIRCULAR":
            return p % spec.space[axis]
        return p if 0 <= p < spec.space[axis] else None

    out = np.zeros(k.shape[:-4] + space + space)
    for i, j, m, n in itertools.product(*map(range, space + space)):
        for first, second in pairs:
            at = (
                position(i, first[0], 0),
                position(j, first[1], 1),
                position(m, second[0], 0),
                position(n, second[1], 1),
            )
            if None not in at:
                out[..., i, j, m, n] += k[(..., *at)]
    return out
