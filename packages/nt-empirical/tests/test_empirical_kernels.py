"""Empirical NNGP and NTK: values, layouts, pytrees, precision, and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_networks import TOLERANCE, assert_close, mlp, mlp_kernels, mlp_params, reduce
from jax.flatten_util import ravel_pytree
from nt_core import unmask_fn
from nt_core.masks import get_masked_array
from nt_empirical import (
    empirical_kernel_fn,
    empirical_nngp_fn,
    empirical_ntk_fn,
    empirical_ntk_vp_fn,
)

RNG = np.random.default_rng(0)
X1, X2 = RNG.normal(size=(4, 6)), RNG.normal(size=(3, 6))
SPATIAL1, SPATIAL2 = RNG.normal(size=(4, 5, 6)), RNG.normal(size=(3, 5, 6))


def linear(w, x):
    return x @ w


def compiled(kernel_fn):
    return jax.jit(kernel_fn, static_argnums=2)


def is_kernel(node):
    return hasattr(node, "_fields")


# Values


def test_kernels_of_a_linear_model(dtype):
    """f(x) = x w, with k outputs: NNGP x w w' x' / k, NTK x x'."""
    w = jnp.asarray(RNG.normal(size=(6, 2)), dtype)
    x1, x2 = jnp.asarray(X1, dtype), jnp.asarray(X2, dtype)
    kernel = empirical_kernel_fn(linear)(x1, x2, None, w)
    assert_close(kernel.nngp, (X1 @ w) @ (X2 @ w).T / 2, TOLERANCE[dtype])
    assert_close(kernel.ntk, X1 @ X2.T, TOLERANCE[dtype])


def test_kernels_of_a_network_are_those_by_hand(dtype):
    params = mlp_params(6, 2, dtype=dtype)
    nngp, ntk = (reduce(k, (-1,), ()) for k in mlp_kernels(params, X1, X2))
    kernel = empirical_kernel_fn(mlp)(jnp.asarray(X1, dtype), jnp.asarray(X2, dtype), None, params)
    assert_close(kernel.nngp, nngp, TOLERANCE[dtype])
    assert_close(kernel.ntk, ntk, TOLERANCE[dtype])
    assert kernel.nngp.dtype == kernel.ntk.dtype == dtype


def test_ntk_is_the_product_of_finite_differences(x64):
    params, step = mlp_params(6, 2), 1e-5
    flat, unflatten = ravel_pytree(params)

    def jacobian(x):
        columns = [mlp(unflatten(flat + e), x) - mlp(unflatten(flat - e), x) for e in step * np.eye(flat.size)]
        return np.stack(columns, axis=-1) / (2 * step)

    expected = np.einsum("akp,blp->akbl", jacobian(X1), jacobian(X2))
    actual = empirical_ntk_fn(mlp, trace_axes=())(jnp.asarray(X1), jnp.asarray(X2), params)
    assert_close(actual, expected.transpose(0, 2, 1, 3), 1e-9)


def test_network_without_parameters(dtype):
    kernel = empirical_kernel_fn(lambda params, x: x, diagonal_axes=1)(
        jnp.asarray(SPATIAL1, dtype), jnp.asarray(SPATIAL2, dtype), None, ()
    )
    assert_close(kernel.nngp, np.einsum("apc,bpc->abp", SPATIAL1, SPATIAL2) / 6, TOLERANCE[dtype])
    np.testing.assert_array_equal(kernel.ntk, np.zeros((4, 3, 5)))
    assert kernel.ntk.dtype == dtype


def test_empty_batch_has_an_empty_kernel():
    kernel = empirical_kernel_fn(mlp)(jnp.ones((0, 6)), jnp.ones((3, 6)), None, mlp_params(6, 2, dtype="float32"))
    assert kernel.nngp.shape == kernel.ntk.shape == (0, 3)


# Layout


def disjoint_axes(ndim):
    roles = itertools.product(["pair", "trace", "diagonal"], repeat=ndim)
    return [tuple(tuple(i for i in range(ndim) if r[i] == role) for role in ("trace", "diagonal")) for r in roles]


