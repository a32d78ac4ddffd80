"""An MLP with batch normalisation, a residual CNN, and a transformer with scanned layers, in every framework.

`NETWORKS[framework, kind]()` returns `f, params, x, judge`: `judge(params, x)` is the framework's own evaluation.
Arrays are random numbers of NumPy, which need no compilation: vectors (biases, scales, batch statistics) are positive.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from nt_empirical import from_equinox, from_haiku, from_linen, from_nnx

WIDTH, CLASSES, TOKENS, LAYERS = 4, 2, 5, 2
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(3, 3)).astype("float32")
IMAGES = RNG.normal(size=(3, 4, 4, 2)).astype("float32")
TEXT = RNG.integers(0, TOKENS, (3, 3))


def drawn(tree, seed=0):
    """Returns random arrays in the place of the shapes of a tree, in double precision where that is the default."""
    rng = np.random.default_rng(seed)

    def draw(a):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return jnp.zeros(a.shape, a.dtype)
        is_vector = sum(size > 1 for size in a.shape) < 2
        numbers = rng.uniform(0.5, 1.5, a.shape) if is_vector else rng.normal(size=a.shape) / 2
        return jnp.asarray(numbers, float)

    return jax.tree.map(lambda a: draw(a) if isinstance(a, jax.ShapeDtypeStruct) else a, tree)


# flax.linen


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(WIDTH)(x)))
        return nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=not train)(x))


class LinenBlock(nn.Module):
    channels: int
    strides: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(self.channels, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(self.channels, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), self.strides, use_bias=False)(x)
        return nn.relu(x + y)


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = LinenBlock(WIDTH, 2)(LinenBlock(2, 1)(x, train), train)
        return nn.Dense(CLASSES)(jnp.mean(x, (1, 2)))


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(WIDTH)(nn.LayerNorm()(x)))), None


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Embed(TOKENS, WIDTH)(x)
        layers = nn.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = layers()(x, None)
        return nn.Dense(CLASSES)(jnp.mean(nn.LayerNorm()(x), 1))


def linen(module, x):
    variables = drawn(jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False)))
    f, params = from_linen(module, variables, train=False)
    return f, params, x, lambda params, x: module.apply({**variables, "params": params}, x, train=False)


# flax.nnx


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(3, WIDTH, rngs=rngs), nnx.Linear(WIDTH, CLASSES, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(WIDTH, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


class NnxBlock(nnx.Module):
    def __init__(self, inputs, channels, strides, rngs):
        self.conv1 = nnx.Conv(inputs, channels, (3, 3), strides, use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.shortcut = nnx.Conv(inputs, channels, (1, 1), strides, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = (nnx.BatchNorm(channels, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return nnx.relu(self.shortcut(x) + self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x))))))


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NnxBlock(2, 2, 1, rngs), NnxBlock(2, WIDTH, 2, rngs)])
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, (1, 2)))


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.linear1, self.linear2 = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.linear2(nnx.gelu(self.linear1(self.norm2(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return NnxLayer(rngs)

        self.embed, self.layers = nnx.Embed(TOKENS, WIDTH, rngs=rngs), layers(rngs)
        self.embed.dtype = None  # that of its parameters, as for other modules
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return layer(x)

        return self.head(jnp.mean(self.norm(through(self.embed(x), self.layers)), 1))


def nnx_(module, x):
    graph, state = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))))
    model = nnx.merge(graph, drawn(state))
    f, params = from_nnx(model)

    def judge(params, x):
        model = nnx.merge(graph, drawn(state))
        nnx.update(model, params)
        model.eval()
        return model(x)

    return f, params, x, judge


# equinox: one sample at a time, channels first


class EqxMLP(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key):
        self.first, self.last = eqx.nn.Linear(3, WIDTH, key=key), eqx.nn.Linear(WIDTH, CLASSES, key=key)
        self.norm, self.dropout = eqx.nn.BatchNorm(WIDTH, "batch", mode="batch"), eqx.nn.Dropout(0.5)

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.last(self.dropout(jax.nn.relu(x))), state


class EqxBlock(eqx.Module):
    convs: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.BatchNorm]
    shortcut: eqx.nn.Conv2d

    def __init__(self, inputs, channels, strides, key):
        self.convs = [
            eqx.nn.Conv2d(inputs, channels, 3, strides, padding=1, use_bias=False, key=key),
            eqx.nn.Conv2d(channels, channels, 3, padding=1, use_bias=False, key=key),
        ]
        self.norms = [eqx.nn.BatchNorm(channels, "batch", mode="batch") for _ in range(2)]
        self.shortcut = eqx.nn.Conv2d(inputs, channels, 1, strides, use_bias=False, key=key)

    def __call__(self, x, state):
        y, state = self.norms[0](self.convs[0](x), state)
        y, state = self.norms[1](self.convs[1](jax.nn.relu(y)), state)
        return jax.nn.relu(self.shortcut(x) + y), state


class EqxCNN(eqx.Module):
    blocks: list[EqxBlock]
    head: eqx.nn.Linear

    def __init__(self, key):
        self.blocks = [EqxBlock(2, 2, 1, key), EqxBlock(2, WIDTH, 2, key)]
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=key)

    def __call__(self, x, state):
        x = jnp.moveaxis(x, -1, 0)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(jnp.mean(x, (1, 2))), state


class EqxLayer(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.LayerNorm]
    linears: list[eqx.nn.Linear]

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=key)
        self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]
        self.linears = [eqx.nn.Linear(WIDTH, WIDTH, key=key) for _ in range(2)]

    def __call__(self, x):
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(lambda y: self.linears[1](jax.nn.gelu(self.linears[0](self.norms[1](y)))))(x)


class EqxTransformer(eqx.Module):
    embed: eqx.nn.Embedding
    layers: EqxLayer
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(TOKENS, WIDTH, key=key)
        self.layers = eqx.filter_vmap(EqxLayer)(jax.random.split(key, LAYERS))
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=key)

    def __call__(self, x):
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        x, _ = jax.lax.scan(lambda x, a: (eqx.combine(a, rest)(x), None), jax.vmap(self.embed)(x), arrays)
        return self.head(jnp.mean(x, 0))


def equinox(module, x, with_state=True):
    make = eqx.nn.make_with_state(module) if with_state else lambda key: (module(key), None)
    model, state = drawn(eqx.filter_eval_shape(make, jax.random.key(0)))
    f, params = from_equinox(model, state)

    def judge(params, x):
        network = eqx.nn.inference_mode(eqx.combine(params, model))
        arguments = (state,) if with_state else ()
        outputs = jax.vmap(lambda x: network(x, *arguments))(x)
        return outputs[0] if with_state else outputs

    return f, params, x, judge


# haiku


def haiku_norm(x, train):
    return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, train)


def haiku_mlp(x, train):
    x = jax.nn.relu(haiku_norm(hk.Linear(WIDTH)(x), train))
    return hk.Linear(CLASSES)(hk.dropout(hk.next_rng_key(), 0.5, x) if train else x)


def haiku_block(x, channels, strides, train):
    y = haiku_norm(hk.Conv2D(channels, 3, strides, with_bias=False)(x), train)
    y = haiku_norm(hk.Conv2D(channels, 3, with_bias=False)(jax.nn.relu(y)), train)
    return jax.nn.relu(hk.Conv2D(channels, 1, strides, with_bias=False)(x) + y)


def haiku_cnn(x, train):
    return hk.Linear(CLASSES)(jnp.mean(haiku_block(haiku_block(x, 2, 1, train), WIDTH, 2, train), (1, 2)))


def haiku_layer(x):
    def norm(x):
        return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)

    y = norm(x)
    x = x + hk.MultiHeadAttention(2, WIDTH // 2, w_init=hk.initializers.VarianceScaling())(y, y, y)
    return x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(WIDTH)(norm(x))))


def haiku_transformer(x, train):
    return hk.Linear(CLASSES)(jnp.mean(hk.layer_stack(LAYERS)(haiku_layer)(hk.Embed(TOKENS, WIDTH)(x)), 1))


def haiku(network, x, with_state=True):
    transformed = (hk.transform_with_state if with_state else hk.transform)(network)
    key = jax.random.key(0)
    variables = drawn(jax.eval_shape(lambda: transformed.init(key, x, train=True)))
    params, state = variables if with_state else (variables, None)
    f, params = from_haiku(transformed, params, state, train=False)

    def judge(params, x):
        if with_state:
            return transformed.apply(params, state, key, x, train=False)[0]
        return transformed.apply(params, key, x, train=False)

    return f, params, x, judge


NETWORKS = {
    ("linen", "mlp"): lambda: linen(LinenMLP(), VECTORS),
    ("linen", "cnn"): lambda: linen(LinenCNN(), IMAGES),
    ("linen", "transformer"): lambda: linen(LinenTransformer(), TEXT),
    ("nnx", "mlp"): lambda: nnx_(NnxMLP, VECTORS),
    ("nnx", "cnn"): lambda: nnx_(NnxCNN, IMAGES),
    ("nnx", "transformer"): lambda: nnx_(NnxTransformer, TEXT),
    ("equinox", "mlp"): lambda: equinox(EqxMLP, VECTORS),
    ("equinox", "cnn"): lambda: equinox(EqxCNN, IMAGES),
    ("equinox", "transformer"): lambda: equinox(EqxTransformer, TEXT, with_state=False),
    ("haiku", "mlp"): lambda: haiku(haiku_mlp, VECTORS),
    ("haiku", "cnn"): lambda: haiku(haiku_cnn, IMAGES),
    ("haiku", "transformer"): lambda: haiku(haiku_transformer, TEXT, with_state=False),
}
