"""Derivatives by the native engine: against finite differences, against those of xla, and in every mode of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import (
    ABS,
    CHAINS,
    MEAN,
    RELU,
    chain,
    conv,
    dense,
    inputs,
    masked,
    masks,
    pool,
    products,
    random_graph,
    residual,
    run,
    run_all,
    spec_of,
)
from nt_core import Builder, Inputs, Request, activations, steps
from nt_core.backends.cpu import CpuBackend

NTK = Request(ntk=True, covariances=False)
DROPOUT = [conv(), RELU, steps.Dropout(0.6), conv(), RELU, steps.Dropout(0.8), steps.GlobalPool(MEAN), dense(), RELU]


def two_outputs(spec):
    """One value is pooled and flattened, and both are returned; the second goes through another nonlinearity."""
    builder = Builder()
    x = builder.add(RELU, builder.add(conv(), builder.source(spec)))
    first = builder.add(dense(), builder.add(steps.GlobalPool(MEAN), x))
    second = builder.add(RELU, builder.add(dense(), builder.add(steps.Flatten(), x)))
    return builder.build(first, second)


def shared(spec):
    """One nonlinearity is read by two convolutions, one of which reads every other position alone."""
    builder = Builder()
    x = builder.add(RELU, builder.add(conv(), builder.source(spec)))
    branches = builder.add(conv(strides=(2, 2)), x), builder.add(conv((1, 1), (2, 2)), x)
    total = builder.add(RELU, builder.add(steps.Combine((1.0, 1.0)), *branches))
    return builder.build(builder.add(steps.GlobalPool(MEAN), total))


# One axis and two, every kind of step, with one stage and with several.
CHAINED = (
    "valid",
    "dilated",
    "explicit padding",
    "neighbours",
    "standard",
    "after global pool",
    "strides",
    "circular strides",
    "pool",
    "strided pool",
    "overlapping pool, global",
    "sums, normalised edges",
    "normalised edges, global",
    "circular pool",
    "normalised",
    "gather, pool",
    "gather, circular",
    "gather, equal positions",
    "untie, pool",
    "untie, equal positions",
)
STANDARD = {"parameterization": "standard", "s": (2, 3)}
# Positions that no window of the second convolution reads, and weights whose tangent kernel is not the covariance.
SHORTCUT = [
    conv(),
    RELU,
    conv((1, 1), (2, 2), "VALID", **STANDARD),
    RELU,
    conv((2, 2), padding="VALID", **STANDARD),
    ABS,
]
LINE = [conv((3,), (2,), dilation=(1,)), RELU, steps.Flatten(), dense(), ABS]
NETWORKS = {name: (CHAINS[name][0], lambda spec, name=name: chain(spec, CHAINS[name][1])) for name in CHAINED}
NETWORKS |= {
    "residual": ((8, 8), residual),
    "products": ((5, 4), products),
    "shared": ((5, 6), shared),
    "shortcut": ((5, 6), lambda spec: chain(spec, [*SHORTCUT, steps.GlobalPool(MEAN)])),
    "dropout": ((6, 6), lambda spec: chain(spec, DROPOUT)),
    "two outputs": ((4, 3), two_outputs),
    "linear": ((4, 3), lambda spec: chain(spec, [conv(), steps.GlobalPool(MEAN), dense(b_var=None)])),
    "one axis": ((7,), lambda spec: chain(spec, LINE)),
}


def as_arrays(program):
    """A program whose coefficients are arrays, to be differentiated in."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), program)


def random_like(tree, seed=1):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), tree)


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def moved(point, direction, step):
    return jax.tree.map(lambda x, d: x + step * d, point, direction)


def kernels_of(program, x1, x2, request=NTK, implementation="cpu"):
    """The arrays of all outputs, as a function of the program and of the inputs; `x2` None is a batch with itself."""

    def kernels(program, x1, *x2):
        outputs = run_all(program, x1, *(x2 or (None,)), request, implementation)
        return [(k.nngp, k.ntk, k.cov1, k.cov2) for k in outputs]

    return kernels, (as_arrays(program), jnp.asarray(x1), *(() if x2 is None else (jnp.asarray(x2),)))


