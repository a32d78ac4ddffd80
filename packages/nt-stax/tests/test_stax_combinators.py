"""serial, parallel, repeat: parameters, random keys, trees of inputs, and kernels that are folds of those of layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from nt_core import explain
from nt_stax import (
    AvgPool,
    Conv,
    Dense,
    Diagonal,
    Dropout,
    FanInConcat,
    FanInSum,
    FanOut,
    Flatten,
    GlobalAvgPool,
    GlobalSelfAttention,
    Identity,
    LayerNorm,
    MaskedArray,
    Relu,
    layer,
    parallel,
    repeat,
    requires,
    serial,
    supports_masking,
    unmask_fn,
)
from stax_samples import normal

pytestmark = pytest.mark.unoptimised

FIELDS = ("nngp", "ntk", "cov1", "cov2")


def inputs(seed, shape, dtype="float64"):
    return normal(seed, shape, dtype)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_kernels_close(a, b, rtol=1e-12):
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-13, err_msg=name)
    assert a.spec == b.spec


# serial


def test_serial_splits_keys_as_jax_stax_does():
    layers = [Dense(4), Dense(5, b_std=1.0), Conv(3, ())]
    shape, params = serial(*layers)[0](random.key(0), (-1, 3))
    rng, expected, input_shape = random.key(0), [], (-1, 3)
    for init_fn, _, _ in layers:
        rng, layer_rng = random.split(rng)
        input_shape, layer_params = init_fn(layer_rng, input_shape)
        expected.append(layer_params)
    assert isinstance(params, list) and shape == (-1, 3)
    assert_trees_equal(params, expected)


def test_serial_threads_keywords_and_splits_the_key_of_dropout(x64):
    init_fn, apply_fn, _ = serial(Dense(4), Dropout(0.5), Dense(4), Dropout(0.5))
    x = inputs(1, (2, 3))
    _, params = init_fn(random.key(0), x.shape)
    outputs = apply_fn(params, x, rng=random.key(1), unknown=1, batch_axis=0, keys=None, pattern=None)
    keys = random.split(random.key(1), 4)
    y = Dense(4)[1](params[0], x)
    y = Dropout(0.5)[1]((), y, rng=keys[1])
    y = Dense(4)[1](params[2], y)
    np.testing.assert_allclose(outputs, Dropout(0.5)[1]((), y, rng=keys[3]), rtol=1e-12)


def test_serial_is_associative(x64):
    x1, x2 = inputs(1, (2, 4, 4, 3)), inputs(2, (3, 4, 4, 3))
    a, b = serial(Conv(4, (3, 3), padding="SAME"), Relu()), serial(AvgPool((2, 2)), Conv(4, (2, 2), b_std=0.1))
    c = serial(LayerNorm(), Relu(), GlobalAvgPool(), Dense(2))
    kernels = [network[2](x1, x2) for network in (serial(a, b, c), serial(serial(a, b), c), serial(a, serial(b, c)))]
    assert_kernels_close(kernels[0], kernels[1])
    assert_kernels_close(kernels[0], kernels[2])
    # and one layer after another, on kernels
    one_by_one = c[2](b[2](a[2](x1, x2)))
    assert_kernels_close(kernels[0], one_by_one)


def test_empty_serial_is_the_identity(x64):
    init_fn, apply_fn, kernel_fn = serial()
    x = inputs(1, (2, 3))
    assert init_fn(random.key(0), (-1, 3)) == ((-1, 3), [])
    assert apply_fn([], x, rng=random.key(0)) is x
    np.testing.assert_allclose(kernel_fn(x, None, "nngp"), x @ x.T / 3, rtol=1e-14)


def test_names():
    """Layers say what they are; aliases show the underlying layer."""
    assert [f.__name__ for f in Relu()] == ["ABRelu"] * 3
    assert [f.__name__ for f in GlobalAvgPool()] == ["GlobalAvgPool"] * 3
    for combined, name in ((serial(), "serial"), (parallel(Identity()), "parallel"), (repeat(Identity(), 2), "repeat")):
        assert [f.__name__ for f in combined] == [name] * 3


# parallel


@pytest.mark.parametrize("container", [list, tuple])
def test_parallel_keeps_containers(container, x64):
    x = container([inputs(1, (2, 3)), inputs(2, (2, 3))])
    init_fn, apply_fn, kernel_fn = parallel(Dense(4), serial(Dense(5), FanOut(2)))
    shapes, params = init_fn(random.key(0), container([(-1, 3), (-1, 3)]))
    assert shapes == container([(-1, 4), [(-1, 5), (-1, 5)]])
    keys = random.split(random.key(0), 2)
    assert_trees_equal(params[0], Dense(4)[0](keys[0], (-1, 3))[1])
    outputs = apply_fn(params, x)
    assert type(outputs) is container and outputs[0].shape == (2, 4) and isinstance(outputs[1], list)
    kernels = kernel_fn(x, None, ("nngp", "ntk"))
    assert type(kernels) is container
    np.testing.assert_allclose(kernels[1][0].nngp, x[1] @ x[1].T / 3, rtol=1e-12)
    assert type(kernel_fn(x)) is container


def test_parallel_of_two_inputs(x64):
    """Branches with inputs of their own, of different sizes."""
    x1, x2 = (inputs(1, (2, 3)), inputs(2, (2, 4, 4, 1))), (inputs(3, (5, 3)), inputs(4, (5, 4, 4, 1)))
    dense, conv = serial(Dense(8, 1.5), Relu(), Dense(4)), serial(Conv(8, (3, 3)), Relu(), Flatten(), Dense(4))
    network = serial(parallel(dense, conv), FanInSum())
    kernel = network[2](x1, x2)
    parts = [dense[2](x1[0], x2[0]), conv[2](x1[1], x2[1])]
    np.testing.assert_allclose(kernel.ntk, parts[0].ntk + parts[1].ntk, rtol=1e-12)
    _, params = network[0](random.key(0), (x1[0].shape, x1[1].shape))
    assert network[1](params, x1).shape == (2, 4)


def test_parallel_splits_the_key_of_dropout(x64):
    apply_fn = parallel(Dropout(0.5), Dropout(0.5))[1]
    x = jnp.ones((4, 5))
    outputs = apply_fn([(), ()], [x, x], rng=random.key(1))
    keys = random.split(random.key(1), 2)
    for y, key in zip(outputs, keys, strict=True):
        np.testing.assert_array_equal(y, Dropout(0.5)[1]((), x, rng=key))


def test_branches_that_are_no_steps(x64):
    """Attention ends a program, and what is beside it is computed apart; the result is that of kernels one by one."""
    x = inputs(1, (2, 3, 2))
    attention = GlobalSelfAttention(8, 4, 4, 2, linear_scaling=False, attention_mechanism="IDENTITY")
    branch = serial(Dense(8), Relu(), attention)
    network = serial(Dense(8), FanOut(2), parallel(branch, Identity()), FanInSum(), Relu(), GlobalAvgPool(), Dense(1))
    kernel = network[2](x)
    before = Dense(8)[2](x)
    after = FanInSum()[2]([branch[2](before), before])
    assert_kernels_close(kernel, serial(Relu(), GlobalAvgPool(), Dense(1))[2](after))


# repeat


REPEATED = [
    Dense(3, 1.5, 0.5),
    serial(Dense(3, 1.5), Relu()),
    serial(Conv(3, (3,), padding="SAME", W_std=1.5, b_std=0.1), Relu()),
    Conv(3, (2,), padding="CIRCULAR"),
    serial(Dense(3), FanOut(2), parallel(serial(Relu(), Dense(3)), Identity()), FanInSum()),
    serial(Dense(3), Dropout(0.5)),
    Identity(),
]


@pytest.mark.sample(8)
@pytest.mark.parametrize("repeated", REPEATED)
@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_repeat_is_serial(repeated, n, x64):
    x = inputs(1, (2, 4, 3))
    loop, unrolled = repeat(repeated, n), serial(*[repeated] * n)
    shape, params = loop[0](random.key(0), x.shape)
    shape_unrolled, params_unrolled = unrolled[0](random.key(0), x.shape)
    assert shape == shape_unrolled
    for i in range(n):
        assert_trees_equal(jax.tree.map(lambda leaf, i=i: leaf[i], params), params_unrolled[i])
    keywords = {"rng": random.key(2), "unknown": 1}
    outputs = loop[1](params, x, **keywords)
    np.testing.assert_allclose(outputs, unrolled[1](params_unrolled, x, **keywords), rtol=1e-10)
    assert_kernels_close(serial(Dense(3), loop)[2](x), serial(Dense(3), unrolled)[2](x))


def test_repeat_with_masks_and_without_a_key():
    x = np.ones((2, 4, 3), "float32")
    x[0, 1] = np.nan
    init_fn, apply_fn, _ = repeat(serial(Dense(3, b_std=1.0), Relu()), 3)
    _, params = init_fn(random.key(0), x.shape)
    outputs = apply_fn(params, x, mask_constant=np.nan)
    assert isinstance(outputs, MaskedArray)
    assert outputs.mask[..., 0].tolist() == [[False, True, False, False], [False] * 4]
    unmasked = unmask_fn(apply_fn)(params, x, mask_constant=np.nan)
    np.testing.assert_allclose(unmasked[1], apply_fn(params, x)[1], rtol=1e-6)


# Requirements


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (serial(Conv(1, (1,)), Relu()), (2, 0)),
        (serial(Conv(1, (1,)), Relu(), Flatten()), (2, 2)),
        (serial(Conv(1, (1,)), Relu(), GlobalAvgPool()), (0, 2)),
        (serial(Conv(1, (1,)), GlobalSelfAttention(1, 1, 1, 1, linear_scaling=False)), (0, 0)),
        (serial(FanOut(2), parallel(Conv(1, (1,)), serial(Conv(1, (1,)), Relu())), FanInSum(), Flatten()), (2, 2)),
        (serial(FanOut(2), parallel(Conv(1, (1,)), AvgPool((1,))), FanInSum(), Flatten()), (1, 2)),
    ],
)
def test_requirements_fold(network, expected):
    assert network[2].input_req["diagonal_spatial"] == Diagonal(*expected)


def test_branches_without_demands_do_not_decide(x64):
    """Identity demands nothing: whether entries off the diagonal are kept is for the other branch and the readout."""
    block = serial(FanOut(2), parallel(serial(Relu(), Conv(4, (3,), padding="SAME")), Identity()), FanInSum())
    x = inputs(1, (2, 5, 3))
    assert serial(Conv(4, (3,)), block)[2](x).diagonal_spatial is False
    assert "diagonal" not in explain(serial(Conv(4, (3,)), block, Flatten())[2], (2, 5, 3))
    nngp = serial(Conv(4, (3,)), block, Flatten(), Dense(1))[2]
    np.testing.assert_allclose(nngp(x, None, "nngp"), nngp(x, None, "nngp", diagonal_spatial=False), rtol=1e-12)


def test_flatten_beside_a_layer_with_another_channel_axis(x64):
    """Flatten takes any axes: the batch and channel axes are those of the branch that names them."""
    x = inputs(1, (2, 3, 4))
    conv = Conv(4, (2,), dimension_numbers=("NCH", "OIH", "NCH"))
    branches = [serial(Flatten(), Dense(5)), serial(conv, Flatten(), Dense(5))]
    for order in (branches, branches[::-1]):
        ntk = serial(FanOut(2), parallel(*order), FanInSum())[2](x, None, "ntk")
        expected = serial(Flatten(), Dense(5))[2](x, None, "ntk") + branches[1][2](x, None, "ntk")
        np.testing.assert_allclose(ntk, expected, rtol=1e-12)


def test_layers_of_users(x64):
    """A layer of one's own is a function of kernels, and may have masks and requirements; also as a method."""

    class Factory:
        @layer
        @supports_masking(remask_kernel=True)
        def Scale(self, factor):
            def init_fn(rng, input_shape):
                return input_shape, ()

            def apply_fn(params, inputs, *, mask=None, **kwargs):
                return factor * inputs

            @requires(batch_axis=0, channel_axis=-1)
            def kernel_fn(k, **kwargs):
                return k * factor

            return init_fn, apply_fn, kernel_fn

    x = inputs(1, (2, 4, 3))
    network = serial(Dense(4), Relu(), Factory().Scale(3.0), GlobalAvgPool())
    plain = serial(Dense(4), Relu(), GlobalAvgPool())
    for kwargs in ({}, {"mask_constant": 0.5}):
        a = network[2](x, None, "ntk", **kwargs)
        np.testing.assert_allclose(a, 9 * plain[2](x, None, "ntk", **kwargs), rtol=1e-12)
    with pytest.raises(ValueError, match="ill-defined"):
        serial(Dense(4, channel_axis=1), Factory().Scale(3.0))[2](x)


