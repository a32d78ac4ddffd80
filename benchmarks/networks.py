"""The benchmarked networks, each a function of a `stax` module: any library with that API builds the same one."""

import jax


def cnn(stax, readout, depth=21, nonlinearity="Relu"):
    """Convolutions with ReLU, then a readout: with 21, the two CNNs of the README of neural-tangents 0.6."""
    layer = stax.Conv(1, (3, 3), padding="SAME"), getattr(stax, nonlinearity)()
    body = [part for _ in range(depth) for part in layer]
    return stax.serial(*body, getattr(stax, readout)())


def wide_resnet(stax, block_size=4, k=1, n_classes=10):
    """The wide residual network (arXiv:1605.07146) of the README of neural-tangents 0.6."""

    def block(channels, strides, channel_mismatch):
        main = stax.serial(
            stax.Relu(),
            stax.Conv(channels, (3, 3), strides, padding="SAME"),
            stax.Relu(),
            stax.Conv(channels, (3, 3), padding="SAME"),
        )
        shortcut = stax.Conv(channels, (3, 3), strides, padding="SAME") if channel_mismatch else stax.Identity()
        return stax.serial(stax.FanOut(2), stax.parallel(main, shortcut), stax.FanInSum())

    def group(channels, strides):
        return stax.serial(block(channels, strides, True), *[block(channels, (1, 1), False)] * (block_size - 1))

    return stax.serial(
        stax.Conv(16, (3, 3), padding="SAME"),
        group(16 * k, (1, 1)),
        group(32 * k, (2, 2)),
        group(64 * k, (2, 2)),
        stax.AvgPool((8, 8)),
        stax.Flatten(),
        stax.Dense(n_classes),
    )


def myrtle10(stax):
    """Myrtle-10 (arXiv:2003.02237): eight convolutions, five 2 x 2 average pools."""

    def convolutions(n):
        conv = stax.Conv(64, (3, 3), padding="SAME", W_std=2**0.5, b_std=0.0)
        return [layer for _ in range(n) for layer in (conv, stax.Relu())]

    pool = stax.AvgPool((2, 2), strides=(2, 2))
    return stax.serial(
        *convolutions(2), pool, *convolutions(3), pool, *convolutions(3), pool, pool, pool,
        stax.Flatten(), stax.Dense(10, 2**0.5, 0.0),
    )  # fmt: skip


def myrtle5(stax):
    """Myrtle-5 (arXiv:2003.02237): four convolutions, three 2 x 2 average pools, and a global one."""
    conv = stax.Conv(64, (3, 3), padding="SAME", W_std=2**0.5, b_std=0.0)
    block, pool = (conv, stax.Relu()), stax.AvgPool((2, 2), strides=(2, 2))
    return stax.serial(*block, *block, pool, *block, pool, *block, pool, stax.GlobalAvgPool(), stax.Dense(10, 2**0.5))


def conv_pool(stax):
    """Two convolutions, and a pool between them."""
    conv = stax.Conv(64, (3, 3), padding="SAME", W_std=2**0.5, b_std=0.1)
    pool = stax.AvgPool((2, 2), strides=(2, 2))
    return stax.serial(conv, stax.Relu(), pool, conv, stax.Relu(), stax.Flatten(), stax.Dense(10))


def conv3_pools(stax, nonlinearity):
    """Three convolutions, a nonlinearity after each, and pools between them and behind."""
    conv, pool = stax.Conv(1, (3, 3), padding="SAME"), stax.AvgPool((2, 2), strides=(2, 2))
    body = [conv, nonlinearity, pool, conv, nonlinearity, pool, conv, nonlinearity]
    return stax.serial(*body, stax.GlobalAvgPool(), stax.Dense(1))


def silu(stax):
    """SiLU, where a library has none by its values at nodes."""
    if hasattr(stax, "Silu"):
        return stax.Silu()
    return stax.ElementwiseNumerical(jax.nn.silu, 25)


def fcn5(stax):
    """Five hidden layers with ReLU."""
    return stax.serial(*[layer for _ in range(5) for layer in (stax.Dense(512), stax.Relu())], stax.Dense(1))


def fcn3_gelu(stax):
    """Three hidden layers with GELU."""
    return stax.serial(*[layer for _ in range(3) for layer in (stax.Dense(512), stax.Gelu())], stax.Dense(1))


def text_cnn(stax):
    """Convolutions over sentences of words, and an average over the words: for reviews of films (IMDb)."""
    convolutions = [stax.Conv(300, (9,), padding="SAME"), stax.Relu()] * 2
    return stax.serial(*convolutions, stax.GlobalAvgPool(), stax.Dense(1))


NETWORKS = {
    "cnn21-pool": lambda stax: cnn(stax, "GlobalAvgPool"),
    "cnn21-flatten": lambda stax: cnn(stax, "Flatten"),
    "wide-resnet": wide_resnet,
    "myrtle10": myrtle10,
    "myrtle5": myrtle5,
    "conv-pool": conv_pool,
    "conv3-erf": lambda stax: conv3_pools(stax, stax.Erf()),
    "conv3-gelu": lambda stax: conv3_pools(stax, stax.Gelu()),
    "conv3-silu": lambda stax: conv3_pools(stax, silu(stax)),
    "fcn5": fcn5,
    "fcn3-gelu": fcn3_gelu,
    "imdb": text_cnn,
}