def check_direction(kernels, point, tolerance=1e-7):
    """Compares derivatives along one direction, forward and reverse, with finite differences."""
    direction = random_like(point)
    value, pull = jax.vjp(kernels, *point)
    weights = random_like(value)
    tangent = dot(jax.jvp(kernels, point, direction)[1], weights)
    np.testing.assert_allclose(dot(pull(weights), direction), tangent, rtol=1e-9)
    step = 1e-5
    after, before = (dot(kernels(*moved(point, direction, s)), weights) for s in (step, -step))
    np.testing.assert_allclose(tangent, (after - before) / (2 * step), rtol=tolerance)


# Beside the ReLU family: those with closed forms, and Hermite coefficients: that end, of both parities and of one, with
# a kink at 0, and of a cusp beside an odd function and a constant.
NONLINEARITIES = {
    "erf": activations.Erf(0.7, 1.3, 0.2),
    "gelu": activations.Gelu(),
    "sin": activations.Sin(0.9, 0.8, 0.4),
    "rbf": activations.Rbf(0.4),
    "exp": activations.Exp(0.6, 0.5),
    "exp normalized": activations.ExpNormalized(0.7, -0.8),
    "step": activations.Step(-0.6, 1.0, 0.3),
    "gaussian": activations.Gaussian(1.4, -0.6),
    "gabor": activations.Gabor(),
    "clip": activations.Clip(1.2, -0.4, 0.9, 0.3),
    "cubic": activations.Polynomial((0.3, 0.5, 0.0, 0.1)),
    "power": activations.Monomial(2),
    "rectified square": activations.RectifiedMonomial(2),
    "rectified cube": activations.RectifiedMonomial(3),
    "polynomial": activations.ElementwiseNumerical(lambda x: 0.1 * x**3 - 0.3 * x**2 + x, None, 2),
    "tanh": activations.ElementwiseNumerical(jnp.tanh, None, 60),
    "sine": activations.ElementwiseNumerical(lambda x: jnp.sin(x + 0.3), None, 30),
    "leaky": activations.ElementwiseNumerical(jax.nn.leaky_relu, None, 10),
    "cusp": activations.ElementwiseNumerical(lambda x: 0.3 * jnp.abs(x) + 0.5 * jnp.tanh(x) + 0.3, None, 60),
}


def nonlinear(dual, pools=True):
    """Before a pool and a convolution, or Flatten; as deficits and as covariances. Black pixels have no variance."""
    dual = steps.Dual(dual)
    between = [pool((2, 2), (1, 1)), conv()] if pools else [conv(b_var=None)]
    end = [steps.GlobalPool(MEAN) if pools else steps.Flatten(), dense(), dual]
    return lambda spec: chain(spec, [conv(b_var=None), dual, *between, dual, *end])


@pytest.mark.parametrize("name", NONLINEARITIES)
@pytest.mark.parametrize("pools", [True, False])
def test_nonlinearities_against_finite_differences(name, pools, x64):
    x1, x2 = inputs((4, 3), 3, 2, "float64")
    program = nonlinear(NONLINEARITIES[name], pools)(spec_of(x1, x2))
    source = Inputs(jnp.asarray(x1), jnp.asarray(x2), program.sources[0])
    assert not CpuBackend().derivatives(program, (source,), NTK).startswith("by xla")
    check_direction(*kernels_of(program, x1, x2))


