"""Finite networks whose empirical tangent kernels are benchmarked, in JAX alone: `f(params, x)`, float32."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)
CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


def weights(*shape):
    return RNG.normal(scale=np.prod(shape[:-1]) ** -0.5, size=shape).astype("float32")


def conv(x, w, strides=(1, 1)):
    return jax.lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=CHANNELS_LAST)


def fcn(outputs):
    """Three hidden layers of 256 on 784 inputs."""

    def f(params, x):
        *hidden, readout = params
        for w, b in hidden:
            x = jax.nn.relu(x @ w + b)
        return x @ readout

    widths = [784, 256, 256, 256]
    hidden = [(weights(n, m), weights(1, m)) for n, m in itertools.pairwise(widths)]
    return f, [*hidden, weights(256, outputs)], (784,)


def scanned():
    """Eight hidden layers of 256, stacked in a scan, and 10 outputs."""

    def f(params, x):
        hidden, readout = params
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, hidden)[0] @ readout

    hidden = np.stack([weights(256, 256) for _ in range(8)])
    return f, [hidden, weights(256, 10)], (256,)


def deep():
    """Ten hidden layers of 1000 on 1000 inputs, 10^7 parameters, one output."""

    def f(params, x):
        *hidden, readout = params
        for w in hidden:
            x = jax.nn.relu(x @ w)
        return x @ readout

    return f, [*(weights(1000, 1000) for _ in range(10)), weights(1000, 1)], (1000,)


def cnn():
    """Three 3 x 3 convolutions of 64 channels, a global average, 10 outputs."""

    def f(params, x):
        *hidden, readout = params
        for w in hidden:
            x = jax.nn.relu(conv(x, w))
        return jnp.mean(x, (1, 2)) @ readout

    return f, [weights(3, 3, 3, 64), weights(3, 3, 64, 64), weights(3, 3, 64, 64), weights(64, 10)], (32, 32, 3)


def wide_resnet():
    """A residual block for each of 16, 32 and 64 channels, a global average, 10 outputs."""

    def f(params, x):
        x = conv(x, params["first"])
        for i, block in enumerate(params["blocks"]):
            strides = (1, 1) if i == 0 else (2, 2)
            shortcut = conv(x, block["shortcut"], strides)
            x = conv(jax.nn.relu(x), block["a"], strides)
            x = conv(jax.nn.relu(x), block["b"]) + shortcut
        return jnp.mean(x, (1, 2)) @ params["readout"]

    blocks = [
        {"shortcut": weights(3, 3, n, m), "a": weights(3, 3, n, m), "b": weights(3, 3, m, m)}
        for n, m in ((16, 16), (16, 32), (32, 64))
    ]
    return f, {"first": weights(3, 3, 3, 16), "blocks": blocks, "readout": weights(64, 10)}, (32, 32, 3)


def transformer(width=64, heads=4):
    """One block, with layer normalisation, on 32 tokens of 64 channels; the mean over tokens, 10 outputs."""

    def normalised(x, scale, shift):
        x = x - jnp.mean(x, -1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale + shift

    def f(params, x):
        y = normalised(x, *params["norm1"])
        q, k, v = (jnp.einsum("ntd,dhk->nthk", y, params[name]) for name in "qkv")
        attention = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k) / (width // heads) ** 0.5, -1)
        x = x + jnp.einsum("nhts,nshk,hkd->ntd", attention, v, params["out"])
        x = x + jax.nn.relu(normalised(x, *params["norm2"]) @ params["up"]) @ params["down"]
        return jnp.mean(x, 1) @ params["readout"]

    params = {name: weights(width, heads, width // heads) for name in "qkv"}
    params |= {"out": weights(heads, width // heads, width), "up": weights(width, 4 * width)}
    params |= {name: (np.ones((1, 1, width), "float32"), weights(1, 1, width)) for name in ("norm1", "norm2")}
    return f, params | {"down": weights(4 * width, width), "readout": weights(width, 10)}, (32, width)


# The network, and how many samples are in each of two batches.
NETWORKS = {
    "fcn-1": (lambda: fcn(1), 64),
    "fcn-10": (lambda: fcn(10), 32),
    "fcn-100": (lambda: fcn(100), 4),
    "cnn-pool": (cnn, 4),
    "wide-resnet": (wide_resnet, 4),
    "transformer": (transformer, 8),
    "scanned": (scanned, 32),
}
# Of which the kernel of a batch with itself is computed within a bound on memory.
LARGE = {"fcn-10M": (deep, 1000)}