@pytest.mark.sample(9)
@pytest.mark.parametrize(("trace_axes", "diagonal_axes"), disjoint_axes(3))
def test_layout_for_all_choices_of_axes(trace_axes, diagonal_axes, x64):
    params = mlp_params(6, 3)
    same_size = 0 in trace_axes + diagonal_axes
    x1, x2 = (SPATIAL1[:3] if same_size else SPATIAL1), SPATIAL2
    kernel = empirical_kernel_fn(mlp, trace_axes, diagonal_axes)(x1, x2, None, params)
    for actual, full in zip(kernel, mlp_kernels(params, x1, x2), strict=True):
        assert_close(actual, reduce(full, trace_axes, diagonal_axes), 1e-13)


def test_layouts_of_the_documentation():
    params, x1, x2 = mlp_params(6, 7, dtype="float32"), np.ones((4, 5, 6), "float32"), np.ones((6, 5, 6), "float32")
    for trace_axes, diagonal_axes, shape in [
        ((), (), (4, 6, 5, 5, 7, 7)),
        ((2,), (), (4, 6, 5, 5)),
        ((2,), (1,), (4, 6, 5)),
        ((1,), (2,), (4, 6, 7)),
        ((1, 2), (), (4, 6)),
        ((), (1, 2), (4, 6, 5, 7)),
    ]:
        kernel_fn = empirical_kernel_fn(mlp, trace_axes, diagonal_axes)
        kernel = jax.eval_shape(lambda fn=kernel_fn: fn(x1, x2, None, params))
        assert kernel.nngp.shape == kernel.ntk.shape == shape


def test_axes_may_be_negative_repeated_lists_or_one_number(x64):
    params = mlp_params(6, 3)
    expected = empirical_kernel_fn(mlp, (2,), (1,))(SPATIAL1, SPATIAL2, None, params)
    for trace_axes, diagonal_axes in [(-1, 1), ([2, -1], [-2]), (2, (1, -2, 1))]:
        actual = empirical_kernel_fn(mlp, trace_axes, diagonal_axes)(SPATIAL1, SPATIAL2, None, params)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.sample(8)
@pytest.mark.parametrize(("trace_axes", "diagonal_axes"), disjoint_axes(3))
def test_without_second_inputs_the_kernel_is_exactly_symmetric(trace_axes, diagonal_axes):
    params, x = mlp_params(6, 3, dtype="float32"), jnp.asarray(SPATIAL1, "float32")
    alone = empirical_kernel_fn(mlp, trace_axes, diagonal_axes)(x, None, None, params)
    twice = empirical_kernel_fn(mlp, trace_axes, diagonal_axes)(x, x + 0, None, params)
    pairs = [axis for axis in range(3) if axis not in trace_axes + diagonal_axes]
    swap, position = [], 0
    for axis in range(3):
        if axis in pairs:
            swap += [position + 1, position]
        elif axis in diagonal_axes:
            swap.append(position)
        position = len(swap)
    for k, k_twice in zip(alone, twice, strict=True):
        np.testing.assert_array_equal(k, k.transpose(swap))
        assert_close(k, k_twice, TOLERANCE["float32"])


@pytest.mark.parametrize("x2", [(None,), [None, None], {"a": None}])
def test_nested_absence_is_absence(x2, x64):
    params = mlp_params(6, 2)
    expected = empirical_kernel_fn(mlp)(X1, None, None, params)
    jax.tree.map(np.testing.assert_array_equal, empirical_kernel_fn(mlp)(X1, x2, None, params), expected)


# Pytrees


def two_headed(params, x, scale=1.0):
    """Inputs are a dict, parameters nested, outputs a dict with a list in it."""
    first = mlp(params["layers"][0], x["a"])
    return {"sum": first + scale * jnp.sum(x["b"]), "pair": [mlp(params["layers"][1], first), 2 * first]}