@pytest.mark.parametrize("wraps", [False, True])
def test_functions_around_layers(wraps, x64):
    """A triple need not come from a layer: its `kernel_fn` is a function of kernels, even with a layer's attributes."""
    init_fn, apply_fn, kernel_fn = serial(Dense(4, b_std=0.3), Relu())

    @functools.wraps(kernel_fn)
    def wrapped(kernel, **kwargs):
        return kernel_fn(kernel, **kwargs) * 2.0

    def doubled(kernel):  # keywords that it does not name are not for it
        return kernel_fn(kernel) * 2.0

    doubled = wrapped if wraps else doubled
    triple = (init_fn, lambda params, x: 2.0 * apply_fn(params, x), doubled)
    x1, x2 = inputs(1, (2, 3)), inputs(2, (3, 3))

    def scale(kernel):
        return kernel * 2.0

    known = serial(Dense(4, b_std=0.3), Relu(), layer(lambda: (init_identity, lambda p, x: 2.0 * x, scale))())
    for combine in (
        serial,
        lambda one: repeat(one, 2),
        lambda one: serial(FanOut(2), parallel(one, one), FanInConcat()),
    ):
        network, expected = serial(Dense(4), combine(triple), Dense(1)), serial(Dense(4), combine(known), Dense(1))
        assert_kernels_close(network[2](x1, x2), expected[2](x1, x2))
        params = network[0](random.key(0), (-1, 3))[1]
        assert network[1](params, x1, rng=random.key(1)).shape == (2, 1)
    assert "doubled" in explain(serial(Dense(4), triple)[2], (2, 3)) or wraps


