"""Small functions in which parameters enter in all sorts of places: `f(params, x)`, samples along the first axis."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

tanh = jnp.tanh


def einsum(spec):
    return lambda w, x: tanh(jnp.einsum(spec, w, x))


def conv(spec, strides=(1, 1), padding="SAME", **kwargs):
    def f(w, x):
        return tanh(lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=spec, **kwargs))

    return f


def grouped_batch(w, x):
    """Both samples of a pair are in one batch of a convolution with batch groups: x is (n, 2, 5, 5, 2)."""

    def of_sample(x):
        y = lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), batch_group_count=2
        )
        return tanh(y[0])

    return jax.vmap(of_sample)(x)


def row(x):
    """Adds the axis of the samples in front, where jnp would do so by itself."""
    return jnp.expand_dims(x, 0)


def repeated(fn, length):
    """A recurrent network: the same parameters in every step."""

    def f(w, x):
        state, _ = lax.scan(lambda h, _: (fn(w, h), None), x, None, length=length)
        return state

    return f


def in_rounds(layer):
    """A network with a layer for each entry along the first axis of the parameters."""
    return lambda w, x: lax.scan(lambda h, v: (layer(h, v), None), x, w)[0]


def layers(w, x):
    """A network whose layers are stacked along the first axis of the parameters."""
    return lax.scan(lambda h, layer: (tanh(h @ layer["w"] + row(layer["b"])), None), x, w)[0]


def layers_with_loss(w, x):
    _, states = lax.scan(lambda h, layer: (tanh(h @ layer), jnp.sum(h * h, -1)), x, w)
    return states.T


def heads_in_scan(w, x):
    """Layers of attention with one head, whose projections are slices of one array, as a loop."""

    def layer(x, w):
        q, k, v = jnp.split(x @ w["qkv"], 3, axis=-1)
        weights = jax.nn.softmax(jnp.einsum("ntd,nsd->nts", q, k) + jnp.sum(w["qkv"][:, 1:3]), -1)
        return x + weights @ v @ w["out"].reshape(2, 3), None

    return lax.scan(layer, x, w)[0]


def attention(w, x):
    q, k, v = (jnp.einsum("ntd,dhk->nthk", x, w[i]) for i in range(3))
    weights = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k), -1)
    return jnp.einsum("nhts,nshk,hkd->ntd", weights, v, w[3])


def fused_attention(w, x):
    q, k, v = jnp.split(x @ w, 3, axis=-1)
    return jax.nn.softmax(jnp.einsum("ntd,nsd->nts", q, k), -1) @ v


def unstacked(w, x):
    first, second = jnp.unstack(w, axis=1)
    return tanh(x @ first) * (x @ second)


def split_weights(w, x):
    a, b = jnp.split(w, [1], axis=1)
    return tanh(x @ a) * (x @ b)


def layer_norm(w, x):
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 0.1)
    return tanh(x * row(w[0]) + row(w[1]))


def standardised(w, x):
    """Weights are normalised before they are used."""
    w = (w - jnp.mean(w, 0, keepdims=True)) / jnp.sqrt(jnp.sum(w * w, 0, keepdims=True))
    return x @ w


def with_derivative_of_its_own(kind):
    if kind == "jvp":

        @jax.custom_jvp
        def product(w, x):
            return x @ w

        product.defjvp(lambda p, t: (product(*p), 2.0 * product(t[0], p[1]) + product(p[0], t[1])))
    else:

        @jax.custom_vjp
        def product(w, x):
            return x @ w

        product.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, c: (3.0 * (r[1].T @ c), c @ r[0].T))
    return lambda w, x: tanh(product(w, tanh(x)))


def fixed_clip(w, x):
    return tanh(jnp.clip(x @ w, -0.5, 0.7))


def tokens(x):
    """Numbers of words, made of the inputs."""
    return jnp.abs(x * 3).astype(int) % 4


def embedding(w, x, **kwargs):
    return tanh(jnp.take(w, tokens(x), axis=0, **kwargs))


def tied_embedding(w, x):
    return tanh(jnp.mean(w[tokens(x)], 1)) @ w.T


# name: function, shapes of the parameters, shape of a sample
PRODUCTS = {
    "matrix": (lambda w, x: x @ w, (3, 2), (3,)),
    "matrix, then nonlinear": (lambda w, x: tanh(x @ w), (3, 2), (3,)),
    "transposed": (lambda w, x: tanh(x @ w.T), (2, 3), (3,)),
    "vector": (lambda w, x: tanh(x @ w), (3,), (3,)),
    "from the left": (lambda w, x: tanh(w @ x.T).T, (2, 3), (3,)),
    "positions": (lambda w, x: tanh(x @ w), (3, 2), (4, 3)),
    "over positions": (einsum("pq,npc->nqc"), (4, 2), (4, 3)),
    "both axes": (einsum("pcq,npc->nq"), (4, 3, 2), (4, 3)),
    "one matrix for each position": (einsum("pcd,npc->npd"), (4, 3, 2), (4, 3)),
    "two batch axes": (einsum("pqc,npqc->npq"), (2, 3, 2), (2, 3, 2)),
    "an outer product": (einsum("a,nb->nab"), (2,), (3,)),
    "a sum over an axis of the weights": (einsum("abc,nb->na"), (2, 3, 2), (3,)),
    "a diagonal": (einsum("aa,na->na"), (3, 3), (3,)),
    "a trace": (einsum("aa,nb->nb"), (3, 3), (2,)),
    "two matrices": (lambda w, x: tanh(tanh(x @ w[0]) @ w[1]), [(3, 4), (4, 2)], (3,)),
    "two matrices, linear": (lambda w, x: x @ w[0] @ w[1], [(3, 4), (4, 2)], (3,)),
    "the matrices first": (lambda w, x: x @ (w[0] @ w[1]), [(3, 4), (4, 2)], (3,)),
    "low rank and fixed": (lambda w, x: x @ (jnp.ones((3, 2)) + w[0] @ w[1]), [(3, 1), (1, 2)], (3,)),
    "quadratic": (lambda w, x: tanh(jnp.einsum("ni,ij,nj->n", x, w, x)[:, None]), (3, 3), (3,)),
    "multi head": (einsum("dhk,ntd->nthk"), (3, 2, 2), (2, 3)),
}
ELEMENTWISE = {
    "bias": (lambda w, x: tanh(x + row(w)), (3,), (3,)),
    "bias subtracted": (lambda w, x: tanh(x - row(w)), (3,), (3,)),
    "subtracted from": (lambda w, x: tanh(row(w) - x), (3,), (3,)),
    "bias at positions": (lambda w, x: tanh(x + w.reshape(1, 1, 3)), (3,), (4, 3)),
    "bias of positions": (lambda w, x: tanh(x + w), (1, 4, 1), (4, 3)),
    "number": (lambda w, x: tanh(x + w), (), (3,)),
    "scale": (lambda w, x: tanh(x * row(w)), (3,), (3,)),
    "scale at positions": (lambda w, x: tanh(w.reshape(1, 1, 3) * x), (3,), (4, 3)),
    "scale by a number": (lambda w, x: tanh(w * x), (), (3,)),
    "scale along axes of 1": (lambda w, x: tanh(x * w), (1, 1, 3), (4, 3)),
    "divided by a number": (lambda w, x: tanh(row(w / 3.0) * x), (3,), (3,)),
    "divided by an input": (lambda w, x: tanh(row(w) / (2 + x * x)), (3,), (3,)),
    "divides": (lambda w, x: tanh(x / row(2 + w * w)), (3,), (3,)),
    "negative": (lambda w, x: tanh(x @ -w), (3, 2), (3,)),
    "times a number, product": (lambda w, x: tanh(x @ (0.3 * w)), (3, 2), (3,)),
    "over a number, product": (lambda w, x: tanh(x @ (w / np.sqrt(3.0).astype("float32"))), (3, 2), (3,)),
    "masked, product": (lambda w, x: tanh(x @ (w * jnp.asarray([[1, 0], [1, 1], [0, 1]], x.dtype))), (3, 2), (3,)),
    "selected, product": (lambda w, x: x @ jnp.where(jnp.asarray([[True], [False], [True]]), w, 0), (3, 2), (3,)),
    "scaled by an input, product": (lambda w, x: jnp.sum(x, 1, keepdims=True) * (x @ w), (3, 2), (3,)),
    "by a power": (lambda w, x: tanh(x @ w**2), (3, 2), (3,)),
    "exponential": (lambda w, x: tanh(x @ jnp.exp(w)), (3, 2), (3,)),
    "softplus": (lambda w, x: tanh(x * row(jax.nn.softplus(w))), (3,), (3,)),
    "power with the parameter on top": (lambda w, x: (1 + x * x) ** row(w), (3,), (3,)),
    "maximum": (lambda w, x: jnp.maximum(x, row(w)), (3,), (3,)),
    "prelu": (lambda w, x: jnp.where(x > 0, x, row(w) * x), (3,), (3,)),
    "product of two": (lambda w, x: tanh(x * row(w[0] * w[1])), [(3,), (3,)], (3,)),
    "sum of two": (lambda w, x: tanh(x * row(w[0] + w[1])), [(3,), (3,)], (3,)),
    "two numbers": (lambda w, x: w[0] * tanh(x * w[1]), [(), ()], (3,)),
    "sine of a linear function": (lambda w, x: jnp.sin(x * row(w[0]) + row(w[1])), [(3,), (3,)], (3,)),
    "complex on the way": (lambda w, x: jnp.real(jnp.fft.ifft(jnp.fft.fft(x) * jnp.fft.fft(row(w)))), (3,), (3,)),
    "complex weights of two": (lambda w, x: jnp.abs(x @ lax.complex(w[0], w[1])), [(3, 2), (3, 2)], (3,)),
    "stopped": (lambda w, x: tanh(x @ w) * lax.stop_gradient(jnp.sum(w)), (3, 2), (3,)),
    "compared": (lambda w, x: tanh(x @ w) * (jnp.sum(w) > 0), (3, 2), (3,)),
    "rounded": (lambda w, x: tanh(x @ w) + jnp.round(jnp.sum(w)), (3, 2), (3,)),
}
ARRANGEMENTS = {
    "reshaped": (lambda w, x: tanh(x @ w.reshape(3, 2)), (6,), (3,)),
    "flattened": (lambda w, x: tanh(x * row(w.ravel())), (3, 2), (6,)),
    "transposed and reshaped": (lambda w, x: tanh(x @ w.T.reshape(3, 2)), (2, 3), (3,)),
    "scaled and reshaped": (lambda w, x: tanh(x @ (w / 2.0).reshape(3, 2)), (6,), (3,)),
    "broadcast and reshaped": (lambda w, x: x * jnp.broadcast_to(row(w), (2, 3)).reshape(1, 6), (3,), (6,)),
    "reshaped twice": (lambda w, x: tanh(x @ w.reshape(6).reshape(3, 2)), (2, 3), (3,)),
    "reversed": (lambda w, x: tanh(x @ w[::-1]), (3, 2), (3,)),
    "row": (lambda w, x: tanh(x * row(w[1])), (2, 3), (3,)),
    "last row": (lambda w, x: tanh(x * row(w[-1])), (2, 3), (3,)),
    "column": (lambda w, x: tanh(x * row(w[:, 1])), (3, 2), (3,)),
    "two rows": (lambda w, x: tanh(x * row(w[0])) + jnp.cos(x * row(w[1])), (2, 3), (3,)),
    "part": (lambda w, x: tanh(x @ w[1:, :1]), (4, 2), (3,)),
    "overlapping parts": (lambda w, x: tanh(x @ w[1:]) + x @ w[:-1], (4, 2), (3,)),
    "unstacked": (unstacked, (3, 2, 3), (3,)),
    "every second": (lambda w, x: tanh(x @ w[::2]), (5, 2), (3,)),
    "dynamic row": (lambda w, x: tanh(x * row(lax.dynamic_index_in_dim(w, 1, keepdims=False))), (2, 3), (3,)),
    "changed at": (lambda w, x: tanh(x @ w.at[0].set(1.0)), (3, 2), (3,)),
    "added at": (lambda w, x: tanh(x @ w.at[0].add(1.0)), (3, 2), (3,)),
    "split": (split_weights, (3, 3), (3,)),
    "joined": (lambda w, x: tanh(x @ jnp.concatenate([w[0], w[1]], 1)), [(3, 1), (3, 2)], (3,)),
    "joined with itself": (lambda w, x: tanh(x @ jnp.concatenate([w, w], 0)), (2, 2), (4,)),
    "joined with inputs": (
        lambda w, x: tanh(jnp.concatenate([jnp.broadcast_to(row(w), (len(x), 2)), x], 1)),
        (2,),
        (3,),
    ),
    "stacked": (lambda w, x: tanh(x @ jnp.stack([w[0], w[1]], 1)), [(3,), (3,)], (3,)),
    "padded": (lambda w, x: tanh(x @ jnp.pad(w, ((1, 0), (0, 1)))), (2, 2), (3,)),
    "tiled": (lambda w, x: tanh(x * row(jnp.tile(w, 2))), (3,), (6,)),
    "repeated entries": (lambda w, x: tanh(x * row(jnp.repeat(w, 2))), (3,), (6,)),
    "rolled": (lambda w, x: tanh(x * row(jnp.roll(w, 1))), (3,), (3,)),
    "axes moved": (lambda w, x: tanh(jnp.einsum("ni,ijk->njk", x, jnp.moveaxis(w, 0, 2))), (2, 3, 2), (3,)),
    "squeezed": (lambda w, x: tanh(x @ jnp.squeeze(w, 1)), (3, 1, 2), (3,)),
    "expanded": (lambda w, x: tanh(x * w[None, :, None]), (4,), (4, 3)),
    "upper triangle": (lambda w, x: tanh(x @ jnp.triu(w)), (3, 3), (3,)),
    "symmetric": (lambda w, x: tanh(x @ (w + w.T)), (3, 3), (3,)),
    "diagonal matrix": (lambda w, x: tanh(x @ jnp.diag(w)), (3,), (3,)),
    "outer product of itself": (lambda w, x: tanh(x @ jnp.outer(w, w)), (3,), (3,)),
    "permuted": (lambda w, x: tanh(x @ w[jnp.array([2, 0, 1])]), (3, 2), (3,)),
    "sorted": (lambda w, x: tanh(x * row(jnp.sort(w))), (3,), (3,)),
}
REDUCTIONS = {
    "sum": (lambda w, x: tanh(x * jnp.sum(w)), (3, 2), (3,)),
    "sum along an axis": (lambda w, x: tanh(x * row(jnp.sum(w, 1))), (3, 2), (3,)),
    "sum of what was repeated": (lambda w, x: x * jnp.sum(jnp.broadcast_to(row(w), (4, 3)), 0)[None], (3,), (3,)),
    "mean": (lambda w, x: tanh(x * row(jnp.mean(w, 1))), (3, 2), (3,)),
    "maximum of all": (lambda w, x: tanh(x * jnp.max(w)), (3, 2), (3,)),
    "product of all": (lambda w, x: tanh(x * jnp.prod(w)), (3,), (3,)),
    "cumulative sum": (lambda w, x: tanh(x * row(jnp.cumsum(w))), (3,), (3,)),
    "logsumexp": (lambda w, x: tanh(x * jax.nn.logsumexp(w)), (3,), (3,)),
    "softmax": (lambda w, x: tanh(x * row(jax.nn.softmax(w))), (3,), (3,)),
    "norm": (lambda w, x: tanh(x @ w) * jnp.linalg.norm(w), (3, 2), (3,)),
    "normalised": (standardised, (3, 2), (3,)),
    "inverse": (lambda w, x: x @ jnp.linalg.inv(w + 3 * jnp.eye(2, dtype=w.dtype)), (2, 2), (2,)),
    "outputs summed": (lambda w, x: jnp.sum(tanh(x @ w), 1), (3, 2), (4, 3)),
    "outputs pooled": (
        lambda w, x: lax.reduce_window(x @ w, 0.0, lax.add, (1, 2, 1), (1, 2, 1), "VALID"),
        (3, 2),
        (4, 3),
    ),
    "outputs max pooled": (
        lambda w, x: lax.reduce_window(x @ w, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID"),
        (3, 2),
        (4, 3),
    ),
}
CONVOLUTIONS = {
    "3 x 3": (conv(("NHWC", "HWIO", "NHWC")), (3, 3, 2, 2), (4, 4, 2)),
    "channels first": (conv(("NCHW", "OIHW", "NCHW")), (2, 2, 3, 3), (2, 4, 4)),
    "channels moved": (
        lambda w, x: conv(("HWNC", "IOHW", "NHWC"))(w, jnp.moveaxis(x, 0, 2)),
        (2, 3, 2, 2),
        (4, 4, 2),
    ),
    "valid": (conv(("NHWC", "HWIO", "NHWC"), padding="VALID"), (2, 3, 2, 2), (4, 3, 2)),
    "no places": (
        lambda w, x: jnp.sum(conv(("NHWC", "HWIO", "NHWC"), (2, 3), "VALID")(w[0], x), (1, 2)) + row(w[1]),
        [(3, 3, 2, 4), (4,)],
        (1, 2, 2),
    ),
    "strides": (conv(("NHWC", "HWIO", "NHWC"), (2, 1)), (3, 2, 2, 2), (5, 4, 2)),
    "padding": (conv(("NHWC", "HWIO", "NHWC"), padding=((2, 0), (-1, 1))), (2, 2, 2, 2), (4, 4, 2)),
    "dilated filter": (conv(("NHWC", "HWIO", "NHWC"), rhs_dilation=(2, 1)), (2, 2, 2, 2), (4, 4, 2)),
    "dilated image": (
        conv(("NHWC", "HWIO", "NHWC"), padding=((1, 1), (2, 0)), lhs_dilation=(2, 2)),
        (2, 2, 2, 2),
        (3, 3, 2),
    ),
    "groups": (conv(("NHWC", "HWIO", "NHWC"), feature_group_count=2), (2, 2, 1, 4), (3, 3, 2)),
    "groups, channels first": (conv(("NCHW", "OIHW", "NCHW"), feature_group_count=2), (4, 2, 2, 2), (4, 3, 3)),
    "depthwise": (conv(("NHWC", "HWIO", "NHWC"), feature_group_count=3), (2, 2, 1, 3), (3, 3, 3)),
    "groups of samples": (grouped_batch, (2, 2, 2, 4), (2, 3, 3, 2)),
    "one axis": (
        lambda w, x: tanh(lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))),
        (3, 2, 2),
        (4, 2),
    ),
    "no axis": (
        lambda w, x: tanh(lax.conv_general_dilated(x, w, (), (), dimension_numbers=("NC", "IO", "NC"))),
        (2, 3),
        (2,),
    ),
    "scaled": (lambda w, x: conv(("NHWC", "HWIO", "NHWC"))(w * 0.3, x), (2, 2, 2, 2), (3, 3, 2)),
    "scaled, groups": (
        lambda w, x: conv(("NHWC", "HWIO", "NHWC"), feature_group_count=2)(w * 0.3, x),
        (2, 2, 1, 2),
        (3, 3, 2),
    ),
    "the image is the parameter": (
        lambda w, x: tanh(
            conv(("NHWC", "HWIO", "NHWC"))(jnp.ones((2, 2, 2, 2), x.dtype), row(w)) * x[:, None, None, :]
        ),
        (3, 3, 2),
        (2,),
    ),
    "two layers and a mean": (
        lambda w, x: jnp.mean(conv(("NHWC", "HWIO", "NHWC"))(w[1], conv(("NHWC", "HWIO", "NHWC"))(w[0], x)), (1, 2)),
        [(2, 2, 2, 3), (3, 3, 3, 2)],
        (3, 3, 2),
    ),
    "transposed convolution": (
        lambda w, x: tanh(lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))),
        (2, 2, 2, 2),
        (2, 2, 2),
    ),
    "local": (
        lambda w, x: tanh(
            lax.conv_general_dilated_local(x, w, (1, 1), "VALID", (2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        ),
        (2, 2, 8, 2),
        (3, 3, 2),
    ),
    "bias and scale": (
        lambda w, x: conv(("NHWC", "HWIO", "NHWC"))(w[0], x) * w[1].reshape(1, 1, 1, 2) + w[2].reshape(1, 1, 1, 2),
        [(2, 2, 2, 2), (2,), (2,)],
        (3, 3, 2),
    ),
}
TIED = {
    "twice": (lambda w, x: tanh(tanh(x @ w) @ w), (3, 3), (3,)),
    "and its transpose": (lambda w, x: tanh(tanh(x @ w) @ w.T), (3, 2), (3,)),
    "and its transpose, linear": (lambda w, x: x @ (w @ w.T), (3, 2), (3,)),
    "three times": (lambda w, x: tanh(tanh(tanh(x @ w) @ w) @ w), (3, 3), (3,)),
    "in a sum": (lambda w, x: tanh(x @ w) + jnp.cos(x @ w), (3, 2), (3,)),
    "as matrix and bias": (lambda w, x: tanh(x @ w + w[:1]), (3, 2), (3,)),
    "reshaped once": (lambda w, x: tanh(x @ w) @ w.reshape(2, 3), (3, 2), (3,)),
    "all heads": (lambda w, x: {"a": x @ w, "b": [tanh(x @ w), jnp.sum(tanh(x @ w), 1)]}, (3, 2), (3,)),
    "recurrent": (repeated(lambda w, h: tanh(h @ w), 3), (3, 3), (3,)),
    "loop": (lambda w, x: lax.fori_loop(0, 2, lambda i, h: tanh(h @ w), x), (3, 3), (3,)),
    "unrolled": (repeated(lambda w, h: tanh(h @ w + 1), 1), (3, 3), (3,)),
    "embedding and readout": (tied_embedding, (4, 3), (2,)),
    "two embeddings": (lambda w, x: embedding(w, x) * embedding(w, 2 * x), (4, 3), (2,)),
}
CALLS = {
    "jit": (lambda w, x: jax.jit(lambda w, x: tanh(x @ w))(w, x), (3, 2), (3,)),
    "jit in jit": (lambda w, x: jax.jit(lambda w: jax.jit(lambda w: tanh(x @ w) + 1)(w * 2))(w), (3, 2), (3,)),
    "jit that returns the parameter": (lambda w, x: tanh(x @ jax.jit(lambda w: (w.T, w))(w)[1]), (3, 2), (3,)),
    "remat": (lambda w, x: jax.checkpoint(lambda w, x: tanh(tanh(x @ w) @ w))(w, x), (3, 3), (3,)),
    "custom_jvp": (with_derivative_of_its_own("jvp"), (3, 2), (3,)),
    "custom_vjp": (with_derivative_of_its_own("vjp"), (3, 2), (3,)),
    "relu of weights": (lambda w, x: tanh(x @ jax.nn.relu(w)), (3, 2), (3,)),
    "cond": (
        lambda w, x: lax.cond(jnp.sum(w) > 0, lambda w: tanh(x @ w), lambda w: x @ w, w),
        (3, 2),
        (3,),
    ),
    "switch": (
        lambda w, x: jax.vmap(
            lambda x: lax.switch(tokens(x[0]), [lambda w, s=s: s * tanh(x @ w) for s in range(4)], w)
        )(x),
        (3, 2),
        (3,),
    ),
    "vmap": (lambda w, x: jax.vmap(lambda x: tanh(x @ w))(x), (3, 2), (3,)),
    "vmap over parameters": (lambda w, x: jax.vmap(lambda w: tanh(x @ w), out_axes=1)(w), (4, 3, 2), (3,)),
    "derivative in the function": (
        lambda w, x: jax.vmap(jax.grad(lambda x: jnp.sum(tanh(x @ w))))(x),
        (3, 2),
        (3,),
    ),
    "lax.map": (lambda w, x: lax.map(lambda x: tanh(x @ w), x), (3, 2), (3,)),
    "layers of a scan": (layers, {"w": (2, 3, 3), "b": (2, 3)}, (3,)),
    "scan with outputs": (layers_with_loss, (2, 3, 3), (3,)),
    "scan of no steps": (repeated(lambda w, h: tanh(h @ w), 0), (3, 3), (3,)),
    "reversed scan": (
        lambda w, x: lax.scan(lambda h, v: (tanh(h * row(v)), None), x, w, reverse=True)[0],
        (2, 3),
        (3,),
    ),
}
LOOPS = {
    "stacked and tied": (
        lambda w, x: lax.scan(lambda h, v: (tanh(h @ v @ w[1] + h @ w[1]), None), x, w[0])[0],
        [(2, 3, 3), (3, 3)],
        (3,),
    ),
    "heads and slices": (heads_in_scan, {"qkv": (2, 3, 6), "out": (2, 2, 3)}, (2, 3)),
    "convolutions": (
        lambda w, x: jnp.mean(in_rounds(lambda h, v: conv(("NHWC", "HWIO", "NHWC"))(v, h))(w, x), (1, 2)),
        (2, 3, 3, 2, 2),
        (3, 3, 2),
    ),
    "convolutions in groups": (
        in_rounds(lambda h, v: conv(("NHWC", "HWIO", "NHWC"), feature_group_count=2)(v, h)),
        (2, 2, 2, 1, 2),
        (3, 3, 2),
    ),
    "scan in a scan": (
        in_rounds(lambda h, v: in_rounds(lambda h, u: tanh(h @ u))(v, h)),
        (2, 2, 3, 3),
        (3,),
    ),
    "scan in a branch": (
        lambda w, x: lax.cond(jnp.sum(w) < 9, layers, lambda w, x: x, {"w": w, "b": w[:, 0]}, x),
        (2, 3, 3),
        (3,),
    ),
    "branches in a scan": (
        lambda w, x: lax.scan(
            lambda h, i: (lax.switch(i, [lambda w, h: tanh(h @ w), lambda w, h: h * row(w[0])], w, h), None),
            x,
            jnp.array([0, 1, 0]),
        )[0],
        (3, 3),
        (3,),
    ),
    "branches with other parameters": (
        lambda w, x: lax.cond(x[0, 0] > -9, lambda: tanh(x @ w[0]), lambda: tanh(x) @ w[1] + row(w[1][0])),
        [(3, 3), (3, 3)],
        (3,),
    ),
    "table in a scan": (
        lambda w, x: lax.scan(lambda h, v: (tanh(h * embedding(v, x)), None), jnp.ones((len(x), 2, 3), x.dtype), w)[0],
        (2, 4, 3),
        (2,),
    ),
    "scaled, transposed, checkpointed": (
        lambda w, x: lax.scan(jax.checkpoint(lambda h, v: (tanh(h @ v.T), None)), x, 0.5 * w.swapaxes(0, 1))[0],
        (3, 2, 3),
        (3,),
    ),
    "repeated for each round": (
        lambda w, x: in_rounds(lambda h, v: tanh(h @ v))(jnp.broadcast_to(row(w), (3, 3, 3)), x),
        (3, 3),
        (3,),
    ),
    "repeated and summed": (
        lambda w, x: in_rounds(lambda h, v: tanh(h * row(jnp.sum(v, 0))))(jnp.repeat(w[:, None], 4, 1), x),
        (2, 3),
        (3,),
    ),
    "overlapping parts in a loop of no rounds": (
        in_rounds(lambda h, v: tanh(h @ v[:3] + h @ v[1:])),
        (0, 4, 3),
        (3,),
    ),
    "returned by the loop": (lambda w, x: x @ lax.scan(lambda h, v: (h, 2 * v), 0, w)[1], (3, 2), (3,)),
    "passed from round to round": (
        lambda w, x: lax.scan(lambda c, _: ((tanh(c[0] @ c[1]), 2 * c[1]), None), (x, w), None, length=2)[0][0],
        (3, 3),
        (3,),
    ),
    "not linear in the loop": (
        in_rounds(lambda h, v: tanh(h @ jnp.sin(v) + h @ v)),
        (2, 3, 3),
        (3,),
    ),
    "reversed, with outputs": (
        lambda w, x: lax.scan(lambda h, v: (tanh(h @ v), h @ v), x, w, reverse=True)[1].swapaxes(0, 1),
        (2, 3, 3),
        (3,),
    ),
}
NETWORKS = {
    "embedding": (embedding, (4, 3), (2,)),
    "embedding, clipped": (partial(embedding, mode="clip"), (3, 3), (2,)),
    "embedding, of what is there": (partial(embedding, mode="fill", fill_value=0), (3, 3), (2,)),
    "embedding of columns": (lambda w, x: tanh(jnp.take(w, tokens(x), axis=1)).swapaxes(0, 1), (3, 4), (2,)),
    "scaled embedding": (lambda w, x: embedding(w * 0.5, x), (4, 3), (2,)),
    "position embedding": (lambda w, x: tanh(embedding(w[0], x) + row(w[1])), [(4, 3), (2, 3)], (2,)),
    "embedding in a table of equal rows": (
        lambda w, x: jnp.sum(jnp.take(jnp.broadcast_to(row(w), (5, 3)), tokens(x), axis=0), 1),
        (3,),
        (2,),
    ),
    "one number of a table": (lambda w, x: tanh(x * w[tokens(x[:, 0])][:, None]), (4,), (2,)),
    "by two indices": (lambda w, x: tanh(x * w[tokens(x), tokens(2 * x)]), (4, 4), (2,)),
    "attention": (attention, [(3, 2, 2), (3, 2, 2), (3, 2, 2), (2, 2, 3)], (2, 3)),
    "fused attention": (fused_attention, (3, 6), (2, 3)),
    "layer norm": (layer_norm, [(3,), (3,)], (3,)),
    "batch statistics of a sample": (lambda w, x: tanh((x - jnp.mean(x, 1, keepdims=True)) @ w), (3, 2), (4, 3)),
    "gated": (lambda w, x: jax.nn.sigmoid(x @ w[0]) * (x @ w[1]), [(3, 2), (3, 2)], (3,)),
    "residual": (lambda w, x: x + tanh(x @ w[0]) @ w[1], [(3, 4), (4, 3)], (3,)),
    "dropout": (lambda w, x: (x * jax.random.bernoulli(jax.random.key(0), 0.5, (1, 3))) @ w, (3, 2), (3,)),
    "clipped": (fixed_clip, (3, 2), (3,)),
    "the parameter itself": (lambda w, x: jnp.broadcast_to(row(w), (len(x), 3)), (3,), (2,)),
    "the parameter and a constant": (lambda w, x: {"a": x @ w, "b": x}, (3, 2), (3,)),
    "frozen": (lambda w, x: tanh(x @ w["used"]), {"used": (3, 2), "not": (4,)}, (3,)),
    "no parameter is used": (lambda w, x: tanh(x), (3, 2), (3,)),
    "dict of parameters": (lambda w, x: tanh(x @ w["a"][0] + row(w["b"])), {"a": [(3, 2)], "b": (2,)}, (3,)),
    "many axes": (lambda w, x: tanh(jnp.einsum("nabc,ad->nbcd", x, w)), (2, 2), (2, 1, 2)),
    "no entries": (lambda w, x: x @ w + 1, (0, 2), (0,)),
    "one sample, one number": (lambda w, x: tanh(x * w), (1, 1), (1,)),
}
# What becomes of cotangents on their way from the output: means over positions and weights of readouts stay factors.
READOUTS = {
    "mean of relu": (lambda w, x: jnp.mean(jax.nn.relu(x @ w[0]), 1) @ w[1], [(3, 4), (4, 5)], (6, 3)),
    "mean of a convolution": (
        lambda w, x: jnp.mean(jax.nn.relu(conv(("NHWC", "HWIO", "NHWC"))(w[0], x)), (1, 2)) @ w[1],
        [(3, 3, 2, 3), (3, 5)],
        (6, 6, 2),
    ),
    "two layers after a mean": (
        lambda w, x: jax.nn.relu(jnp.mean(jax.nn.relu(x @ w[0]), 1) @ w[1]) @ w[2],
        [(3, 4), (4, 4), (4, 5)],
        (6, 3),
    ),
    "bias before a mean": (
        lambda w, x: jnp.mean(jax.nn.relu(x + row(row(w[0]))), 1) @ w[1],
        [(3,), (3, 5)],
        (6, 3),
    ),
    "bias that positions share": (lambda w, x: jnp.sum(x @ w[0] + row(row(w[1])), 1), [(3, 5), (5,)], (4, 3)),
    "mean of gelu": (lambda w, x: jnp.mean(jax.nn.gelu(x @ w[0]), 1) @ w[1], [(3, 4), (4, 5)], (6, 3)),
    "largest": (lambda w, x: jnp.max(jax.nn.relu(x @ w[0]), 1) @ w[1], [(3, 4), (4, 5)], (6, 3)),
    "scaled, then chosen": (
        lambda w, x: jnp.sqrt(jnp.where(x @ w[0] > 0, x @ w[0], 0.0) * 2 + 1.0) @ w[1],
        [(3, 4), (4, 5)],
        (3,),
    ),
    "infinite where it is not chosen": (
        lambda w, x: jnp.mean(jnp.where(x @ w[0] > 0, jnp.sqrt(jnp.where(x @ w[0] > 0, x @ w[0], 0.0)), 0.0), 1) @ w[1],
        [(3, 4), (4, 5)],
        (6, 3),
    ),
    "attention pooling": (
        lambda w, x: jnp.einsum("nt,ntd,do->no", jax.nn.softmax(tanh(x @ w[0]) @ w[1]), x, w[2]),
        [(3, 4), (4,), (3, 5)],
        (6, 3),
    ),
    "many layers of positions": (
        lambda w, x: jnp.mean(functools.reduce(lambda x, w: jax.nn.relu(x @ w), w[:-1], x), 1) @ w[-1],
        [(3, 3)] * 6 + [(3, 20)],
        (6, 3),
    ),
    "repeated outputs": (lambda w, x: jnp.repeat(tanh(x @ w)[:, None], 3, 1), (3, 2), (3,)),
    "broadcast outputs": (lambda w, x: jnp.broadcast_to((x @ w)[:, None], (len(x), 3, 2)), (3, 2), (3,)),
    "sum of all": (lambda w, x: jnp.sum(jax.nn.relu(x @ w), (1, 2)), (3, 2), (4, 3)),
    "outputs of two sizes": (
        lambda w, x: {"mean": jnp.mean(jax.nn.relu(x @ w[0]), 1) @ w[1], "sum": jnp.sum(x @ w[0], 1)},
        [(3, 4), (4, 5)],
        (6, 3),
    ),
}
TABLE = {
    "products": PRODUCTS,
    "elementwise": ELEMENTWISE,
    "arrangements": ARRANGEMENTS,
    "reductions": REDUCTIONS,
    "convolutions": CONVOLUTIONS,
    "tied": TIED,
    "calls": CALLS,
    "loops": LOOPS,
    "networks": NETWORKS,
    "readouts": READOUTS,
}