def two_headed_case():
    params = {"layers": (mlp_params(6, 3, seed=1), mlp_params(3, 4, seed=2)), "unused": jnp.ones(2)}
    x1, x2 = ({"a": jnp.asarray(x), "b": jnp.arange(2.0)} for x in (X1, X2))
    return params, x1, x2


def test_every_output_has_its_own_kernel(x64):
    params, x1, x2 = two_headed_case()
    kernels = compiled(empirical_kernel_fn(two_headed))(x1, x2, None, params)
    heads = {
        "sum": lambda p, x: two_headed(p, x)["sum"],
        "first": lambda p, x: two_headed(p, x)["pair"][0],
        "second": lambda p, x: two_headed(p, x)["pair"][1],
    }
    found = {"sum": kernels["sum"], "first": kernels["pair"][0], "second": kernels["pair"][1]}
    assert jax.tree.structure(kernels, is_leaf=is_kernel) == jax.tree.structure(two_headed(params, x1))
    for name, head in heads.items():
        expected = compiled(empirical_kernel_fn(head))(x1, x2, None, params)
        jax.tree.map(lambda a, e: assert_close(a, e, 1e-14), found[name], expected)
    assert_close(found["second"].ntk, 4 * reduce(mlp_kernels(params["layers"][0], X1, X2)[1], (-1,), ()), 1e-13)


def test_kernels_alone_keep_the_pytree(x64):
    params, x1, x2 = two_headed_case()
    both = compiled(empirical_kernel_fn(two_headed))(x1, x2, None, params)
    for name, make in {"nngp": empirical_nngp_fn, "ntk": empirical_ntk_fn}.items():
        alone = jax.jit(make(two_headed))(x1, x2, params)
        selected = compiled(empirical_kernel_fn(two_headed))(x1, x2, name, params)
        expected = jax.tree.map(lambda k, n=name: getattr(k, n), both, is_leaf=is_kernel)
        for actual in (alone, selected):
            jax.tree.map(lambda a, e: assert_close(a, e, 1e-14), actual, expected)


# What to get


def test_get():
    kernel_fn, params = empirical_kernel_fn(mlp), mlp_params(6, 2, dtype="float32")
    x1, x2 = X1.astype("float32"), X2.astype("float32")
    both = kernel_fn(x1, x2, None, params)
    assert type(both).__name__ == "EmpiricalKernel"
    assert both._fields == ("nngp", "ntk")
    np.testing.assert_array_equal(kernel_fn(x1, x2, "NTK", params), both.ntk)
    np.testing.assert_array_equal(kernel_fn(x1, x2, "nngp", params), both.nngp)
    turned = kernel_fn(x1, x2, ["ntk", "nngp"], params)
    assert turned._fields == ("ntk", "nngp")
    np.testing.assert_array_equal(turned.ntk, both.ntk)
    assert type(kernel_fn(x1, x2, ("nngp", "ntk"), params)) is type(both)
    assert kernel_fn(x1, x2, ("ntk",), params)._fields == ("ntk",)


@pytest.mark.parametrize(
    ("get", "error", "message"),
    [
        ((), ValueError, "non-empty"),
        (("ntk", "NTK"), ValueError, "unique"),
        ("cov1", KeyError, "asks for cov1, and there are nngp, ntk only"),
    ],
)
def test_get_is_checked(get, error, message):
    with pytest.raises(error, match=message):
        empirical_kernel_fn(mlp)(X1, X2, get, mlp_params(6, 2, dtype="float32"))


def test_what_is_not_asked_for_is_not_computed():
    """The NNGP needs no derivative, and the network may have none."""

    @jax.custom_jvp
    def no_derivative(x):
        return x

    @no_derivative.defjvp
    def fail(primals, tangents):
        raise AssertionError("differentiated")

    kernel_fn = empirical_kernel_fn(lambda w, x: no_derivative(x @ w))
    w, x = jnp.ones((6, 2)), jnp.ones((4, 6))
    assert_close(kernel_fn(x, None, "nngp", w), np.full((4, 4), 36.0), 0)
    with pytest.raises(AssertionError, match="differentiated"):
        kernel_fn(x, None, "ntk", w)