# What is beyond the terms changes with the variances as the tables say, but for how it is spread over orders. In groups
# of these it is known.
RESTS = {
    "selu": (activations.ElementwiseNumerical(jax.nn.selu, None, 150), 3e-6),
    "few terms": (activations.ElementwiseNumerical(jax.nn.selu, None, 15), 1e-3),
    "elu": (activations.ElementwiseNumerical(jax.nn.elu, None, 150), 1e-6),
    "two terms": (activations.ElementwiseNumerical(lambda x: jnp.where(x > 0, x, 0.5 * jnp.expm1(x)), None, 1), 5e-2),
    "large variance": (activations.ElementwiseNumerical(lambda x: jnp.tanh(8 * x), None, 50), 1e-6),
}


@pytest.mark.parametrize("name", RESTS)
@pytest.mark.parametrize("ratio", [None, 2.0, 1.0, -1.0, -0.5])
def test_derivatives_of_what_is_beyond_the_terms(name, ratio, x64):
    """Of parallel inputs too, when their lengths change: there it counts most."""
    dual, tolerance = RESTS[name]
    x1, x2 = inputs((3, 2), 2, 2, "float64")
    x2 = x2 if ratio is None else ratio * x1
    kernels, (program, *_) = kernels_of(nonlinear(dual)(spec_of(x1, x2)), x1, x2)

    def total(scale):
        return sum(jnp.sum(x) for k in kernels(program, scale * x1, jnp.asarray(x2)) for x in k[:2])

    step = 1e-4
    expected = (total(1 + step) - total(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(1.0), expected, rtol=tolerance)


# Where variances differ, the covariance after a cube is small beside them, and so is what is left of its digits.
STEEP = {"rectified cube": 3e-5}


@pytest.mark.parametrize("name", ["relu", *NONLINEARITIES, "selu", "few terms", "elu", "large variance"])
@pytest.mark.parametrize("kind", ["zeros", "equal", "opposite"])
def test_nonlinearities_of_degenerate_inputs(name, kind):
    """In single precision as in double, and finite."""
    dual, tolerance = RESTS.get(name, (NONLINEARITIES.get(name, RELU.activation), STEEP.get(name, 1e-6)))
    x1, x2 = inputs((3, 2), 2, 2, "float64")
    x1[0] = 0 if kind == "zeros" else x1[0]
    x2 = {"zeros": x2, "equal": x1, "opposite": -x1}[kind]

    def gradients(dtype):
        def total(*x):
            kernel = run(nonlinear(dual)(spec_of(x1, x2)), *x, NTK, "cpu")
            return jnp.sum(kernel.nngp) + jnp.sum(kernel.ntk)

        return jax.grad(total, (0, 1))(*(jnp.asarray(x, dtype) for x in (x1, x2)))

    found = gradients("float32")
    with jax.enable_x64(True):
        expected = gradients("float64")
    for x, y in zip(found, expected, strict=True):
        assert np.all(np.isfinite(x)) and np.all(np.isfinite(y))
        np.testing.assert_allclose(x, y, rtol=0, atol=min(20 * tolerance, 0.05) * np.abs(y).max())


@pytest.mark.parametrize("name", ["step", "exp normalized", "rectified square"])
def test_coefficients_at_zero_variance(name, x64):
    """Where they have other formulas: as of xla."""
    x1, x2 = inputs((3, 2), 2, 2, "float64")
    x1[0] = x2[1] = 0
    layers = [conv(b_var=None), steps.Dual(NONLINEARITIES[name]), steps.Flatten(), dense()]

    def gradients(implementation):
        kernels, point = kernels_of(chain(spec_of(x1, x2), layers), x1, x2, NTK, implementation)
        return jax.tree.leaves(jax.grad(lambda *x: dot(kernels(*x), weights), argnums=(0, 1, 2))(*point))

    weights = random_like([(jnp.zeros((2, 2)), jnp.zeros((2, 2)), None, None)])
    for actual, expected in zip(gradients("cpu"), gradients("xla"), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11 * max(1, np.abs(expected).max()))


def test_a_bound_at_zero(x64):
    """As of ReLU6: the derivative in a bound that is to be at most 0 is that from below."""
    x1, x2 = inputs((3, 2), 2, 2, "float64")

    def total(low, x):
        dual = steps.Dual(activations.Clip(1.0, low, 1.5, 0.0))
        layers = [conv(), dual, conv(), dual, steps.GlobalPool(MEAN)]
        return jnp.sum(run(chain(spec_of(x1, x2), layers), x, x2, NTK, "cpu").ntk)

    of_low, of_x = jax.grad(total, (0, 1))(0.0, x1)
    step = 1e-5
    from_below = (1.5 * total(0.0, x1) - 2 * total(-step, x1) + 0.5 * total(-2 * step, x1)) / step
    np.testing.assert_allclose(of_low, from_below, rtol=1e-6)
    difference = (total(0.0, x1 + step * x1) - total(0.0, x1 - step * x1)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(of_x, x1), difference, rtol=1e-7)


def test_clip_is_linear_at_zero_variance(x64):
    """An image that is zero has derivatives, which those of xla leave out."""
    x1, x2 = inputs((3, 2), 2, 2, "float64")
    direction = np.stack([x1[0], 0 * x1[1]])
    x1[0] = 0
    program = nonlinear(NONLINEARITIES["clip"])(spec_of(x1, x2))

    def total(step):
        return jnp.sum(run(program, x1 + step * direction, x2, NTK, "cpu").ntk)

    np.testing.assert_allclose(jax.grad(total)(0.0), (total(1e-6) - total(-1e-6)) / 2e-6, rtol=1e-6)


def test_powers_that_a_polynomial_lacks_may_be_infinite():
    """Each polynomial has cotangents of the coefficients of all degrees."""
    x1, x2 = inputs((3, 2), 2, 2, "float32")
    layers = [conv(), steps.Dual(activations.Polynomial((0.0, 1.0, 1.0))), steps.GlobalPool(MEAN)]

    def total(x):
        return jnp.sum(run(chain(spec_of(x1, x2), layers), x, x2, NTK, "cpu").ntk)

    large = jnp.asarray(1000 * x1)
    _, tangent = jax.jvp(total, (large,), (jnp.asarray(x1),))
    np.testing.assert_allclose(tangent, jnp.vdot(jax.grad(total)(large), x1), rtol=1e-3)
    assert np.isfinite(tangent)


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", NETWORKS)
def test_against_finite_differences(name, x64):
    """In the inputs and in all coefficients."""
    space, make = NETWORKS[name]
    x1, x2 = (x.reshape(len(x), *space, -1) for x in inputs(space, 3, 2, "float64"))
    check_direction(*kernels_of(make(spec_of(x1, x2)), x1, x2))
    check_direction(*kernels_of(make(spec_of(x1, x1)), x1, None))


FULL_LANES = NETWORKS | {
    "gelu": ((4, 3), nonlinear(activations.Gelu())),
    "erf, in every lane": ((4, 3), nonlinear(NONLINEARITIES["erf"])),
    "masks": ((6, 6), lambda spec: masked(spec, *(mask + 0.1 for mask in masks((6, 6), 2, 16)))),  # no kinks
}


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", FULL_LANES)
def test_rows_of_full_lanes(name, x64):
    """With ReLU and GELU all lanes read one number of a first sample on the way back; forward, pairs are packed."""
    space, make = FULL_LANES[name]
    x1, x2 = (x.reshape(len(x), *space, -1) for x in inputs(space, 2, 16, "float64"))
    check_direction(*kernels_of(make(spec_of(x1, x2)), x1, x2))


@pytest.mark.parametrize("name", ["neighbours", "pool", "residual", "two outputs"])
@pytest.mark.parametrize("n2", [2, 16, None])
def test_cotangents_that_nobody_wants(name, n2, x64):
    """They are left out, and the others are the same: in packed pairs, in full lanes, and of a batch with itself."""
    space, make = NETWORKS[name]
    x1, x2 = (x.reshape(len(x), *space, -1) for x in inputs(space, 3, n2 or 2, "float64"))
    kernels, point = kernels_of(make(spec_of(x1, x2 if n2 else x1)), x1, x2 if n2 else None)
    weights = random_like(jax.eval_shape(kernels, *point))

    def gradients(*argnums):
        return jax.jit(jax.grad(lambda *point: dot(kernels(*point), weights), argnums))(*point)

    def results_left_out(*argnums):
        gradient = jax.grad(lambda *point: dot(kernels(*point), weights), argnums)
        return jax.jit(gradient).lower(*point).as_text().count("tensor<0xf64>") > 0

    everything = tuple(range(len(point)))
    assert results_left_out(1) and not results_left_out(*everything)
    expected = gradients(*everything)
    for argnums in [(k,) for k in everything] + [everything[1:]]:
        for actual, k in zip(gradients(*argnums), argnums, strict=True):
            for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected[k]), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14 * np.abs(b).max())


