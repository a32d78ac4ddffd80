"""Wide finite networks agree with the kernels, for every layer, within the standard error of the mean.

Each case is a `body`, whose outputs are features, and a `head` that makes one output of them. Over many draws of the
parameters (and of dropout), two statistics are averaged:

* NNGP: the product of the features of two samples at two positions, averaged over the channels;
* NTK: the product of the gradients of the outputs for two samples with respect to all parameters.

With one layer of random hidden units both have the kernels as their expectation at *any* width, since the hidden units
are independent: there is no finite-width bias to allow for, and the difference is judged in standard errors. Several
layers, or divisions by averages over channels, give the expectation `K + a / width + O(1 / width^2)`. There
`2 K(2 width) - K(width)` is judged, in which the term `a / width` cancels. (Not so where an average over channels goes
through a kink: attention with 'ABS' or 'RELU' approaches its limit like `1 / sqrt(width)` where that limit is near 0.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from neural_tangents import stax
from nt_core.layouts import make_2d

VECTORS = random.normal(random.key(1), (3, 4))
VECTORS = VECTORS.at[1].set(0.9 * VECTORS[0] + 0.1 * VECTORS[1])  # two samples are similar
IMAGES = random.normal(random.key(2), (3, 3, 2, 2))
GRAPHS = random.uniform(random.key(3), (3, 3, 3))
MASKED = IMAGES.at[0, 2].set(jnp.nan).at[1, :, 1].set(jnp.nan)

TOKENS = np.array([[0, 3, 1], [3, 3, 2], [1, 0, 1]])[..., None]

MAX_Z = 5.0
CHUNK = 250  # samples at a time


def head(width=None):
    return stax.serial(stax.Flatten(), stax.Dense(1, 1.1, 0.3))


class Case(NamedTuple):
    """`body(width)` and `head(width)` are the layers, `x` the inputs; `kernel_kwargs` are in the place of `kwargs`."""

    body: Callable[[int], Any]
    x: jax.Array = VECTORS
    head: Callable[[int], Any] = head
    kwargs: Any = {}  # noqa: RUF012
    kernel_kwargs: Any = None


def dense(width, W_std=1.2, b_std=0.4, **kwargs):
    return stax.Dense(width, W_std, b_std, **kwargs)


def conv(width, padding="SAME", strides=None, W_std=1.2, b_std=0.4):
    return stax.Conv(width, (2, 2), strides, padding, W_std, b_std)


def attention(width, **kwargs):
    return stax.GlobalSelfAttention(
        width, width, width, 2, W_key_std=0.8, W_value_std=1.1, W_query_std=0.9, b_std=0.3, **kwargs
    )


NONLINEARITIES = {
    "ABRelu": stax.ABRelu(-0.3, 1.2),
    "Relu": stax.Relu(),
    "LeakyRelu": stax.LeakyRelu(0.2),
    "Abs": stax.Abs(),
    "Erf": stax.Erf(0.9, 1.1, 0.3),
    "Sin": stax.Sin(0.9, 1.1, 0.3),
    "Cos": stax.Cos(0.9, 1.1, 0.3),
    "Rbf": stax.Rbf(0.5),
    "Gelu": stax.Gelu(),
    "Exp": stax.Exp(0.8, 0.5),
    "Sigmoid_like": stax.Sigmoid_like(),
    "Gaussian": stax.Gaussian(0.9, -0.4),
    "Gabor": stax.Gabor(),
    "Sign": stax.Sign(),
    "Monomial": stax.Monomial(2),
    "RectifiedMonomial": stax.RectifiedMonomial(2),
    "Polynomial": stax.Polynomial([0.3, 1.0, 0.2]),
    "Elementwise": stax.Elementwise(
        fn=lambda x: x**2,
        nngp_fn=lambda cov12, var1, var2: var1 * var2 + 2 * cov12**2,
        d_nngp_fn=lambda cov12, var1, var2: 4 * cov12,
    ),
    "Tanh": stax.Tanh(),
    "Sigmoid": stax.Sigmoid(),
    "LogSigmoid": stax.LogSigmoid(),
    "Silu": stax.Silu(),
    "Softplus": stax.Softplus(),
    "Mish": stax.Mish(),
    "Squareplus": stax.Squareplus(),
    "QuickGelu": stax.QuickGelu(),
    "HardTanh": stax.HardTanh(),
    "HardSigmoid": stax.HardSigmoid(),
    "Relu6": stax.Relu6(),
    "Elu": stax.Elu(0.8),
    "Selu": stax.Selu(),
    "Celu": stax.Celu(0.6),
    "HardSilu": stax.HardSilu(),
    "ElementwiseNumerical": stax.ElementwiseNumerical(jnp.tanh, 25, lambda x: 1 - jnp.tanh(x) ** 2),
}

# The expectation is exact at any width.
UNBIASED = {
    "Dense": Case(dense),
    "Dense, standard": Case(
        lambda width: stax.serial(stax.Dense(1, 1.2, 0.4, parameterization="standard", s=(1, width)), stax.Relu()),
        head=lambda width: stax.Dense(1, 1.1, 0.3, parameterization="standard", s=(width, 1)),
    ),
    **{name: Case(lambda width, f=f: stax.serial(dense(width), f)) for name, f in NONLINEARITIES.items()},
    "Conv, SAME": Case(lambda width: stax.serial(conv(width), stax.Relu()), IMAGES),
    "Conv, VALID, strides": Case(lambda width: stax.serial(conv(width, "VALID", (2, 1)), stax.Erf()), IMAGES),
    "Conv, CIRCULAR": Case(lambda width: stax.serial(conv(width, "CIRCULAR"), stax.Relu()), IMAGES),
    "ConvTranspose, masks": Case(
        lambda width: stax.serial(stax.ConvTranspose(width, (2, 2), (2, 1), "SAME", 1.2, 0.4), stax.Cos()),
        MASKED,
        kwargs={"mask_constant": jnp.nan},
    ),
    "ConvTranspose, CIRCULAR": Case(
        lambda width: stax.serial(stax.ConvTranspose(width, (3, 1), (2, 1), "CIRCULAR", 1.2, 0.4), stax.Relu()), IMAGES
    ),
    "ConvLocal": Case(
        lambda width: stax.serial(stax.ConvLocal(width, (2, 2), (1, 2), "SAME", 1.2, 0.4), stax.Relu()), IMAGES
    ),
    "AvgPool": Case(
        lambda width: stax.serial(conv(width), stax.Relu(), stax.AvgPool((2, 1), padding="SAME", normalize_edges=True)),
        IMAGES,
    ),
    "SumPool": Case(
        lambda width: stax.serial(conv(width), stax.Relu(), stax.SumPool((2, 2), (2, 1), "CIRCULAR")), IMAGES
    ),
    "GlobalAvgPool": Case(lambda width: stax.serial(conv(width), stax.Relu(), stax.GlobalAvgPool()), IMAGES),
    "GlobalSumPool": Case(lambda width: stax.serial(conv(width), stax.Erf(), stax.GlobalSumPool()), IMAGES),
    "Flatten, Identity": Case(
        lambda width: stax.serial(stax.Flatten(), stax.Identity(), dense(width), stax.Relu()), IMAGES
    ),
    "Dropout, train": Case(lambda width: stax.serial(dense(width), stax.Relu(), stax.Dropout(0.7, "train"))),
    "Dropout, test": Case(lambda width: stax.serial(dense(width), stax.Relu(), stax.Dropout(0.7, "test"))),
    "FanInSum": Case(
        lambda width: stax.serial(
            stax.FanOut(2), stax.parallel(dense(width), dense(width, 0.8, None)), stax.FanInSum(), stax.Relu()
        )
    ),
    "FanInSum, weights; Scale": Case(
        lambda width: stax.serial(
            stax.FanOut(2),
            stax.parallel(dense(width), stax.serial(dense(width), stax.Scale(-0.7))),
            stax.FanInSum(weights=(0.5, 1.3)),
            stax.Relu(),
        )
    ),
    "FanInProd": Case(
        lambda width: stax.serial(
            stax.FanOut(2),
            stax.parallel(dense(width), stax.serial(dense(width), stax.Relu())),
            stax.FanInProd(),
        )
    ),
    "Embedding": Case(lambda width: stax.serial(stax.Embedding(4, width, 1.2), stax.Relu()), TOKENS),
    "GLU": Case(lambda width: stax.serial(dense(2 * width), stax.GLU(stax.Erf()))),
    "FanInConcat, channels": Case(
        lambda width: stax.serial(
            stax.FanOut(2),
            stax.parallel(stax.serial(dense(width), stax.Relu()), stax.serial(dense(2 * width), stax.Erf())),
            stax.FanInConcat(-1),
        )
    ),
    "FanInConcat, positions": Case(
        lambda width: stax.serial(
            stax.FanOut(2), stax.parallel(conv(width), dense(width)), stax.FanInConcat(1), stax.Relu()
        ),
        IMAGES,
    ),
    "Index": Case(lambda width: stax.serial(conv(width), stax.Relu(), stax.Index(stax.Slice[:, 1:, ::-1])), IMAGES),
    "Aggregate": Case(
        lambda width: stax.serial(dense(width), stax.Relu(), stax.Aggregate(1)),
        IMAGES,
        kwargs={"pattern": GRAPHS},
        kernel_kwargs={"pattern": (GRAPHS, GRAPHS)},
    ),
    "DotGeneral": Case(
        lambda width: stax.serial(
            conv(width), stax.Relu(), stax.DotGeneral(lhs=GRAPHS, dimension_numbers=(((2,), (1,)), ((0,), (0,))))
        ),
        IMAGES,
    ),
    "ImageResize": Case(
        lambda width: stax.serial(conv(width), stax.Relu(), stax.ImageResize((-1, 2, 4, -1), "linear")), IMAGES
    ),
    "masks": Case(
        lambda width: stax.serial(conv(width), stax.Cos(), stax.GlobalAvgPool()),
        MASKED,
        kwargs={"mask_constant": jnp.nan},
    ),
    "GlobalSelfAttention, random gates": Case(
        lambda width: attention(width // 2, linear_scaling=False, attention_mechanism="IDENTITY"), IMAGES
    ),
}

# The bias of 1 / width is extrapolated away.
BIASED = {
    "deep": Case(lambda width: stax.serial(dense(width), stax.Relu(), dense(width), stax.Erf())),
    "repeat": Case(lambda width: stax.serial(dense(width), stax.repeat(stax.serial(stax.Relu(), dense(width)), 2))),
    "residual": Case(
        lambda width: stax.serial(
            conv(width),
            stax.FanOut(2),
            stax.parallel(stax.Identity(), stax.serial(stax.Relu(), conv(width))),
            stax.FanInSum(),
            stax.Relu(),
            stax.GlobalAvgPool(),
        ),
        IMAGES,
    ),
    "LayerNorm": Case(lambda width: stax.serial(dense(width), stax.LayerNorm(), stax.Relu())),
    "RMSNorm": Case(lambda width: stax.serial(dense(width), stax.Relu(), stax.RMSNorm())),
    "LayerNorm, positions": Case(
        lambda width: stax.serial(conv(width), stax.LayerNorm((1, -1), eps=0.1), stax.Relu()), IMAGES
    ),
    "LayerNorm, masks": Case(
        lambda width: stax.serial(dense(width), stax.LayerNorm((1, 2, 3)), stax.Relu()),
        MASKED,
        kwargs={"mask_constant": jnp.nan},
    ),
    "GlobalSelfAttention, SOFTMAX": Case(
        lambda width: stax.serial(dense(width, 0.7), stax.Relu(), attention(width)), IMAGES
    ),
    "GlobalSelfAttention, embeddings": Case(
        lambda width: stax.serial(
            dense(width, 0.7),
            attention(
                width,
                pos_emb_type="SUM",
                pos_emb_decay_fn=lambda d: jnp.exp(-d),
                W_pos_emb_std=0.7,
                val_pos_emb=True,
            ),
        ),
        IMAGES,
    ),
    "GlobalSelfAttention, masks": Case(
        lambda width: stax.serial(dense(width, 0.7), attention(width, pos_emb_type="CONCAT", W_pos_emb_std=0.7)),
        MASKED,
        kwargs={"mask_constant": jnp.nan},
    ),
}


def samples(case, width, n_samples, seed):
    """Returns `n_samples` values of the statistics (NNGP, NTK)."""
    body = case.body(width)
    network = stax.serial(body, case.head(width))
    x, n = case.x, len(case.x)

    @jax.jit
    @jax.vmap
    def statistics(params, key):
        features = stax.unmask_fn(body[1])(params[0], x, rng=key, **case.kwargs)
        features = features.reshape(n, -1, features.shape[-1])
        nngp = jnp.einsum("ipc,jqc->ijpq", features, features) / features.shape[-1]

        def outputs(params):
            return stax.unmask_fn(network[1])(params, x, rng=key, **case.kwargs)[:, 0]

        gradients = [g.reshape(n, -1) for g in jax.tree.leaves(jax.jacrev(outputs)(params))]
        return nngp, sum(g @ g.T for g in gradients)

    # Random numbers would take longer to compile than all else. These ones do not; outside of jit, networks share them.
    init = jax.vmap(lambda key: network[0](key, x.shape)[1])
    keys = random.split(random.key(seed, impl="rbg"), (n_samples // CHUNK, 2, CHUNK))
    draws = [statistics(init(init_keys), rngs) for init_keys, rngs in keys]
    return [np.concatenate([np.asarray(k, float) for k in statistic]) for statistic in zip(*draws, strict=True)]


def kernels(case, width):
    """Returns the infinite-width values of the statistics."""
    body = case.body(width)
    network = stax.serial(body, case.head(width))
    kwargs = case.kwargs if case.kernel_kwargs is None else case.kernel_kwargs
    kernel = body[2](case.x, None, **kwargs)
    kernel = kernel.reverse() if kernel.is_reversed else kernel
    return make_2d(kernel.nngp, 2), network[2](case.x, None, "ntk", **kwargs)


def check(name, mean, error, expected):
    """Compares a mean of known standard error with its expectation."""
    expected = np.asarray(expected, float)
    assert mean.shape == expected.shape
    assert error.max() < 0.04 * np.abs(expected).max(), f"{name}: too few samples to tell"
    rounding = 1e-5 * np.abs(expected).max()
    z = (mean - expected) / np.hypot(error, rounding)
    assert np.abs(z).max() < MAX_Z, f"{name}: off by {np.abs(z).max():.1f} standard errors"


def judge(case, n_samples, widths):
    """Checks the mean over finite networks, extrapolated to infinite width if there are two widths."""
    weights = (1,) if len(widths) == 1 else (-1, 2)
    draws = [samples(case, width, n_samples, seed) for seed, width in enumerate(widths)]
    for i, (name, expected) in enumerate(zip(("NNGP", "NTK"), kernels(case, widths[-1]), strict=True)):
        mean = sum(w * d[i].mean(0) for w, d in zip(weights, draws, strict=True))
        variance = sum(w**2 * d[i].var(0) for w, d in zip(weights, draws, strict=True))
        check(name, mean, np.sqrt(variance / n_samples), expected)


pytestmark = pytest.mark.filterwarnings("ignore:GlobalSelfAttention with linear_scaling=True")


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", UNBIASED)
def test_one_random_layer(name):
    judge(UNBIASED[name], n_samples=4000, widths=(64,))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", BIASED)
def test_several_layers(name):
    judge(BIASED[name], n_samples=3000, widths=(32, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", UNBIASED)
def test_one_random_layer_in_many_samples(name):
    judge(UNBIASED[name], n_samples=50_000, widths=(64,))


@pytest.mark.slow
@pytest.mark.parametrize("name", BIASED)
def test_several_layers_in_many_samples(name):
    judge(BIASED[name], n_samples=20_000, widths=(64, 128))