# Vector products


@pytest.mark.parametrize("second", [True, False])
def test_vector_products_are_products_with_the_kernel(second, dtype):
    params = mlp_params(6, 2, dtype=dtype)
    x1, x2 = jnp.asarray(X1, dtype), jnp.asarray(X2, dtype) if second else None
    v = jnp.asarray(RNG.normal(size=(3 if second else 4, 2)), dtype)
    ntk = empirical_ntk_fn(mlp, trace_axes=())(x1, x2, params)
    product = empirical_ntk_vp_fn(mlp, x1, x2, params)
    assert_close(product(v), np.einsum("abkl,bl->ak", ntk, v), 10 * TOLERANCE[dtype])
    assert_close(jax.jit(product)(v), product(v), 10 * TOLERANCE[dtype])


def test_vector_products_with_pytrees_and_keywords(x64):
    """The products see the terms between different outputs, which a kernel per output leaves out."""
    params, x1, x2 = two_headed_case()
    v = jax.tree.map(jnp.ones_like, two_headed(params, x2))
    actual = empirical_ntk_vp_fn(two_headed, x1, x2, params, scale=(2.0, 3.0))(v)
    jacobian1, jacobian2 = (jax.jit(jax.jacobian(two_headed))(params, x, s) for x, s in ((x1, 2.0), (x2, 3.0)))

    def rows(jacobian, x):
        """Returns the Jacobian as a matrix, over all outputs and all parameters."""
        outputs = two_headed(params, x)
        blocks = jax.tree.structure(outputs).flatten_up_to(jacobian)
        sizes = [y.size for y in jax.tree.leaves(outputs)]
        return np.concatenate(
            [
                np.concatenate([j.reshape(n, -1) for j in jax.tree.leaves(b)], 1)
                for b, n in zip(blocks, sizes, strict=True)
            ]
        )

    full = rows(jacobian1, x1) @ rows(jacobian2, x2).T
    expected = full.sum(axis=1)
    assert_close(np.concatenate([np.ravel(y) for y in jax.tree.leaves(actual)]), expected, 1e-12)


# Transformations


def test_kernels_under_jit_vmap_and_grad(x64):
    params, x1, x2 = mlp_params(6, 2), jnp.asarray(X1), jnp.asarray(X2)
    kernel_fn = empirical_kernel_fn(mlp)
    eager = kernel_fn(x1, x2, None, params)
    jitted = jax.jit(kernel_fn, static_argnums=2)(x1, x2, None, params)
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-14), jitted, eager)

    many = jnp.stack([x1, 2 * x1])
    mapped = jax.vmap(lambda x: kernel_fn(x, x2, "ntk", params))(many)
    assert_close(mapped[1], kernel_fn(2 * x1, x2, "ntk", params), 1e-14)

    def total(x):
        return jnp.sum(kernel_fn(x, x2, "ntk", params) ** 2)

    direction = RNG.normal(size=x1.shape)
    slope = float(total(x1 + 1e-6 * direction) - total(x1 - 1e-6 * direction)) / 2e-6
    assert float(jnp.sum(jax.grad(total)(x1) * direction)) == pytest.approx(slope, rel=1e-7)


# Precision


def test_kernels_have_documented_types(x64):
    x32, x64 = X1.astype("float32"), X1
    w32, w64 = (jnp.ones((6, 2), d) for d in ("float32", "float64"))
    for x, w, nngp, ntk in [(x64, w32, "float64", "float32"), (x32, w64, "float64", "float64")]:
        kernel = empirical_kernel_fn(linear)(x, None, None, w)
        assert (kernel.nngp.dtype, kernel.ntk.dtype) == (nngp, ntk)
    mixed = empirical_ntk_fn(lambda p, x: x @ p[0] + x @ p[1])(x32, None, (w32, w64))
    assert mixed.dtype == "float64"