@pytest.mark.parametrize("seed", range(10))
def test_random_graphs_of_convolutions(seed, x64):
    x1, x2 = inputs((5, 4), 2, 1, "float64")
    check_direction(*kernels_of(random_graph(spec_of(x1, x2), seed), x1, x2))


def test_masks_and_their_numbers(x64):
    """The numbers of each sample and position are differentiated in, too; at 0 there is a kink."""
    (x1, x2), both = inputs((6, 6), 3, 2, "float64"), masks((6, 6), 3, 2)
    both = [mask + 0.1 for mask in both]
    check_direction(*kernels_of(masked(spec_of(x1, x2), *both), x1, x2))
    check_direction(*kernels_of(masked(spec_of(x1, x1), both[0], None), x1, None))


def test_covariances_of_each_batch(x64):
    """They are calls of their own, of each batch with itself."""
    x1, x2 = inputs((4, 3), 3, 2, "float64")
    program = chain(spec_of(x1, x2), [conv(), RELU, steps.GlobalPool(MEAN), dense()])
    check_direction(*kernels_of(program, x1, x2, Request(ntk=True, covariances=True)))


def test_without_a_tangent_kernel(x64):
    x1, x2 = inputs((6, 6), 3, 2, "float64")
    program = chain(spec_of(x1, x2), [conv(), RELU, pool(), conv(), RELU, steps.GlobalPool(MEAN)])
    check_direction(*kernels_of(program, x1, x2, Request(ntk=False, covariances=False)))