def init_identity(rng, input_shape):
    return input_shape, ()


def test_any_keyword_is_the_users(x64):
    """Layers of the library do not read keywords by names that a user may choose."""
    seen = []

    @layer
    def Listening():
        def kernel_fn(k, run=None, **kwargs):
            seen.append((run, kwargs))
            return k

        return init_identity, lambda params, x, **kwargs: x, kernel_fn

    x = inputs(1, (2, 4, 3))
    branches = serial(FanOut(2), parallel(Dense(3), serial(Dense(3), Listening())), FanInConcat())
    serial(branches, Dense(2), GlobalAvgPool())[2](x, None, "nngp", run=5, kernels=6, mask_constant=0.5)
    assert seen == [(5, {"kernels": 6, "pattern": None})]


# Transformations


def test_kernels_transform(x64):
    """jit, vmap and grad of the kernel of a network with branches."""
    block = serial(FanOut(2), parallel(serial(Relu(), Conv(4, (3,), padding="SAME")), Identity()), FanInSum())
    kernel_fn = serial(Conv(4, (3,), padding="SAME", W_std=1.5), block, GlobalAvgPool(), Dense(1, b_std=0.1))[2]
    x1, x2 = inputs(1, (2, 5, 3)), inputs(2, (3, 5, 3))
    ntk = kernel_fn(x1, x2, "ntk")
    np.testing.assert_allclose(jax.jit(kernel_fn, static_argnames="get")(x1, x2, "ntk"), ntk, rtol=1e-12)
    one_by_one = jax.vmap(lambda a: kernel_fn(a[None], x2, "ntk")[0])(x1)
    np.testing.assert_allclose(one_by_one, ntk, rtol=1e-12)
    gradient = jax.grad(lambda a: jnp.sum(kernel_fn(a, x2, "ntk")))(x1)
    direction = inputs(3, x1.shape)
    step = 1e-5
    ahead, behind = (jnp.sum(kernel_fn(x1 + s * direction, x2, "ntk")) for s in (step, -step))
    np.testing.assert_allclose(jnp.vdot(gradient, direction), (ahead - behind) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("constant", [7.0, np.nan])
def test_masks_transform(constant, x64):
    """jit of the kernel and of the finite network, with the constant among the traced arguments."""
    init_fn, apply_fn, kernel_fn = serial(Dense(3), GlobalAvgPool())
    x = inputs(1, (2, 4, 3)).at[0, 2].set(constant)
    ntk = jax.jit(kernel_fn, static_argnames="get")(x, None, "ntk", mask_constant=constant)
    np.testing.assert_allclose(ntk, kernel_fn(x, None, "ntk", mask_constant=constant), rtol=1e-12)
    _, params = init_fn(random.key(0), x.shape)
    out = jax.jit(unmask_fn(apply_fn))(params, x, mask_constant=constant)
    np.testing.assert_allclose(out, unmask_fn(apply_fn)(params, x, mask_constant=constant), rtol=1e-12)


@pytest.mark.parametrize("get", [None, "nngp", ("ntk", "nngp"), ["cov1", "shape1"]])
def test_get(get, x64):
    x = inputs(1, (2, 3))
    kernel = serial(Dense(4, b_std=0.5), Relu(), Dense(1))[2](x, None, get)
    if get is None:
        assert kernel.ntk is not None
    elif get == "nngp":
        assert kernel.shape == (2, 2)
    else:
        assert kernel._fields == tuple(get) and type(kernel).__name__ == "AnalyticKernel"


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: serial(Dense(4), Relu), TypeError, r"`Relu\(\)`, not `Relu`"),
        (lambda: serial((lambda rng, shape: 0, lambda params, x: x, "kernel_fn")), TypeError, "is no layer"),
        (lambda: parallel(Dense(4), Dense(4))[2](jnp.ones((2, 3))), ValueError, "list or tuple of 2 inputs"),
        (lambda: serial(FanOut(3), parallel(Dense(4), Dense(4)))[2](jnp.ones((2, 3))), ValueError, "2 inputs.*got 3"),
        (lambda: parallel(Dense(4), Dense(4))[0](random.key(0), [(2, 3)]), ValueError, "of 2 inputs.*got 1"),
        (lambda: parallel(Dense(4))[1]([()], jnp.ones((2, 3))), ValueError, "list or tuple of 1 inputs"),
        (lambda: serial(Dense(4), Relu())[1]([()], jnp.ones((2, 3))), ValueError, "list of 2 parameters"),
        (lambda: repeat(Dense(4), 3)[0](random.key(0), (-1, 3)), ValueError, "keeps the shape"),
        (lambda: repeat(Dense(4), -1), ValueError, "-1 times"),
        (lambda: parallel(Dropout(0.5), Dropout(0.5, "test")), ValueError, "same mode"),
        (lambda: serial(Relu())[2](jnp.ones((2, 3))), ValueError, "must be Gaussian"),
        (lambda: serial(FanOut(2), FanInConcat(), Relu())[2](jnp.ones((2, 3))), ValueError, "must be Gaussian"),
        (lambda: serial(Conv(3, (2,)), Flatten(), Conv(3, (2,)))[2](jnp.ones((2, 4, 3))), ValueError, "it is 1"),
    ],
)  # fmt: skip
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