@pytest.mark.parametrize("implementation", [1, 3])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_is_accumulated_in_single(half, implementation):
    """A sum of ones stops at 256 in bfloat16, and 1024 * 64 overflows in float16."""
    x = jnp.full((3, 1), 8, half)
    kernel_fn = empirical_kernel_fn(lambda w, x: jnp.expand_dims(w, 0) * x, implementation=implementation)
    kernel = kernel_fn(x, None, None, jnp.ones(1024, half))
    assert kernel.nngp.dtype == kernel.ntk.dtype == half
    for k in kernel:
        np.testing.assert_array_equal(k.astype("float32"), np.full((3, 3), 64.0))


# What is refused


@pytest.mark.parametrize("make", [empirical_nngp_fn, empirical_ntk_fn])
def test_axes_are_checked(make):
    params, x = mlp_params(6, 2, dtype="float32"), X1.astype("float32")
    with pytest.raises(ValueError, match="`trace_axes` contains 2, but the array has 2 axes"):
        make(mlp, trace_axes=(2,))(x, None, params)
    with pytest.raises(ValueError, match="`diagonal_axes` contains -3"):
        make(mlp, diagonal_axes=(-3,))(x, None, params)
    with pytest.raises(ValueError, match="traced or diagonal, not both"):
        make(mlp, trace_axes=(1,), diagonal_axes=(-1,))(x, None, params)
    with pytest.raises(ValueError, match=r"same size along trace and diagonal axes.*\(4, 2\).*\(3, 2\)"):
        make(mlp, diagonal_axes=(0,))(x, x[:3], params)
    with pytest.raises(ValueError, match="no entries along the traced axes"):
        make(lambda w, x: x @ w)(x, None, jnp.ones((6, 0)))


@pytest.mark.parametrize("make", [empirical_nngp_fn, empirical_ntk_fn])
def test_scalar_outputs_need_no_trace_axes(make):
    def f(w, x):
        return jnp.sum(x @ w)

    with pytest.raises(ValueError, match="Scalars need `trace_axes` without axes"):
        make(f)(jnp.ones((4, 6)), None, jnp.ones(6))
    assert make(f, trace_axes=())(jnp.ones((4, 6)), None, jnp.ones(6)).shape == ()


@pytest.mark.parametrize("make", [empirical_nngp_fn, empirical_ntk_fn])
def test_outputs_must_fit(make):
    w = jnp.ones((6, 2))
    with pytest.raises(TypeError, match="real floating-point arrays, got dtype int32"):
        make(lambda w, x: jnp.argmax(x @ w, axis=1, keepdims=True))(jnp.ones((4, 6)), None, w)
    with pytest.raises(ValueError, match=r"shapes \(2, 4, 2\) and \(3, 2\)"):
        make(linear)(jnp.ones((2, 4, 6)), jnp.ones((3, 6)), w)
    with pytest.raises(ValueError, match="must return the same for x1 and x2"):
        make(lambda w, x: [x @ w] * len(x))(jnp.ones((2, 6)), jnp.ones((3, 6)), w)


@pytest.mark.parametrize("make", [empirical_nngp_fn, empirical_ntk_fn])
def test_masked_outputs_must_be_unmasked(make):
    def masked(w, x):
        return get_masked_array(x @ w, mask_constant=6.0)

    x, w = jnp.ones((4, 6)).at[0].set(2.0), jnp.ones((6, 2))
    with pytest.raises(TypeError, match="unmask_fn"):
        make(masked)(x, None, w)
    assert np.all(make(unmask_fn(masked))(x, None, w)[1:] == 0)


@pytest.mark.parametrize("leaf", [np.ones(2, "int32"), np.ones(2, "complex64"), 3, jnp.tanh])
def test_parameters_must_be_real_numbers(leaf):
    with pytest.raises(TypeError, match=r"got .* in params\['fixed'\]\. Hold what is not trained"):
        empirical_ntk_fn(lambda p, x: x * p["w"])(jnp.ones((4, 6)), None, {"w": jnp.ones(()), "fixed": leaf})


def test_unknown_implementation():
    with pytest.raises(ValueError, match="7 is not a valid NtkImplementation"):
        empirical_ntk_fn(mlp, implementation=7)