def test_subgradients_are_those_of_xla(x64):
    """Where inputs coincide, are parallel, antiparallel or zero; and everywhere else, entry by entry."""
    (x, other), _ = inputs((3, 3), 2, 1, "float64")
    x1, x2 = np.stack([x, x, 0 * x]), np.stack([x, 2 * x, -x, 0 * x, other])
    x2[-1, 0] = 0
    layers = [conv(b_var=None), RELU, pool((2, 2), (1, 1)), conv(b_var=None), ABS, steps.Flatten(), dense(), RELU]

    def gradients(implementation):
        kernels, point = kernels_of(chain(spec_of(x1, x2), layers), x1, x2, NTK, implementation)
        return jax.jit(jax.grad(lambda *point: dot(kernels(*point), weights), argnums=(0, 1, 2)))(*point)

    weights = random_like([(jnp.zeros((3, 5)), jnp.zeros((3, 5)), None, None)])
    for n, (actual, expected) in enumerate(zip(*(jax.tree.leaves(gradients(i)) for i in ("cpu", "xla")), strict=True)):
        assert np.isfinite(actual).all()
        # Roundings of antiparallel inputs are those of a square root: most in the slopes of the first nonlinearity, of
        # which the second, coefficient 2, is that of positive inputs.
        tolerance = 3e-7 if n == 2 else 1e-7
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_gradient_of_a_gradient(x64):
    """That of xla, of what the native gradient is. Forward over reverse is in test_core_derivatives.py."""
    x1, x2 = inputs((3, 2), 2, 1, "float64")
    kernels, point = kernels_of(chain(spec_of(x1, x2), [conv(), RELU, steps.Flatten()]), x1, x2)
    direction = random_like(point)

    @jax.jit
    def along(step):
        gradient = jax.grad(lambda *point: dot(kernels(*point), kernels(*point)), (0, 1, 2))
        return dot(gradient(*moved(point, direction, step)), direction)

    np.testing.assert_allclose(jax.grad(along)(0.0), (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-6)


def gradient(layers, x1, x2, dtype):
    """In all coefficients and the inputs."""
    with jax.enable_x64(dtype == "float64"):
        a, b = x1.astype(dtype), x2.astype(dtype)
        kernels, point = kernels_of(chain(spec_of(a, b), layers), a, b)
        leaves = jax.tree.leaves(jax.grad(lambda *x: jnp.sum(kernels(*x)[0][1]), argnums=(0, 1, 2))(*point))
        return [np.asarray(leaf, np.float64) for leaf in leaves]


def test_float32_keeps_its_digits():
    """Of a pair of nearly equal images, too."""
    layers = [conv(), RELU] * 6 + [pool()] + [conv(), RELU] * 2 + [steps.GlobalPool(MEAN), dense()]
    x1, x2 = (x.astype("float32") for x in inputs((6, 6), 2, 2, "float64"))
    x2[0] = x1[0] + np.float32(0.01) * x2[0]
    expected = gradient(layers, x1, x2, "float64")
    of_coefficients = max(np.abs(leaf) for leaf in expected if leaf.ndim == 0)
    for actual, wanted in zip(gradient(layers, x1, x2, "float32"), expected, strict=True):
        scale = np.abs(wanted).max() if wanted.ndim else of_coefficients
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=5e-5 * scale)


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_nonlinearities_in_float32(name):
    """In the inputs and in all coefficients, those that are 0 included."""
    dual = steps.Dual(NONLINEARITIES[name])
    x1, x2 = inputs((4, 3), 2, 2, "float64")
    layers = [conv(), dual, pool((2, 2), (1, 1)), conv(), dual, steps.GlobalPool(MEAN)]
    expected = gradient(layers, x1, x2, "float64")
    of_coefficients = max(np.abs(leaf) for leaf in expected if leaf.ndim == 0)
    for actual, wanted in zip(gradient(layers, x1, x2, "float32"), expected, strict=True):
        scale = np.abs(wanted).max() if wanted.ndim else of_coefficients
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=max(1e-5, 20 * STEEP.get(name, 0)) * scale)


