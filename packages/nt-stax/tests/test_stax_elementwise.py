"""Nonlinearities: the finite function, and the covariance and tangent kernel that belong to it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax import random
from nt_stax import (
    ABRelu,
    Abs,
    AvgPool,
    Cos,
    Dense,
    Elementwise,
    ElementwiseNumerical,
    Erf,
    Exp,
    ExpNormalized,
    Gabor,
    Gaussian,
    Gelu,
    Hermite,
    LeakyRelu,
    Monomial,
    Polynomial,
    Rbf,
    RectifiedMonomial,
    Relu,
    Sigmoid_like,
    Sign,
    Sin,
    serial,
    unmask_fn,
)
from stax_samples import normal

pytestmark = pytest.mark.unoptimised

# name -> (layer, name of the underlying layer, the function in NumPy)
LAYERS = {
    "ABRelu": (lambda: ABRelu(-0.3, 1.2), "ABRelu", lambda x: np.where(x < 0, -0.3 * x, 1.2 * x)),
    "Relu": (Relu, "ABRelu", lambda x: np.where(x < 0, 0, x)),
    "LeakyRelu": (lambda: LeakyRelu(0.2), "ABRelu", lambda x: np.where(x < 0, 0.2 * x, x)),
    "Abs": (Abs, "ABRelu", np.abs),
    "Erf": (lambda: Erf(0.7, 1.3, 0.4), "Erf", lambda x: 0.7 * scipy.special.erf(1.3 * x) + 0.4),
    "Sin": (lambda: Sin(0.7, 1.3, 0.4), "Sin", lambda x: 0.7 * np.sin(1.3 * x + 0.4)),
    "Cos": (lambda: Cos(0.7, 1.3, 0.4), "Sin", lambda x: 0.7 * np.cos(1.3 * x + 0.4)),
    "Rbf": (lambda: Rbf(0.8), "Rbf", lambda x: 2**0.5 * np.sin(1.6**0.5 * x + np.pi / 4)),
    "Gelu": (Gelu, "Gelu", lambda x: x * scipy.special.ndtr(x)),
    "Exp": (lambda: Exp(0.7, 0.6), "Exp", lambda x: 0.7 * np.exp(0.6 * x)),
    "Sigmoid_like": (Sigmoid_like, "Erf", lambda x: 0.5 + 0.5 * scipy.special.erf(x / 2.4020563531719796)),
    "Gaussian": (lambda: Gaussian(0.7, -0.6), "Gaussian", lambda x: 0.7 * np.exp(-0.6 * x * x)),
    "Gabor": (Gabor, "Gabor", lambda x: np.exp(-x * x) * np.sin(x)),
    "Sign": (Sign, "Sign", np.sign),
    "Monomial": (lambda: Monomial(3), "Monomial", lambda x: x**3),
    "RectifiedMonomial": (lambda: RectifiedMonomial(2), "RectifiedMonomial", lambda x: np.where(x < 0, 0, x**2)),
    "step": (lambda: RectifiedMonomial(0), "RectifiedMonomial", lambda x: np.where(x < 0, 0, 1)),
    "Polynomial": (lambda: Polynomial([0.5, -1, 0.2]), "Polynomial", lambda x: 0.5 - x + 0.2 * x**2),
}
# of the same functions
DERIVATIVES = {
    "ABRelu": lambda x: np.where(x < 0, -0.3, 1.2),
    "Relu": lambda x: np.where(x < 0, 0.0, 1.0),
    "LeakyRelu": lambda x: np.where(x < 0, 0.2, 1.0),
    "Abs": np.sign,
    "Erf": lambda x: 0.7 * 1.3 * 2 / np.pi**0.5 * np.exp(-((1.3 * x) ** 2)),
    "Sin": lambda x: 0.7 * 1.3 * np.cos(1.3 * x + 0.4),
    "Cos": lambda x: -0.7 * 1.3 * np.sin(1.3 * x + 0.4),
    "Rbf": lambda x: 3.2**0.5 * np.cos(1.6**0.5 * x + np.pi / 4),
    "Gelu": lambda x: scipy.special.ndtr(x) + x * np.exp(-x * x / 2) / (2 * np.pi) ** 0.5,
    "Exp": lambda x: 0.7 * 0.6 * np.exp(0.6 * x),
    "Sigmoid_like": lambda x: 1 / 2.4020563531719796 / np.pi**0.5 * np.exp(-((x / 2.4020563531719796) ** 2)),
    "Gaussian": lambda x: -0.84 * x * np.exp(-0.6 * x * x),
    "Gabor": lambda x: np.exp(-x * x) * (np.cos(x) - 2 * x * np.sin(x)),
    "Sign": np.zeros_like,
    "Monomial": lambda x: 3 * x**2,
    "RectifiedMonomial": lambda x: np.where(x < 0, 0, 2 * x),
    "step": np.zeros_like,
    "Polynomial": lambda x: -1 + 0.4 * x,
}
KINKED = ("ABRelu", "Relu", "LeakyRelu", "Abs")
TOLERANCE = {"float64": 1e-9, "float32": 2e-5}


def expectation(f, g, var1, var2, cov):
    """`E f(u) g(v)` for Gaussian `u, v`, by quadrature in polar coordinates, cut at the lines where u or v is zero."""
    rho = np.clip(cov / np.sqrt(var1 * var2), -1, 1)
    # u = s1 r cos(t), v = s2 r cos(t - t0), with r from the Rayleigh distribution.
    t0 = np.arccos(rho)
    cuts = np.sort(np.mod([np.pi / 2, 3 * np.pi / 2, t0 + np.pi / 2, t0 + 3 * np.pi / 2], 2 * np.pi))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    total = 0.0
    edge = np.sqrt(2 * 45.0)
    radii = np.linspace(0, edge, 13)
    for start, stop in itertools.pairwise([*cuts, cuts[0] + 2 * np.pi]):
        t = (start + stop) / 2 + (stop - start) / 2 * nodes
        wt = (stop - start) / 2 * weights / (2 * np.pi)
        for low, high in itertools.pairwise(radii):
            r = (low + high) / 2 + (high - low) / 2 * nodes
            wr = (high - low) / 2 * weights * r * np.exp(-(r**2) / 2)
            u = np.sqrt(var1) * r[:, None] * np.cos(t)
            v = np.sqrt(var2) * r[:, None] * np.cos(t - t0)
            total += wr @ (f(u) * g(v)) @ wt
    return total


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", LAYERS)
def test_finite_function(name, dtype):
    layer, underlying, f = LAYERS[name]
    init_fn, apply_fn, kernel_fn = layer()
    assert [fn.__name__ for fn in (init_fn, apply_fn, kernel_fn)] == [underlying] * 3
    assert init_fn(random.key(0), (-1, 4, 3)) == ((-1, 4, 3), ())
    x = np.linspace(-3, 3, 24).reshape(2, 4, 3).astype(dtype)
    y = jax.jit(apply_fn)((), x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, f(x), rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(apply_fn((), x, rng=None, batch_axis=0, anything="else"), apply_fn((), x))
    np.testing.assert_allclose(jax.vmap(lambda row: apply_fn((), row))(x), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_kernel_is_expectation_of_finite_function(name, dtype):
    """K' = E f(u) f(v), and T' = T E f'(u) f'(v), where a Dense layer has T = K."""
    layer, _, f = LAYERS[name]
    df = DERIVATIVES[name]
    W_std, b_std = 1.3, 0.4
    x1 = np.array([[0.3, -1.0, 0.5], [1.0, 2.0, -1.0], [0.0, 0.1, 0.0], [-0.3, 1.0, -0.5]])
    x2 = np.array([[0.3, -1.0, 0.5], [0.3, -1.0, 0.501], [-2.0, 1.0, 1.0]])
    _, _, kernel_fn = serial(Dense(7, W_std, b_std), layer())
    kernel = kernel_fn(x1.astype(dtype), x2.astype(dtype))
    assert not kernel.is_gaussian

    def q(a, b):
        return W_std**2 * np.sum(a * b) / 3 + b_std**2

    for i, j in itertools.product(range(4), range(3)):
        moments = q(x1[i], x1[i]), q(x2[j], x2[j]), q(x1[i], x2[j])
        nngp = expectation(f, f, *moments)
        ntk = moments[2] * expectation(df, df, *moments)
        np.testing.assert_allclose(kernel.nngp[i, j], nngp, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        # The angle of nearly equal float32 inputs is known to a square root of their rounding error.
        close = dtype == "float32" and name in KINKED and i in (0, 3) and j == 1
        tolerance = 1e-4 if close else TOLERANCE[dtype]
        np.testing.assert_allclose(kernel.ntk[i, j], ntk, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(kernel.cov1[i], expectation(f, f, *[q(x1[i], x1[i])] * 3), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["LeakyRelu", "Sin", "Exp"])
@pytest.mark.parametrize("diagonal_batch", [True, False])
@pytest.mark.parametrize("diagonal_spatial", [True, False])
def test_positions_are_treated_as_samples(name, diagonal_batch, diagonal_spatial, x64):
    """The same function is applied to every pair of positions of every pair of samples, in every layout."""
    _, _, kernel_fn = serial(Dense(7, 1.3, 0.4), LAYERS[name][0]())
    x1, x2 = normal(1, (2, 2, 3, 5)), normal(2, (1, 2, 3, 5))
    kernel = kernel_fn(x1, x2, diagonal_batch=diagonal_batch, diagonal_spatial=diagonal_spatial)
    positions = kernel_fn(x1.reshape(-1, 5), x2.reshape(-1, 5), diagonal_batch=False)
    shapes = {"nngp": (2, 1), "ntk": (2, 1), "cov1": (2, 2), "cov2": (1, 1)}
    for field, (n1, n2) in shapes.items():
        expected = getattr(positions, field).reshape(n1, 2, 3, n2, 2, 3)
        same_sample = diagonal_batch and field.startswith("cov")
        letters = "ihwjHW->ij"
        if same_sample:
            letters = letters.replace("j", "i").replace("->ii", "->i")
        letters = letters.replace("H", "h").replace("W", "w") + "hw" if diagonal_spatial else letters + "hHwW"
        np.testing.assert_allclose(
            getattr(kernel, field), np.einsum(letters, expected), rtol=1e-12, atol=1e-12, err_msg=field
        )


def test_sign_of_all_pairs_of_one_batch(x64):
    """Covariances between different samples, and after a pool, are no variances: only those are 1."""
    x = normal(1, (3, 4, 5))
    network = serial(Dense(7, 1.3), Sign(), AvgPool((2,)), Dense(7), Sign())
    kernel = network[2](x, x + 0, diagonal_batch=False, diagonal_spatial=False)
    np.testing.assert_allclose(kernel.cov1, kernel.nngp, atol=1e-7)


@pytest.mark.parametrize("name", LAYERS)
def test_input_must_be_gaussian(name):
    layer = LAYERS[name][0]
    with pytest.raises(ValueError, match=r"must be Gaussian.*Dense or Conv"):
        layer()[2](jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="must be Gaussian"):
        serial(Dense(4), layer(), layer())[2](jnp.ones((2, 3)))


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", LAYERS)
def test_masked_positions_are_zero(name, x64):
    """Also where f(0) is not zero; the other positions do not notice."""
    init_fn, apply_fn, kernel_fn = serial(Dense(6, 1.3), LAYERS[name][0]())
    x1, x2 = normal(1, (2, 4, 3)), normal(2, (3, 4, 3))
    masked = np.zeros((2, 4), bool)
    masked[0, 1] = masked[1, 2:] = True
    x1 = jnp.where(masked[..., None], 100.0, x1)
    kernel = kernel_fn(x1, x2, mask_constant=100.0)
    plain = kernel_fn(jnp.where(masked[..., None], 0.0, x1), x2)
    for field in ("nngp", "ntk"):
        expected = np.where(masked[:, None, :, None], 0, getattr(plain, field))
        np.testing.assert_array_equal(np.asarray(getattr(kernel, field)) == 0, expected == 0)
        np.testing.assert_allclose(getattr(kernel, field), expected, rtol=1e-12, atol=1e-13)
    either = masked[:, :, None] | masked[:, None, :]
    np.testing.assert_allclose(kernel.cov1, np.where(either, 0, plain.cov1), rtol=1e-12, atol=1e-13)
    _, params = init_fn(random.key(3), x1.shape)
    outputs = unmask_fn(apply_fn)(params, x1, mask_constant=100.0)
    expected = np.where(masked[..., None], 0, apply_fn(params, jnp.where(masked[..., None], 0.0, x1)))
    np.testing.assert_allclose(outputs, expected, rtol=1e-12)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["Relu", "Erf", "Sign"])
def test_derivatives_are_finite_where_they_are_delicate(name, x64):
    """At equal inputs, opposite inputs and zero inputs, with and without a bias. (nt-core tests all activations so.)"""
    x = jnp.array([[0.3, -1.0], [0.3, -1.0], [-0.3, 1.0], [0.0, 0.0]])

    def total(x1, x2):
        kernels = (serial(Dense(6, 1.3, b_std), LAYERS[name][0](), Dense(1))[2](x1, x2) for b_std in (None, 0.5))
        return sum(jnp.sum(kernel.nngp) + jnp.sum(kernel.ntk) for kernel in kernels)

    assert np.isfinite(total(x, x))
    derivatives = [jax.grad(total), jax.jacfwd(total)] + [jax.hessian(total)] * (name == "Relu")
    for derivative in derivatives:
        assert np.all(np.isfinite(derivative(x, x)))


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    "layer",
    [
        LeakyRelu,
        lambda p: Erf(p, p, p),
        lambda p: Sin(p, p, p),
        Rbf,
        lambda p: Exp(p, p),
        lambda p: Gaussian(p, -p),
        lambda p: Polynomial([p, p]),
    ],
)
@pytest.mark.parametrize("get", ["nngp", "ntk"])
def test_derivative_with_respect_to_coefficients(layer, get, x64):
    x1, x2 = normal(1, (2, 3)), normal(2, (3, 3))

    def value(p):
        return jnp.sum(serial(Dense(4, 1.1), layer(p))[2](x1, x2, get) ** 2)

    step = 1e-5
    difference = (value(0.4 + step) - value(0.4 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(value)(0.4), difference, rtol=1e-7)

    def outputs(p):
        return jnp.sum(layer(p)[1]((), x1) ** 2)

    difference = (outputs(0.4 + step) - outputs(0.4 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(outputs)(0.4), difference, rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("do_stabilize", [True, False])
def test_relu_needs_no_stabilization(scale, do_stabilize):
    """The kernel of inputs of any size is that of inputs of size 1, scaled: in float32, variances of 1e-30 and 1e30."""
    x1, x2 = normal(1, (3, 8)), normal(2, (4, 8))
    for layer in (Relu(do_stabilize), LeakyRelu(0.1, do_stabilize), Abs(do_stabilize), ABRelu(0.1, 2.0, do_stabilize)):
        _, _, kernel_fn = serial(Dense(4), layer)
        for get in ("nngp", "ntk"):
            expected = kernel_fn(x1, x2, get)
            actual = kernel_fn(scale * x1, scale * x2, get) / scale / scale
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_gelu_approximation_is_of_the_finite_network_alone(x64):
    x = jnp.linspace(-3, 3, 12).reshape(4, 3)
    exact, approximate = (serial(Dense(4), Gelu(approximate=a))[2](x, None, "nngp") for a in (False, True))
    np.testing.assert_array_equal(exact, approximate)
    difference = np.abs(Gelu(approximate=True)[1]((), x) - Gelu()[1]((), x)).max()
    assert 1e-6 < difference < 1e-3


class TestExpNormalized:
    """A kernel without a finite network."""

    @pytest.mark.parametrize("do_clip", [True, False])
    def test_kernel(self, do_clip, dtype):
        x1, x2 = (normal(i, (n, 5), dtype) for i, n in ((1, 3), (2, 4)))
        x2 = x2.at[0].set(2 * x1[0]).at[1].set(-x1[1])
        kernel = serial(Dense(4, 1.2), ExpNormalized(0.7, -0.4, do_clip))[2](x1, x2)
        q1, q2 = (1.44 * jnp.mean(x**2, axis=1) for x in (x1, x2))
        scale = jnp.sqrt(jnp.outer(q1, q2))
        covariance = 1.44 * x1 @ x2.T / 5
        value = jnp.exp(0.7 * (covariance / scale - 0.4))
        rtol = {"float64": 1e-12, "float32": 5e-6}[dtype]
        np.testing.assert_allclose(kernel.nngp, scale * value, rtol=rtol)
        np.testing.assert_allclose(kernel.ntk, covariance * 0.7 * value, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(kernel.cov1, q1 * np.exp(0.42), rtol=rtol)

    def test_no_finite_network(self):
        init_fn, apply_fn, kernel_fn = ExpNormalized()
        assert [fn.__name__ for fn in (init_fn, apply_fn, kernel_fn)] == ["ExpNormalized"] * 3
        with pytest.raises(NotImplementedError, match="no finite network"):
            apply_fn((), jnp.ones((2, 3)))

    def test_zero_inputs(self, dtype):
        """Have no covariance with anything, and finite derivatives."""
        _, _, kernel_fn = serial(Dense(4), ExpNormalized(), Dense(1))
        x = jnp.array([[0.0, 0.0], [1.0, -1.0]], dtype)
        np.testing.assert_array_equal(kernel_fn(x, None, "nngp"), [[0, 0], [0, 1]])
        assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(kernel_fn(x, None, "ntk")))(x)))


def hermite(degree):
    with pytest.warns(UserWarning, match="variance 1") as record:
        layer = Hermite(degree)
    assert record[0].filename == __file__
    return layer


class TestPolynomials:
    @pytest.mark.parametrize("degree", [0, 1, 4])
    def test_hermite(self, degree, x64):
        """The finite function is that of SciPy; the kernel that of its coefficients, for inputs of variance 1."""
        scale = scipy.special.factorial(degree) ** -0.5
        x = np.linspace(-3, 3, 12).reshape(4, 3)
        layer = hermite(degree)
        assert layer[2].__name__ == "Hermite"
        np.testing.assert_allclose(layer[1]((), x), scale * scipy.special.eval_hermitenorm(degree, x), rtol=1e-12)
        inputs = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True))
        coefficients = scale * np.polynomial.hermite_e.herme2poly([0] * degree + [1])
        expected, found = (serial(Dense(4), f)[2](inputs) for f in (Polynomial(coefficients), layer))
        for field in ("nngp", "ntk", "cov1"):
            np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("degree", [0, 1, 5, 8, 9])
    def test_monomial_is_a_polynomial(self, degree, x64):
        """Also above the degree that the native engine takes."""
        x = 0.7 * normal(1, (3, 4))
        monomial, polynomial = (
            serial(Dense(4, 1.1, 0.2), f)[2](x) for f in (Monomial(degree), Polynomial([0] * degree + [1]))
        )
        for field in ("nngp", "ntk", "cov1"):
            np.testing.assert_allclose(getattr(monomial, field), getattr(polynomial, field), rtol=1e-11)

    def test_no_coefficients(self, dtype):
        _, apply_fn, _ = Polynomial([])
        x = jnp.ones((2, 3), dtype)
        np.testing.assert_array_equal(apply_fn((), x), np.zeros_like(x))
        kernel = serial(Dense(4), Polynomial([]))[2](x, x)
        for field in ("nngp", "ntk", "cov1", "cov2"):
            np.testing.assert_array_equal(getattr(kernel, field), np.zeros_like(getattr(kernel, field)))

    def test_rectified_monomials_are_finite_where_the_angle_is_zero(self, dtype):
        """At equal, parallel, opposite and zero inputs: E f(u) f(v) of multiples of one variable."""
        x = np.array([[1.0], [2.0], [-1.0], [0.0]], dtype)
        for degree, moments in ((0, [0.5, 0.5]), (1, [0.5, 0.5]), (3, [7.5, 13.5])):
            kernel = serial(Dense(4), RectifiedMonomial(degree))[2](x)
            expected = moments[0] * np.outer(x, x) ** degree * (np.outer(x, x) > 0)
            if degree == 0:
                expected += 0.5 * (x == 0) + 0.5 * (x == 0).T  # f(0) = 1, and E f(v) = 1/2
            np.testing.assert_allclose(kernel.nngp, expected, rtol=1e-5, atol=1e-3 if degree == 0 else 1e-6)
            assert np.all(np.isfinite(kernel.ntk))

    @pytest.mark.parametrize("layer", [Monomial, RectifiedMonomial])
    def test_whole_degrees_of_any_type(self, layer):
        x = np.array([[1.0], [2.0], [-1.0]], "float32")
        kernels = [serial(Dense(4), layer(degree))[2](x, None, "ntk") for degree in (2, 2.0, np.int64(2))]
        for kernel in kernels[1:]:
            np.testing.assert_array_equal(kernel, kernels[0])

    @pytest.mark.parametrize("layer", [Monomial, RectifiedMonomial, Hermite])
    def test_degree(self, layer):
        for degree in (-1, 1.5, float("nan"), float("inf")):
            message = f"{layer.__name__} needs a degree of at least 0, a whole number, got degree={degree}"
            with pytest.raises(NotImplementedError, match=message):
                layer(degree)


class TestElementwise:
    """A nonlinearity given by its covariance."""

    def square(self, **kwargs):
        return Elementwise(fn=lambda x: x**2, nngp_fn=lambda cov12, var1, var2: var1 * var2 + 2 * cov12**2, **kwargs)

    def test_kernel(self, dtype):
        x1, x2 = (normal(i, (n, 5), dtype) for i, n in ((1, 3), (2, 4)))
        square = self.square(d_nngp_fn=lambda cov12, var1, var2: 4 * cov12)
        kernel = serial(Dense(4, 1.2, 0.3), square)[2](x1, x2)
        k, q1, q2 = (1.44 * a @ b.T / 5 + 0.09 for a, b in ((x1, x2), (x1, x1), (x2, x2)))
        tolerance = {"float64": 1e-12, "float32": 5e-6}[dtype]
        expected = jnp.outer(jnp.diag(q1), jnp.diag(q2)) + 2 * k**2
        np.testing.assert_allclose(kernel.nngp, expected, rtol=tolerance)
        np.testing.assert_allclose(kernel.ntk, 4 * k * k, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(kernel.cov1, 3 * jnp.diag(q1) ** 2, rtol=tolerance)

    def test_derivative_is_found_with_a_warning(self, x64):
        x = normal(1, (3, 5))
        with pytest.warns(UserWarning, match="d_nngp_fn") as record:
            found = self.square()
        assert record[0].filename == __file__
        given = self.square(d_nngp_fn=lambda cov12, var1, var2: 4 * cov12)
        ntk_found, ntk_given = (serial(Dense(4), layer)[2](x, None, "ntk") for layer in (found, given))
        np.testing.assert_allclose(ntk_found, ntk_given, rtol=1e-12)

    def test_finite_function_takes_numbers(self):
        clip = Elementwise(fn=lambda x: jax.lax.cond(x > 0, lambda: x, lambda: 0.0))
        np.testing.assert_array_equal(clip[1]((), jnp.array([[-1.0, 2.0]])), [[0.0, 2.0]])

    def test_function_alone(self, x64):
        """Any function of numbers has a kernel: `lax.cond` keeps it from being one of arrays."""
        x, smooth = normal(1, (3, 5)), lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.sin, x)
        found, expected = (serial(Dense(4), f)[2](x, None, ("nngp", "ntk")) for f in (Elementwise(smooth), Sin()))
        np.testing.assert_allclose(found.nngp, expected.nngp, rtol=1e-10)
        np.testing.assert_allclose(found.ntk, expected.ntk, rtol=1e-10)

    def test_function_alone_with_a_parameter(self, x64):
        """Which is traced, and differentiated."""
        x = normal(1, (3, 5))

        def total(slope, layer):
            return serial(Dense(4), layer(slope))[2](x, None, "ntk").sum()

        found, expected = (
            jax.value_and_grad(total)(0.7, layer)
            for layer in (lambda slope: Elementwise(lambda x: jnp.sin(slope * x)), lambda slope: Sin(b=slope))
        )
        np.testing.assert_allclose(found, expected, rtol=1e-8)

    def test_missing_functions(self):
        with pytest.raises(ValueError, match=r"fn.*nngp_fn.*neither"):
            Elementwise()
        _, apply_fn, _ = Elementwise(nngp_fn=lambda c, a, b: c, d_nngp_fn=lambda c, a, b: 1.0)
        with pytest.raises(NotImplementedError, match="fn"):
            apply_fn((), jnp.ones((2, 3)))


class TestElementwiseNumerical:
    """A nonlinearity given as a function, its covariance by quadrature."""

    @pytest.mark.parametrize("name", ["Erf", "Sin", "Gelu", "Exp", "Rbf"])
    def test_agrees_with_closed_form(self, name, x64):
        layer = LAYERS[name][0]()
        x1, x2 = 0.5 * normal(1, (3, 4)), 0.5 * normal(2, (2, 4))  # small enough for 60 nodes
        with pytest.warns(UserWarning, match="df"):
            numerical = ElementwiseNumerical(lambda x: layer[1]((), x), deg=60)
        for b_std in (None, 0.5):
            expected, found = (serial(Dense(4, 0.9, b_std), f)[2](x1, x2) for f in (layer, numerical))
            for field in ("nngp", "ntk", "cov1", "cov2"):
                np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(numerical[1]((), x1), layer[1]((), x1))

    def test_derivative_may_be_given(self, x64, recwarn):
        x = normal(1, (3, 4))
        numerical = ElementwiseNumerical(jnp.sin, deg=30, df=jnp.cos)
        assert not recwarn.list
        expected, found = (serial(Dense(4), f)[2](x, None, "ntk") for f in (Sin(), numerical))
        np.testing.assert_allclose(found, expected, rtol=1e-10)

    def test_zero_variance(self, dtype):
        """Without a bias, zero inputs have zero variance: their covariance with anything is f(0) E f(v)."""
        cube = ElementwiseNumerical(lambda x: x**2 + 2, deg=5, df=lambda x: 2 * x)
        x = jnp.array([[0.0, 0.0], [1.0, -1.0]], dtype)
        kernel = serial(Dense(4), cube)[2](x)
        np.testing.assert_allclose(kernel.nngp, [[4.0, 6.0], [6.0, 11.0]], rtol=1e-5)
        np.testing.assert_allclose(kernel.ntk, [[0.0, 0.0], [0.0, 4.0]], atol=1e-5)

    def test_degree(self):
        with pytest.raises(ValueError, match="deg=0"):
            ElementwiseNumerical(jnp.sin, deg=0, df=jnp.cos)
