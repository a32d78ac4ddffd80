"""A baseline: the kernel of a CNN as its formulas are written, layer by layer on the whole covariance tensor.

Nothing here is clever, and nothing is this library's: a four-dimensional convolution of the covariance of all pairs of
positions, the arc-cosine kernel by `arccos`, both over all pairs of samples at once. For 3 x 3 convolutions with zero
padding and no bias, ReLU, pools whose windows do not overlap, global average pools and Flatten.
"""

import jax.numpy as jnp
from jax import lax


def kernel(layers, x1, x2, w_var=2.0):
    """Returns `(nngp, ntk)` of `layers`, a list of 'conv', 'relu', 'pool', 'global pool' and 'flatten'."""
    diagonal = layers[-1] == "flatten" and not {"pool", "global pool"} & set(layers)
    pairs = "ihwc,jhwc->ijhw" if diagonal else "ihwc,jklc->ijhkwl"
    k = jnp.einsum(pairs, x1, x2, precision=lax.Precision.HIGHEST) / x1.shape[-1]
    var1, var2 = (jnp.mean(x**2, -1) for x in (x1, x2))
    own1, own2 = (jnp.einsum("ihwc,iklc->ihkwl", x, x, precision=lax.Precision.HIGHEST) / x.shape[-1] for x in (x1, x2))
    theta = jnp.zeros_like(k)
    has_pools = "pool" in layers
    for layer in layers:
        if layer == "conv":
            k, theta = w_var * _average(k, diagonal), w_var * _average(theta, diagonal)
            theta = theta + k
            if has_pools:
                own1, own2 = (w_var * _average(own[:, None], False)[:, 0] for own in (own1, own2))
                var1, var2 = _diagonal(own1), _diagonal(own2)
            else:
                var1, var2 = (w_var * _average(var[:, None], True)[:, 0] for var in (var1, var2))
        elif layer == "relu":
            k, dot = _relu(k, *_outer(var1[:, None], var2[None, :], diagonal))
            theta = theta * dot
            if has_pools:
                own1, own2 = (_relu(own, *_outer(var, var, False))[0] for own, var in ((own1, var1), (own2, var2)))
            var1, var2 = var1 / 2, var2 / 2
        elif layer == "pool":
            k, theta, own1, own2 = (_pool(a) for a in (k, theta, own1, own2))
            var1, var2 = _diagonal(own1), _diagonal(own2)
        elif layer == "global pool":
            k, theta = (jnp.mean(a, (-4, -3, -2, -1)) for a in (k, theta))
        else:
            assert layer == "flatten", layer
            k, theta = (jnp.mean(a if diagonal else _diagonal(a), (-2, -1)) for a in (k, theta))
    return k, theta


def _average(k, diagonal):
    """The mean over 3 x 3 windows of one position, or of both positions of a pair moved alike."""
    if diagonal:
        return _convolve(k, jnp.ones((3, 3), k.dtype)) / 9
    eye = jnp.eye(3, dtype=k.dtype)
    rows = jnp.moveaxis(k, (-4, -3), (-2, -1))  # (..., W, W', H, H')
    rows = jnp.moveaxis(_convolve(rows, eye), (-2, -1), (-4, -3))
    return _convolve(rows, eye) / 9


def _convolve(x, window):
    flat = x.reshape(-1, 1, *x.shape[-2:])
    out = lax.conv_general_dilated(flat, window[None, None], (1, 1), "SAME", precision=lax.Precision.HIGHEST)
    return out.reshape(x.shape)


def _relu(k, var1, var2):
    scale = jnp.sqrt(var1 * var2)
    correlation = jnp.clip(k / jnp.where(scale > 0, scale, 1), -1, 1)
    angle = jnp.arccos(correlation)
    sine = jnp.sqrt(1 - correlation**2)
    return scale * (sine + (jnp.pi - angle) * correlation) / (2 * jnp.pi), (jnp.pi - angle) / (2 * jnp.pi)


def _outer(var1, var2, diagonal):
    """Variances of both positions of each pair, `(..., H, H', W, W')`."""
    if diagonal:
        return var1, var2
    return var1[..., :, None, :, None], var2[..., None, :, None, :]


def _diagonal(own):
    return jnp.einsum("...hhww->...hw", own)


def _pool(k):
    *batch, h, _, w, _ = k.shape
    return jnp.mean(k.reshape(*batch, h // 2, 2, h // 2, 2, w // 2, 2, w // 2, 2), (-7, -5, -3, -1))