def test_sums_over_large_images_keep_their_digits():
    """A coefficient has a cotangent from each of 65,536 positions."""
    x1, x2 = (1 + np.float32(0.01) * x for x in inputs((256, 256), 1, 1, "float32"))
    layers = [conv(), RELU, conv(), ABS, steps.Flatten()]
    for actual, wanted in zip(*(gradient(layers, x1, x2, dtype) for dtype in ("float32", "float64")), strict=True):
        if not wanted.ndim and wanted:
            np.testing.assert_allclose(actual, wanted, rtol=1e-5)


POOLED, FLAT = [conv(), RELU, pool(), conv(), RELU, steps.GlobalPool(MEAN)], [conv(), RELU, steps.Flatten()]


@pytest.mark.parametrize("n1, n2", [(33, 35), (32, 48)])
@pytest.mark.parametrize("layers", [POOLED, FLAT])
def test_many_samples(layers, n1, n2):
    """More than one task takes, with pairs that are packed and with rows of them; sums are the same in every run."""
    x1, x2 = inputs((6, 6), n1, n2, "float32")
    weights = np.random.default_rng(1).normal(size=(n1, n2)).astype("float32")

    def gradient(x1, x2, weights):
        def total(x1, x2):
            return jnp.sum(weights * run(chain(spec_of(x1, x2), layers), x1, x2, NTK, "cpu").ntk)

        return jax.grad(total, (0, 1))(x1, x2)

    whole1, whole2 = gradient(x1, x2, weights)
    part, _ = gradient(x1[29:32], x2, weights[29:32])
    np.testing.assert_allclose(whole1[29:32], part, rtol=0, atol=1e-5 * np.abs(part).max())
    _, part = gradient(x1, x2[20:22], weights[:, 20:22])
    np.testing.assert_allclose(whole2[20:22], part, rtol=0, atol=1e-5 * np.abs(part).max())
    again1, again2 = gradient(x1, x2, weights)
    np.testing.assert_array_equal(whole1, again1)
    np.testing.assert_array_equal(whole2, again2)

    def of_itself(x1, x2):
        symmetric = weights[:, :n1] + weights[:, :n1].T
        return jnp.sum(symmetric * run(chain(spec_of(x1, x1), layers), x1, x2, NTK, "cpu").ntk)

    own = jax.grad(of_itself)(jnp.asarray(x1), None)
    first, second = jax.grad(of_itself, (0, 1))(jnp.asarray(x1), jnp.asarray(x1))
    np.testing.assert_allclose(own, first + second, rtol=0, atol=1e-5 * np.abs(own).max())


