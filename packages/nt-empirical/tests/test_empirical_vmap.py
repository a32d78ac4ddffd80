"""`vmap_axes`: samples are differentiated one by one, and the kernel is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_networks import assert_close, mlp, mlp_params, operations, quickly_compiled
from nt_empirical import NtkImplementation, empirical_ntk_fn

pytestmark = pytest.mark.unoptimised

IMPLEMENTATIONS = list(NtkImplementation)[1:]
RNG = np.random.default_rng(0)
X1, X2 = RNG.normal(size=(4, 5, 6)), RNG.normal(size=(3, 5, 6))
SECOND1, SECOND2 = (np.moveaxis(x, 0, 1) for x in (X1, X2))


def pooled(params, x):
    """Inputs (batch, 5, 6), outputs (batch, 2): the positions of a sample interact."""
    return jnp.sum(mlp(params, x), axis=1)


def batch_last(params, x):
    """Inputs (5, batch, 6), outputs (5, 2, batch)."""
    return jnp.swapaxes(mlp(params, x), 1, 2)


def two_inputs(params, x):
    """Samples along axis 0 of one input, axis 1 of the other, and axes 0 and 2 of the outputs; none in `bias`."""
    a, (b,), bias = x["a"], x["b"], x["bias"]
    y = pooled(params, a + jnp.swapaxes(b, 0, 1)) * bias
    return {"plain": y, "turned": [jnp.stack([y.T, y.T**2])]}


def for_two_inputs(x):
    return {"a": jnp.asarray(x), "b": [jnp.asarray(2 * np.moveaxis(x, 0, 1))], "bias": jnp.asarray([[0.5, 2.0]])}


def two_functions(params, x):
    return [pooled(params, x[0]), mlp(params, x[1])]


CASES = {  # function, inputs, vmap_axes, trace_axes, diagonal_axes
    "one number": (pooled, X1, X2, 0, (-1,), ()),
    "all axes": (pooled, X1, X2, 0, (), ()),
    "positions": (mlp, X1, X2, 0, (-1,), (1,)),
    "negative": (pooled, X1, X2, (-3, -2, None), (), (-1,)),
    "not the first": (batch_last, SECOND1, SECOND2, (1, 2, {}), (1,), (0,)),
    "not the first, negative": (batch_last, SECOND1, SECOND2, (-2, -1, {}), (), ()),
    "different axes": (
        two_inputs,
        for_two_inputs(X1),
        for_two_inputs(X2),
        ({"a": 0, "b": 1, "bias": None}, {"plain": 0, "turned": [-1]}, {}),
        (),
        (),
    ),
    "same pytree for inputs and outputs": (two_functions, [X1, SECOND1], [X2, SECOND2], [0, 1], (-1,), ()),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_same(case, second, x64):
    f, x1, x2, vmap_axes, trace_axes, diagonal_axes = CASES[case]
    params, x2 = mlp_params(6, 2), x2 if second else None

    def kernels(params):
        return [
            empirical_ntk_fn(f, trace_axes, diagonal_axes, axes, implementation)(x1, x2, params)
            for implementation in IMPLEMENTATIONS
            for axes in (None, vmap_axes)
        ]

    expected, *others = quickly_compiled(kernels)(params)
    for actual in others:
        jax.tree.map(lambda a, e: assert_close(a, e, 1e-13), actual, expected)


@pytest.mark.parametrize(("trace_axes", "diagonal_axes"), [((0,), ()), ((), (0,)), ((1,), (0,)), ((0, 1), ())])
def test_the_axis_of_the_samples_may_be_traced_or_diagonal(trace_axes, diagonal_axes, x64):
    def kernels(params):
        return [
            empirical_ntk_fn(pooled, trace_axes, diagonal_axes, axes, implementation)(X1[:3], X2, params)
            for implementation in IMPLEMENTATIONS
            for axes in (None, 0)
        ]

    expected, *others = quickly_compiled(kernels)(mlp_params(6, 2))
    for actual in others:
        assert_close(actual, expected, 1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_network_without_parameters(implementation):
    ntk_fn = empirical_ntk_fn(lambda params, x: x, (), (), 0, implementation)
    np.testing.assert_array_equal(ntk_fn(jnp.ones((4, 2)), jnp.ones((3, 2)), ()), np.zeros((4, 3, 2, 2)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_function_sees_one_sample_at_a_time(implementation):
    seen = []

    def f(w, x):
        seen.append((x["a"].shape, x["b"].shape))
        return x["a"] * w + jnp.sum(x["b"])

    x = {"a": jnp.ones((4, 2)), "b": jnp.ones(7)}
    ntk_fn = empirical_ntk_fn(f, vmap_axes=({"a": 0, "b": None}, 0, {}), implementation=implementation)
    jax.eval_shape(lambda w: ntk_fn(x, None, w), jnp.ones((1, 2)))
    assert set(seen) == {((1, 2), (7,))}


def test_the_work_grows_with_the_samples_and_not_with_their_square():
    """Without the promise, every output of every sample is differentiated through the whole batch."""
    params, n = mlp_params(6, 2, dtype="float32"), 32

    def operations_of(vmap_axes):
        def kernel_of_equal_samples(x):
            return empirical_ntk_fn(mlp, (-1,), (0,), vmap_axes)(x, None, params)

        return operations(kernel_of_equal_samples, jnp.ones((n, 6)))

    assert operations_of(0) < operations_of(None) / (n / 4)


# Keywords


def with_keywords(params, x, *, scale, shift=0.0, train=True, name="sum"):
    """`scale` has a number for each sample, `shift` one for each output."""
    assert isinstance(train, bool)
    assert name == "sum"
    return pooled(params, x) * jnp.expand_dims(scale, 1) + params["V"][:1] * shift


@pytest.mark.parametrize("kwargs_axes", [{"scale": 0}, {"scale": -1, "shift": None}])
def test_keywords_with_samples(kwargs_axes, x64):
    params, scales = mlp_params(6, 2), (jnp.arange(1.0, 5), jnp.arange(2.0, 5))
    keywords = {"scale": scales, "shift": jnp.array([[0.5, 2.0]]), "train": True, "name": "sum"}
    expected, actual = (
        empirical_ntk_fn(with_keywords, vmap_axes=axes)(X1, X2, params, **keywords)
        for axes in (None, (0, 0, kwargs_axes))
    )
    assert_close(actual, expected, 1e-13)


def test_one_number_for_all_arrays_among_the_keywords(x64):
    """`rng` is one key for all, and flags are no arrays."""

    def f(params, x, *, scale, rng, train):
        assert train is True
        assert rng.shape == ()
        return with_keywords(params, x, scale=scale + jax.random.uniform(rng))

    params, scales = mlp_params(6, 2), (jnp.arange(1.0, 5), jnp.arange(2.0, 5))
    keywords = {"scale": scales, "rng": jax.random.key(1), "train": True}
    expected, actual = (empirical_ntk_fn(f, vmap_axes=a)(X1, X2, params, **keywords) for a in (None, (0, 0, 0)))
    assert_close(actual, expected, 1e-13)


def test_a_key_for_each_sample(x64):
    def f(params, x, *, keys):
        return with_keywords(params, x, scale=jax.vmap(jax.random.uniform)(keys))

    params = mlp_params(6, 2)
    keys = jax.random.split(jax.random.key(0), 4), jax.random.split(jax.random.key(1), 3)
    expected, actual = (
        empirical_ntk_fn(f, vmap_axes=axes)(X1, X2, params, keys=keys) for axes in (None, (0, 0, {"keys": 0}))
    )
    assert_close(actual, expected, 1e-13)


# What is refused


def ntk_with(vmap_axes, f=pooled, implementation=NtkImplementation.JACOBIAN_CONTRACTION):
    ntk_fn = empirical_ntk_fn(f, vmap_axes=vmap_axes, implementation=implementation)
    return ntk_fn(X1.astype("float32"), None, mlp_params(6, 2, dtype="float32"))


def test_axes_must_exist():
    with pytest.raises(ValueError, match="`vmap_axes` contains 3, but the array has 3 axes"):
        ntk_with((3, 0, {}))
    with pytest.raises(ValueError, match="`vmap_axes` contains 2, but the array has 2 axes"):
        ntk_with((0, 2, {}))


def test_axes_must_fit_inputs_and_outputs():
    with pytest.raises(ValueError, match=r"`vmap_axes` has axes \(\[0, 0\], .* do not fit"):
        ntk_with(([0, 0], 0, {}))
    with pytest.raises(ValueError, match=r"`vmap_axes` has axes \{'a': 0\} for .* do not fit"):
        ntk_with((0, {"a": 0}, {}))


def test_axes_must_be_named():
    with pytest.raises(ValueError, match="must name an axis of the inputs"):
        ntk_with((None, 0, {}))
    with pytest.raises(ValueError, match="must name an axis of every output"):
        ntk_with((0, None, {}))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_must_have_one_entry_per_sample(implementation):
    with pytest.raises(ValueError, match=r"promises .* one entry per sample along axis 1, .* shape \(1, 2\)"):
        ntk_with((0, 1, {}), implementation=implementation)
