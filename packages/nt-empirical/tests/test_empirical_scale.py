"""Tangent kernels with a scale for each parameter, and of single arrays of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_functions import TABLE
from empirical_networks import TOLERANCE, assert_close, mlp, mlp_params, operations, quickly_compiled, reduce
from nt_empirical import NtkImplementation, empirical_kernel_fn, empirical_ntk_fn

pytestmark = pytest.mark.unoptimised

RNG = np.random.default_rng(0)
X1, X2 = RNG.normal(size=(4, 6)), RNG.normal(size=(3, 6))
IMPLEMENTATIONS = list(NtkImplementation)
# Parameters that enter as they are, in parts, rearranged, in tables, several times, in convolutions, and in loops.
FUNCTIONS = [
    ("products", "positions"),
    ("products", "a sum over an axis of the weights"),
    ("elementwise", "two numbers"),
    ("elementwise", "masked, product"),
    ("arrangements", "transposed and reshaped"),
    ("arrangements", "two rows"),
    ("arrangements", "overlapping parts"),
    ("arrangements", "split"),
    ("reductions", "mean"),
    ("convolutions", "groups"),
    ("calls", "layers of a scan"),
    ("networks", "embedding, clipped"),
    ("networks", "position embedding"),
    ("networks", "attention"),
]


def scales_of(params, seed, dtype="float64"):
    """Returns a scale for each array: of its shape, along the last or the first axis, or a number."""
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(params)

    def shape(i, w):
        choices = [w.shape, w.shape[-1:], (*w.shape[:1], *[1] * (w.ndim - 1)), ()]
        return choices[(i + seed) % 4]

    return structure.unflatten(jnp.asarray(rng.normal(size=shape(i, w)), dtype) for i, w in enumerate(leaves))


def kernels_of_arrays(jacobians1, jacobians2, ndim, weights, scales):
    """Returns of every array the kernel over all axes of the outputs, those for `x1` and then those for `x2`."""

    def kernel(j1, j2, w, s):
        s = np.broadcast_to(np.asarray(s, "float64"), w.shape).ravel()
        rows1, rows2 = (np.asarray(j, "float64").reshape(*j.shape[:ndim], -1) for j in (j1, j2))
        return np.tensordot(rows1 * s, rows2, (-1, -1))

    return [
        kernel(*entry) for entry in zip(*map(jax.tree.leaves, (jacobians1, jacobians2, weights, scales)), strict=True)
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_scale_by_hand(implementation, dtype):
    """In all layouts, of numbers, arrays, and one number for several arrays."""
    params = mlp_params(6, 2, dtype=dtype)
    x1, x2 = jnp.asarray(X1, dtype), jnp.asarray(X2, dtype)
    scale = {"W": RNG.normal(size=(6, 11)), "b": RNG.random(), "V": RNG.random((11, 1))}
    layouts = [((), ()), ((1,), ()), ((), (1,))]

    def everything(params, scale, x1, x2):
        def kernel(axes, x2):
            ntk_fn = empirical_ntk_fn(mlp, *axes, vmap_axes=0, implementation=implementation, scale=scale)
            return ntk_fn(x1, x2, params)

        jacobians = [jax.jacobian(mlp)(params, x) for x in (x1, x2)]
        return [kernel(axes, x2) for axes in layouts], kernel(((), ()), None), jacobians

    kernels, alone, jacobians = quickly_compiled(everything)(params, scale, x1, x2)
    full = sum(kernels_of_arrays(*jacobians, 2, params, scale))
    for actual, axes in zip(kernels, layouts, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, reduce(full, *axes), TOLERANCE[dtype])
    np.testing.assert_array_equal(alone, alone.transpose(1, 0, 3, 2))
    full = sum(kernels_of_arrays(jacobians[0], jacobians[0], 2, params, scale))
    assert_close(alone, reduce(full, (), ()), TOLERANCE[dtype])


@pytest.mark.parametrize("first", [0, 5, 10])
def test_kernels_of_arrays(first, x64):
    """One for each array, with its scale; wherever parameters enter. That matters for structured derivatives only."""
    functions = {name: TABLE[kind][name] for kind, name in FUNCTIONS[first : first + 5]}

    def draw(shape):
        return jnp.asarray(RNG.normal(size=shape))

    params = {n: jax.tree.map(draw, f[1], is_leaf=lambda s: isinstance(s, tuple)) for n, f in functions.items()}
    scales = {name: scales_of(p, seed) for seed, (name, p) in enumerate(params.items())}
    inputs = {name: (draw((2, *f[2])), draw((3, *f[2]))) for name, f in functions.items()}
    last = list(functions)[-1]

    def everything(params, scales, inputs):
        found = {}
        for name, (f, *_) in functions.items():
            x1, x2 = inputs[name]
            implementations = IMPLEMENTATIONS[1:] if name == last else IMPLEMENTATIONS[3:]
            ntk_fns = [empirical_ntk_fn(f, (), (), 0, i, scale=scales[name], per_leaf=True) for i in implementations]
            kernels = [ntk_fn(x1, x2, params[name]) for ntk_fn in ntk_fns]
            found[name] = kernels, f(params[name], x1).ndim, [jax.jacobian(f)(params[name], x) for x in (x1, x2)]
        return found

    for name, (kernels, ndim, jacobians) in quickly_compiled(everything)(params, scales, inputs).items():
        expected = kernels_of_arrays(*jacobians, int(ndim), params[name], scales[name])
        largest = max(np.max(np.abs(k)) for k in expected)
        for of_arrays in kernels:
            assert jax.tree.structure(of_arrays) == jax.tree.structure(params[name])
            for actual, kernel in zip(jax.tree.leaves(of_arrays), expected, strict=True):
                np.testing.assert_allclose(actual, reduce(kernel, (), ()), rtol=0, atol=1e-11 * largest, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_picks_layers_and_costs_nothing(implementation):
    params = mlp_params(6, 2, dtype="float32")
    x = X1.astype("float32")

    def kernel(scale, **kwargs):
        return empirical_ntk_fn(mlp, implementation=implementation, scale=scale, **kwargs)

    head = kernel({"W": 0, "b": np.zeros(11), "V": True})(x, None, params)
    hidden = np.tanh(x @ np.asarray(params["W"]) + np.asarray(params["b"]))
    assert_close(head, hidden @ hidden.T / 11, 1e-6)
    np.testing.assert_array_equal(kernel(0)(x, X2.astype("float32"), params), np.zeros((4, 3)))
    single = kernel({"W": 0, "b": 0, "V": 1}, per_leaf=True)(x, None, params)
    np.testing.assert_array_equal(single["V"], head)
    np.testing.assert_array_equal(single["W"], np.zeros((4, 4)))
    assert kernel(None, per_leaf=True)(x, None, {**params, "unused": [], "W": params["W"]}).keys() == {
        *params,
        "unused",
    }

    first, second = (kernel({"W": zero, "b": 0, "V": 1}) for zero in (0, jnp.zeros(())))
    assert operations(first, x, None, params) < operations(second, x, None, params)


def test_kernels_of_arrays_of_several_outputs():
    """Parameters outside, outputs inside."""
    params, x = mlp_params(6, 2, dtype="float32"), X1.astype("float32")
    both = empirical_ntk_fn(lambda p, x: {"y": mlp(p, x), "z": (mlp(p, 2 * x),)}, per_leaf=True)(x, None, params)
    single = empirical_ntk_fn(mlp, per_leaf=True)(2 * x, None, params)
    jax.tree.map(lambda b, s: assert_close(b["z"][0], s, 1e-6), both, single, is_leaf=lambda k: "z" in k)
    whole = empirical_ntk_fn(mlp)(x, None, params)
    assert_close(sum(both[name]["y"] for name in params), whole, 1e-6)


def test_scale_of_named_kernels():
    params, x = mlp_params(6, 2, dtype="float32"), X1.astype("float32")
    scaled, plain = (empirical_kernel_fn(mlp, scale=s)(x, None, None, params) for s in (3, None))
    assert_close(scaled.ntk, 3 * np.asarray(plain.ntk), 1e-6)
    np.testing.assert_array_equal(scaled.nngp, plain.nngp)


@pytest.mark.parametrize("name", ["dense", "table"])
def test_scaled_structure_takes_less_than_jacobians(name):
    """Scales along one axis, or of any shape for a table, of which few rows are taken."""
    f, params, scale, x = {
        "dense": (
            mlp,
            mlp_params(64, 10, 128, dtype="float32"),
            {"W": np.ones(128), "b": 1.0, "V": np.ones((128, 1))},
            (8, 64),
        ),
        "table": (
            lambda p, x: jnp.mean(p[0][x.astype(int)], 1) @ p[1],
            [jnp.ones((1000, 16)), jnp.ones((16, 4))],
            [np.ones((1000, 16)), 1.0],
            (8, 5),
        ),
    }[name]

    def operations_of(implementation):
        ntk_fn = empirical_ntk_fn(f, vmap_axes=0, implementation=implementation, scale=scale)
        return operations(ntk_fn, jnp.ones(x), None, params)

    structured, contracted = NtkImplementation.STRUCTURED_DERIVATIVES, NtkImplementation.JACOBIAN_CONTRACTION
    assert operations_of(structured) < operations_of(contracted) / 4


def test_what_does_not_fit_is_refused():
    params, x = mlp_params(6, 2, dtype="float32"), X1.astype("float32")

    def kernel(scale):
        return empirical_ntk_fn(mlp, scale=scale)(x, None, params)

    for shape in [(11, 1), (2, 6, 11), (1, 6, 11)]:
        with pytest.raises(ValueError, match=r"for params\['W'\] of shape \(6, 11\) it has shape"):
            kernel({"W": np.ones(shape), "b": 1.0, "V": 1.0})
    with pytest.raises(ValueError, match="must have the structure of the parameters"):
        kernel({"W": 1.0, "V": 1.0})
    with pytest.raises(TypeError, match=r"must be real, got complex64 for params\['b'\]"):
        kernel({"W": 1.0, "b": jnp.ones((), "complex64"), "V": 1.0})
