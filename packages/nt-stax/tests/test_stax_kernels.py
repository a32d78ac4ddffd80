"""What `kernel_fn` takes for inputs beside arrays: kernels, of other networks or made by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from nt_stax import (
    AvgPool,
    Conv,
    Dense,
    FanInSum,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Relu,
    layer,
    parallel,
    requires,
    serial,
)
from stax_samples import normal

HEAD = serial(Dense(4), Relu())
TAIL = serial(Dense(4, b_std=0.3), Relu(), Dense(1))[2]


def inputs(shape, seed=1):
    return normal(seed, shape)


def identity(rng, input_shape):
    return input_shape, ()


def user_layer(function):
    """A layer that is a function of kernels."""
    return layer(lambda: (identity, lambda params, x, **kwargs: x, function))()


# Tangent kernels that were not asked for


@pytest.mark.parametrize("implementation", ["cpu", "xla", None])
def test_a_kernel_without_ntk(implementation):
    kernel = HEAD[2](inputs((2, 3)), None, ("nngp", "shape1"))
    assert kernel.shape1 == (2, 4)
    whole = HEAD[2](inputs((2, 3)), inputs((3, 3), 2))
    without = whole.replace(ntk=None)
    for get in ("ntk", ("nngp", "NTK")):
        with pytest.raises(ValueError, match="`get` asks for ntk, and the Kernel that was given holds none"):
            TAIL(without, None, get, implementation=implementation)
    np.testing.assert_array_equal(TAIL(without, None, "nngp"), TAIL(whole, None, "nngp"))
    # What is unknown stays unknown.
    rest = TAIL(without, implementation=implementation)
    assert rest.ntk is None and rest.nngp is not None
    both = serial(parallel(Dense(3), Dense(3)), FanInSum())[2]
    assert both([whole, without]).ntk is None and both([whole, whole]).ntk is not None


def test_a_layer_that_returns_no_ntk():
    network = serial(Dense(4), user_layer(lambda k, **kwargs: k.replace(ntk=None)), Dense(1))[2]
    assert network(inputs((2, 3))).ntk is None
    assert network(inputs((2, 3)), None, "nngp").shape == (2, 2)
    with pytest.raises(ValueError, match="the Kernel that a layer returned holds none"):
        network(inputs((2, 3)), None, "ntk")


# Shapes


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("n", [2, -1])
def test_arrays_say_how_many_samples_there_are(n, implementation):
    known = HEAD[2](inputs((1, 3)), inputs((3, 3), 2))
    given = known.replace(shape1=(n, 4), shape2=(n, 4))
    kernel = TAIL(given, implementation=implementation)
    assert (kernel.shape1, kernel.shape2) == ((1, 1), (3, 1))
    np.testing.assert_array_equal(kernel.ntk, TAIL(known, None, "ntk", implementation=implementation))


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nngp": jnp.ones((2, 3, 4))}, r"`nngp` of shape \(2, 3, 4, 4\), got \(2, 3, 4\)"),
        ({"shape1": (2, 5, 3)}, r"`nngp` of shape \(2, 3, 5, 5\), got \(2, 3, 4, 4\)"),
        ({"ntk": jnp.ones((2, 2))}, r"`ntk` of shape \(2, 3, 4, 4\), got \(2, 2\)"),
        ({"diagonal_batch": False}, r"diagonal_batch=False.* has `cov1` of shape \(2, 2, 4, 4\), got \(2, 4, 4\)"),
        ({"cov2": jnp.ones((2, 4, 4))}, r"`cov2` of shape \(3, 4, 4\), got \(2, 4, 4\)"),
    ],
)
def test_arrays_that_do_not_fit_the_shapes(changes, message, implementation):
    kernel = Dense(3)[2](inputs((2, 4, 3)), inputs((3, 4, 3), 2))
    with pytest.raises(ValueError, match=message):
        serial(Relu(), Dense(3))[2](kernel.replace(**changes), implementation=implementation)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_layer_that_drops_an_axis(axis, x64):
    """Its author need not say that channels, which came last, still do."""

    @layer
    def Sum():
        def init_fn(rng, input_shape):
            return tuple(n for a, n in enumerate(input_shape) if a != axis), ()

        @requires(batch_axis=0, channel_axis=-1)
        def kernel_fn(k, **kwargs):
            if k.is_reversed:
                k = k.reverse()
            pair = 2 * (axis - 1)

            def summed(cov, start):
                return cov if cov is None else jnp.sum(cov, (start + pair, start + pair + 1))

            return k.replace(
                nngp=summed(k.nngp, 2), ntk=summed(k.ntk, 2), cov1=summed(k.cov1, 1), cov2=summed(k.cov2, 1),
                is_reversed=False,
            )  # fmt: skip

        return init_fn, lambda params, x, **kwargs: jnp.sum(x, axis), kernel_fn

    x = inputs((2, 3, 4, 5))
    conv = Conv(4, (2, 2), padding="SAME", b_std=0.1)
    window = (3, 1) if axis == 1 else (1, 4)
    rest = serial(Relu(), Flatten(), Dense(1))
    summed = serial(conv, Sum(), Dense(2), rest)[2](x, None, diagonal_spatial=False)
    averaged = serial(conv, AvgPool(window), Dense(2, W_std=max(window)), rest)[2](x)
    assert summed.shape1 == averaged.shape1
    np.testing.assert_allclose(summed.nngp, averaged.nngp, rtol=1e-12)


# Entries that a kernel does not hold


def test_a_network_needs_positions_that_the_kernel_lacks(x64):
    readout = serial(Conv(4, (3, 3)), GlobalAvgPool(), Dense(1))[2]
    for size in (5, 7):  # with 5 x 5 one position is left
        kernel = serial(Dense(3))[2](inputs((2, size, size, 3)), diagonal_spatial=True)
        with pytest.raises(ValueError, match="This network requires diagonal_spatial"):
            readout(kernel, None, "nngp")
    branches = parallel(serial(Conv(4, (3, 3)), GlobalAvgPool()), serial(Conv(4, (3, 3)), Flatten()))[2]
    full = serial(Dense(3))[2](inputs((2, 5, 5, 3)), diagonal_spatial=False)
    with pytest.raises(ValueError, match="Branch 0 of parallel requires diagonal_spatial"):
        branches([kernel, kernel])
    kernel = serial(Dense(3))[2](inputs((2, 5, 5, 3)), diagonal_spatial=True)
    for a, b in zip(branches([full, kernel]), branches([full, full]), strict=True):
        np.testing.assert_allclose(a.ntk, b.ntk, rtol=1e-12)


def test_a_network_that_reads_diagonals_only_takes_them(x64):
    network = serial(Conv(4, (3, 3), padding="SAME"), Relu(), Flatten(), Dense(1), LayerNorm())[2]
    x = inputs((2, 4, 4, 3))
    first = serial(Conv(3, (2, 2)), Relu())[2]
    expected = network(first(x, None, diagonal_spatial=False), None, "ntk")
    np.testing.assert_allclose(network(first(x, None, diagonal_spatial=True), None, "ntk"), expected, rtol=1e-12)


def test_a_network_needs_samples_that_the_kernel_lacks():
    mixing = user_layer(requires(diagonal_batch=False)(lambda k, **kwargs: k))
    network = serial(Dense(3), Relu(), mixing)[2]
    x = inputs((2, 3))
    assert network(Dense(3)[2](x, diagonal_batch=False)).cov1.shape == (2, 2)
    with pytest.raises(ValueError, match="This network requires diagonal_batch to be False"):
        network(Dense(3)[2](x))
