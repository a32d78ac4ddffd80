"""Derivatives of programs without positions: native but for what inputs are to each other, a product of matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import ABS, RELU, chain, conv, dense, run, spec_of
from nt_core import Builder, Inputs, Kernel, Request, activations, propagate, steps
from nt_core.backends.cpu import CpuBackend
from test_core_backward import NONLINEARITIES, NTK, check_direction, dot, kernels_of, random_like

ERF, TANH = activations.Erf(0.7, 1.3, 0.2), activations.ElementwiseNumerical(jnp.tanh, None, 60)
STANDARD = {"parameterization": "standard", "s": (2, 3)}


def branches(spec):
    """Two outputs, one of which is a sum that is normalised."""
    builder = Builder()
    x = builder.add(dense(), builder.source(spec))
    both = [builder.add(dense(), builder.add(RELU, x)), x]
    total = builder.add(steps.Combine((0.6, 1.5)), *both)
    normalised = builder.add(steps.Normalize(0.1, ()), total)
    return builder.build(builder.add(steps.Dual(ERF), normalised), builder.add(dense(), builder.add(ABS, x)))


NETWORKS = {
    "two layers": lambda spec: chain(spec, [dense(), RELU, dense(), ABS]),
    "no bias": lambda spec: chain(spec, [dense(b_var=None), RELU, dense(b_var=None)]),
    "standard": lambda spec: chain(spec, [dense(**STANDARD), RELU, dense(**STANDARD), RELU, dense(**STANDARD)]),
    "other nonlinearities": lambda spec: chain(
        spec, [dense(), steps.Dual(ERF), dense(), steps.Dual(TANH), dense(), steps.Dual(activations.Gelu()), dense()]
    ),
    "dropout": lambda spec: chain(
        spec, [dense(), RELU, steps.Dropout(0.6), dense(), RELU, steps.Dropout(0.8), dense()]
    ),
    "linear": lambda spec: chain(spec, [dense(), dense(b_var=None)]),
    "branches": branches,
}


def vectors(n_channels, *sizes, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=(n, n_channels)) for n in sizes]


@pytest.mark.parametrize("n_channels", [3, 24])
@pytest.mark.parametrize("name", NETWORKS)
def test_against_finite_differences(name, n_channels, x64):
    """In the inputs and in all coefficients; with few channels and with many, forward and reverse."""
    x1, x2 = vectors(n_channels, 3, 2)
    check_direction(*kernels_of(NETWORKS[name](spec_of(x1, x2)), x1, x2))
    check_direction(*kernels_of(NETWORKS[name](spec_of(x1, x1)), x1, None))


def test_covariances_of_each_batch(x64):
    x1, x2 = vectors(4, 3, 2)
    program = chain(spec_of(x1, x2), [dense(), RELU, dense()])
    check_direction(*kernels_of(program, x1, x2, Request(ntk=True, covariances=True)))


def test_of_images_that_are_flattened(x64):
    """Their positions are channels from the start."""
    x1, x2 = (x.reshape(len(x), 2, 2, 3) for x in vectors(12, 3, 2))
    program = chain(spec_of(x1, x2), [steps.Flatten(), dense(), RELU, dense()])
    check_direction(*kernels_of(program, x1, x2))


@pytest.mark.parametrize("own", [False, True])
def test_in_kernels(own, x64):
    """In the covariances, the tangent kernel and the variances that a kernel holds."""
    x1, x2 = vectors(4, 3, 2)
    layers, everything = [dense(), RELU, dense()], Request(True, True)
    kernel = run(chain(spec_of(x1, x1 if own else x2), layers), x1, None if own else x2, everything, "xla")
    program = chain(kernel.spec, [RELU, dense(), steps.Dual(ERF), dense()])
    arrays = {name: getattr(kernel, name) for name in ("nngp", "ntk", "cov1", *(() if own else ("cov2",)))}

    def kernels(arrays):
        source = kernel.replace(**arrays)
        assert CpuBackend().derivatives(program, (source,), NTK) == "native"
        (k,) = propagate(program, [source], NTK, "cpu")
        return k.nngp, k.ntk

    direction = jax.tree.map(lambda x: (x + x.T) / 2 if own and x.ndim == 2 else x, random_like(arrays))
    weights = random_like(kernels(arrays))

    def along(step):
        point = jax.tree.map(lambda x, d: x + step * d, arrays, direction)
        return dot(kernels(point), weights)

    expected = (along(1e-6) - along(-1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(along)(0.0), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(along, (0.0,), (1.0,))[1], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["two layers", "other nonlinearities"])
def test_many_samples(name):
    """More than one task takes, and than fill its tiles; sums are the same in every run."""
    x1, x2 = (x.astype("float32") for x in vectors(24, 150, 77))
    weights = np.random.default_rng(1).normal(size=(150, 77)).astype("float32")

    def gradients(x1, x2, weights, implementation="cpu"):
        def total(x1, x2):
            return jnp.sum(weights * run(NETWORKS[name](spec_of(x1, x2)), x1, x2, NTK, implementation).ntk)

        return jax.jit(jax.grad(total, (0, 1)))(x1, x2)

    found, again = (gradients(x1, x2, weights) for _ in range(2))
    for actual, same, expected in zip(found, again, gradients(x1, x2, weights, "xla"), strict=True):
        np.testing.assert_array_equal(actual, same)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    def of_itself(x1, x2):
        symmetric = np.tile(weights, (1, 2))[:, :150]
        return jnp.sum((symmetric + symmetric.T) * run(NETWORKS[name](spec_of(x1, x1)), x1, x2, NTK, "cpu").ntk)

    own = jax.grad(of_itself)(jnp.asarray(x1), None)
    first, second = jax.grad(of_itself, (0, 1))(jnp.asarray(x1), jnp.asarray(x1))
    np.testing.assert_allclose(own, first + second, rtol=0, atol=1e-5 * np.abs(own).max())


def test_subgradients_are_those_of_xla(x64):
    """Where inputs coincide, are parallel, antiparallel or zero; and everywhere else, entry by entry."""
    x, other = vectors(24, 2)[0]
    x1, x2 = np.stack([x, x, 0 * x]), np.stack([x, 2 * x, -x, 0 * x, other])
    layers = [dense(b_var=None), RELU, dense(b_var=None), ABS, dense(), RELU]
    weights = random_like([(jnp.zeros((3, 5)), jnp.zeros((3, 5)), None, None)])

    def gradients(implementation):
        kernels, point = kernels_of(chain(spec_of(x1, x2), layers), x1, x2, NTK, implementation)

        return jax.jit(jax.grad(lambda *point: dot(kernels(*point), weights), argnums=(0, 1, 2)))(*point)

    for actual, expected in zip(*(jax.tree.leaves(gradients(i)) for i in ("cpu", "xla")), strict=True):
        assert np.isfinite(actual).all()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-7 * np.abs(expected).max())


def test_float32_keeps_its_digits():
    """Of nearly equal inputs, too."""
    x1, x2 = (x.astype("float32") for x in vectors(24, 5, 5))
    x2[0] = x1[0] + np.float32(1e-3) * x2[0]

    def gradient(dtype):
        with jax.enable_x64(dtype == "float64"):
            kernels, point = kernels_of(NETWORKS["two layers"](spec_of(x1, x2)), x1.astype(dtype), x2.astype(dtype))
            leaves = jax.tree.leaves(jax.grad(lambda *x: jnp.sum(kernels(*x)[0][1]), argnums=(0, 1, 2))(*point))
            return [np.asarray(leaf, "float64") for leaf in leaves]

    for actual, expected in zip(gradient("float32"), gradient("float64"), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


def test_a_gradient_is_two_products_and_one_call():
    x1, x2 = (x.astype("float32") for x in vectors(5, 3, 2))
    program = NETWORKS["two layers"](spec_of(x1, x2))
    gradient = jax.jit(jax.grad(lambda *x: jnp.sum(run(program, *x, NTK, "cpu").ntk), (0, 1)))
    text = gradient.lower(x1, x2).compile().as_text()
    assert "nt_backward" in text and "nt_tangents" not in text and "nt_propagate" not in text and "while" not in text


def test_gradients_under_vmap(x64):
    x1, x2 = vectors(3, 4, 2)
    program = NETWORKS["two layers"](spec_of(x1[:2], x2))
    gradient = jax.grad(lambda x1: jnp.sum(run(program, x1, x2, NTK, "cpu").ntk))
    batched = jax.vmap(gradient)(jnp.asarray(x1).reshape(2, 2, 3))
    np.testing.assert_allclose(batched, [gradient(x1[:2]), gradient(x1[2:])], rtol=1e-12)


def test_second_derivatives_are_those_of_xla(x64):
    (x1,), (x2,) = vectors(3, 2), vectors(3, 2, seed=1)
    program = NETWORKS["two layers"](spec_of(x1, x2))

    def hessian(implementation):
        return jax.hessian(lambda x1: jnp.sum(run(program, x1, x2, NTK, implementation).ntk))(jnp.asarray(x1))

    np.testing.assert_allclose(hessian("cpu"), hessian("xla"), rtol=1e-9, atol=1e-12)


def test_what_has_no_native_derivative():
    """Positions that end together with others are kept by xla."""
    x1, x2 = (x.reshape(len(x), 2, 2, 3) for x in vectors(12, 3, 2))
    kernel = run(chain(spec_of(x1, x2), [conv()]), x1, x2, Request(True, True), "xla")
    assert isinstance(kernel, Kernel)
    program = chain(kernel.spec, [RELU, steps.Flatten()])
    assert "materialised kernels with positions" in CpuBackend().derivatives(program, (kernel,), NTK)
    source = Inputs(jnp.asarray(x1), jnp.asarray(x2), spec_of(x1, x2))
    program = chain(spec_of(x1, x2), [conv(), RELU])
    assert "outputs with positions" in CpuBackend().derivatives(program, (source,), NTK)


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_nearly_equal_inputs(name):
    """In float32, in either input: what is as large as one over a small angle cancels."""
    (x1, noise) = vectors(24, 4, 4)
    x1, x2 = (x.astype("float32") for x in (x1, x1 * (1 + 1e-3 * noise)))
    dual = steps.Dual(NONLINEARITIES[name])

    def gradients(dtype):
        with jax.enable_x64(dtype == "float64"):
            a, b = x1.astype(dtype), x2.astype(dtype)
            program = chain(spec_of(a, b), [dense(), dual, dense(), dual, dense()])
            pairs = jax.grad(lambda *x: jnp.trace(run(program, *x, NTK, "cpu").ntk), (0, 1))(a, b)
            return [np.asarray(gradient, "float64") for gradient in pairs]

    for found, expected in zip(gradients("float32"), gradients("float64"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("layers", [[dense()], [dense(), RELU, dense()]])
def test_no_samples(layers):
    none = jnp.zeros((0, 4))
    gradient = jax.grad(lambda x: jnp.sum(run(chain(spec_of(none, none), layers), x, None, NTK, "cpu").ntk))
    assert gradient(none).shape == (0, 4)