def test_a_gradient_compiles_nothing_of_xla():
    """No loop over pairs, planes or layers: the program is one custom call."""
    x1, x2 = inputs((6, 6), 3, 2, "float32")
    program = chain(spec_of(x1, x2), POOLED)
    gradient = jax.jit(jax.grad(lambda *x: jnp.sum(run(program, *x, NTK, "cpu").ntk), (0, 1)))
    text = gradient.lower(x1, x2).compile().as_text()
    assert "nt_backward" in text and "nt_tangents" not in text and "nt_propagate" not in text and "while" not in text


REFUSED = {
    "this nonlinearity": [conv(), steps.Dual(activations.ClipGate(1.0, 1.0, 0.5)), steps.Flatten()],
    "outputs with positions": [conv(), RELU],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_why_derivatives_are_those_of_xla(reason):
    x1, x2 = inputs((2, 2), 1, 1, "float32")
    program = chain(spec_of(x1, x2), REFUSED[reason])
    source = Inputs(jnp.asarray(x1), jnp.asarray(x2), program.sources[0])
    derivatives = CpuBackend().derivatives(program, (source,), NTK)
    assert derivatives.startswith("by xla.") and reason in derivatives


def test_other_programs_have_the_derivatives_of_xla():
    x1, x2 = inputs((2, 2), 1, 1, "float32")
    program = chain(spec_of(x1, x2), REFUSED["outputs with positions"])

    def gradient(implementation):
        return jax.grad(lambda x: jnp.sum(run(program, x, x2, NTK, implementation).ntk))(x1)

    np.testing.assert_allclose(gradient("cpu"), gradient("xla"), rtol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_more_samples_than_one_block_holds(symmetric, x64):
    """Blocks of samples are small where images are large: cotangents of both batches are carried back once each."""
    layers = [conv((3,), (1,), dilation=(1,)), RELU] * 4 + [steps.Flatten()]
    random = np.random.default_rng(0)
    x1, x2, direction = (random.normal(size=(n, 4096, 1)) for n in (20, 19, 20))

    def total(x1, x2):
        return jnp.sum(run(chain(spec_of(x1, x1 if x2 is None else x2), layers), x1, x2, NTK, "cpu").ntk)

    second = None if symmetric else x2
    _, product = jax.jvp(lambda x: total(x, second), (x1,), (direction,))
    found = jax.grad(total)(x1, second)
    np.testing.assert_allclose(jnp.sum(found * direction), product, rtol=1e-10)
    if not symmetric:
        parts = sum(jax.grad(total)(x1, part) for part in (x2[:3], x2[3:9], x2[9:]))
        np.testing.assert_allclose(found, parts, rtol=0, atol=1e-11 * np.abs(parts).max())
