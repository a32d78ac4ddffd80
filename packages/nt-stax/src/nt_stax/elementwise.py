"""Nonlinearities, applied to every entry of Gaussian pre-activations.

Each needs a layer with weights (`Dense`, `Conv`, ...) before it, whose outputs are Gaussian in the infinite-width
limit. With `(u, v)` Gaussian of zero mean and the covariance of the pre-activations, the covariance of the outputs is
`E f(u) f(v)`, and the tangent kernel is multiplied by `E f'(u) f'(v)`: see `nt_core.activations`.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from nt_core import Bool, Diagonal, activations, layer, step_rule, steps, supports_masking

_REQUIREMENTS = {"diagonal_spatial": Diagonal(input=Bool.YES, output=Bool.NO)}
DEFAULT_DEGREE = 50  # the degree of `ElementwiseNumerical` where nobody asks for another
_TO_CALLER = 4  # `stacklevel` of a warning: out of the constructor, and of the two decorators around it


@layer
@supports_masking(remask_kernel=True)
def ABRelu(a: float, b: float, do_stabilize: bool = False):
    """Piecewise linear nonlinearity `f(x) = a min(x, 0) + b max(x, 0)`, see arXiv:1711.09090.

    Args:
      a: slope at negative inputs.
      b: slope at positive inputs.
      do_stabilize: accepted for compatibility, and needless: covariances are divided by the variances before anything
        that could overflow, so they may be as large and as small as their data type holds.

    >>> from nt_stax import ABRelu, Dense, serial
    >>> _, _, kernel_fn = serial(Dense(512), ABRelu(a=-1.0, b=2.0))
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp"))
    [[2.5]]
    """
    return elementwise(lambda x: a * jnp.minimum(x, 0) + b * jnp.maximum(x, 0), activations.ABRelu(a, b))


def Relu(do_stabilize: bool = False):
    """Rectified linear unit, `f(x) = max(x, 0)`; see `ABRelu`.

    >>> from nt_stax import Dense, Relu, serial
    >>> init_fn, apply_fn, kernel_fn = serial(Dense(512, W_std=2.0**0.5), Relu())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(6))
    [[1.]]
    """
    return ABRelu(0.0, 1.0, do_stabilize)


def LeakyRelu(alpha: float, do_stabilize: bool = False):
    """Leaky rectified linear unit, `f(x) = alpha min(x, 0) + max(x, 0)`; see `ABRelu`.

    >>> from nt_stax import LeakyRelu
    >>> _, apply_fn, _ = LeakyRelu(0.5)
    >>> print(apply_fn((), jnp.array([[-2.0, 2.0]])))
    [[-1.  2.]]
    """
    return ABRelu(alpha, 1.0, do_stabilize)


def Abs(do_stabilize: bool = False):
    """Absolute value, `f(x) = |x|`; see `ABRelu`.

    >>> from nt_stax import Abs, Dense, serial
    >>> _, _, kernel_fn = serial(Dense(512), Abs())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp"))
    [[1.]]
    """
    return ABRelu(-1.0, 1.0, do_stabilize)


@layer
@supports_masking(remask_kernel=True)
def Erf(a: float = 1.0, b: float = 1.0, c: float = 0.0):
    """Error function, `f(x) = a erf(b x) + c`.

    With a variance of 1/2 and `a = b = 1` the covariance of a sample with itself is `(2 / pi) asin(1 / 2) = 1 / 3`:

    >>> from nt_stax import Dense, Erf, serial
    >>> _, _, kernel_fn = serial(Dense(512, W_std=0.5**0.5), Erf())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))
    [[0.3333]]
    """
    return elementwise(lambda x: a * jax.scipy.special.erf(b * x) + c, activations.Erf(a, b, c))


@layer
@supports_masking(remask_kernel=True)
def Sin(a: float = 1.0, b: float = 1.0, c: float = 0.0):
    """Sine, `f(x) = a sin(b x + c)`.

    >>> from nt_stax import Dense, Sin, serial
    >>> _, _, kernel_fn = serial(Dense(512), Sin())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))  # (1 - exp(-2)) / 2
    [[0.4323]]
    """
    return elementwise(lambda x: a * jnp.sin(b * x + c), activations.Sin(a, b, c))


def Cos(a: float = 1.0, b: float = 1.0, c: float = 0.0):
    """Cosine, `f(x) = a cos(b x + c)`; a `Sin` of another phase.

    >>> from nt_stax import Cos, Dense, serial
    >>> _, _, kernel_fn = serial(Dense(512), Cos())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))  # (1 + exp(-2)) / 2
    [[0.5677]]
    """
    return Sin(a, b, c + jnp.pi / 2)


@layer
@supports_masking(remask_kernel=True)
def Rbf(gamma: float = 1.0):
    """Random features of the squared exponential kernel, `f(x) = sqrt(2) sin(sqrt(2 gamma) x + pi / 4)`.

    The covariance of the outputs is `exp(-gamma (q1 + q2 - 2 k))`, with `q1, q2` the variances and `k` the covariance
    of the inputs: after a `Dense` layer without a bias, `exp(-gamma W_std^2 |x1 - x2|^2 / n_channels)`.

    >>> from nt_stax import Dense, Rbf, serial
    >>> _, _, kernel_fn = serial(Dense(512), Rbf(gamma=0.5))
    >>> print(kernel_fn(jnp.ones((1, 2)), jnp.zeros((1, 2)), "nngp").round(4))  # exp(-1 / 2)
    [[0.6065]]
    """
    return elementwise(lambda x: 2**0.5 * jnp.sin((2 * gamma) ** 0.5 * x + jnp.pi / 4), activations.Rbf(gamma))


@layer
@supports_masking(remask_kernel=True)
def Gelu(approximate: bool = False):
    """Gaussian error linear unit, `f(x) = x Phi(x)` with `Phi` the normal distribution function; see arXiv:2002.08517.

    Args:
      approximate: the finite network uses the tanh approximation of `Phi`. The kernel is that of the exact function in
        either case.

    >>> from nt_stax import Gelu
    >>> _, apply_fn, _ = Gelu()
    >>> print(apply_fn((), jnp.array([[1.0]])).round(4))
    [[0.8413]]
    """
    return elementwise(lambda x: jax.nn.gelu(x, approximate=approximate), activations.Gelu())


@layer
@supports_masking(remask_kernel=True)
def Exp(a: float = 1.0, b: float = 1.0):
    """Exponential function, `f(x) = a exp(b x)`.

    >>> from nt_stax import Dense, Exp, serial
    >>> _, _, kernel_fn = serial(Dense(512), Exp(b=0.5))
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))  # exp(1 / 2)
    [[1.6487]]
    """
    return elementwise(lambda x: a * jnp.exp(b * x), activations.Exp(a, b))


def Sigmoid_like():
    """Error function that is close to the sigmoid, `f(x) = (1 + erf(x / 2.4020563531719796)) / 2`; see `Erf`.

    It differs from `1 / (1 + exp(-x))` by at most 0.0093.

    >>> from nt_stax import Sigmoid_like
    >>> _, apply_fn, _ = Sigmoid_like()
    >>> print(apply_fn((), jnp.array([[0.0, 1.0]])).round(3), jax.nn.sigmoid(1.0).round(3))
    [[0.5   0.722]] 0.731
    """
    return Erf(0.5, 1 / 2.4020563531719796, 0.5)


@layer
@supports_masking(remask_kernel=True)
def Gaussian(a: float = 1.0, b: float = -1.0):
    """Gaussian bell, `f(x) = a exp(b x^2)`.

    With a positive `b`, outputs have a variance where `4 b q < 1`, for inputs of variance `q`. Elsewhere kernels are
    NaN.

    >>> from nt_stax import Dense, Gaussian, serial
    >>> _, _, kernel_fn = serial(Dense(512), Gaussian(b=-0.75))
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))  # 1 / sqrt(1 + 3)
    [[0.5]]
    """
    return elementwise(lambda x: a * jnp.exp(b * x**2), activations.Gaussian(a, b))


@layer
@supports_masking(remask_kernel=True)
def Gabor():
    """Gabor function, `f(x) = exp(-x^2) sin(x)`.

    >>> from nt_stax import Dense, Gabor, serial
    >>> _, _, kernel_fn = serial(Dense(512), Gabor())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))  # (1 - exp(-2 / 5)) / (2 sqrt(5))
    [[0.0737]]
    """
    return elementwise(lambda x: jnp.exp(-(x**2)) * jnp.sin(x), activations.Gabor())


@layer
@supports_masking(remask_kernel=True)
def Sign():
    """Sign, -1, 0 or 1. Its derivative is 0 but for the jump: the tangent kernel after it is that of later layers.

    >>> from nt_stax import Dense, Sign, serial
    >>> _, _, kernel_fn = serial(Dense(512), Sign())
    >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> print(kernel_fn(x, None, "nngp").round(4))  # 1 - 2 angle / pi
    [[1.  0.5]
     [0.5 1. ]]
    """
    return elementwise(jnp.sign, activations.Step(-1.0, 1.0, 0.0))


@layer
@supports_masking(remask_kernel=True)
def ExpNormalized(gamma: float = 1.0, shift: float = -1.0, do_clip: bool = False):
    """The normalized exponential kernel, `s exp(gamma (c + shift))`; see p. 6 of arXiv:2003.02237.

    With `s` the product of the standard deviations and `c` the correlation of the inputs. There is no finite network:
    `apply_fn` raises NotImplementedError.

    Args:
      gamma: how fast the covariance decays with the correlation.
      shift: -1 keeps the variances.
      do_clip: accepted for compatibility, and needless: rounded correlations never leave [-1, 1].

    >>> from nt_stax import Dense, ExpNormalized, serial
    >>> _, _, kernel_fn = serial(Dense(512), ExpNormalized())
    >>> print(kernel_fn(jnp.eye(2), None, "nngp").round(4))  # 1/2, and exp(-1) times it
    [[0.5    0.1839]
     [0.1839 0.5   ]]
    """
    return elementwise(_no_exp_normalized, activations.ExpNormalized(gamma, shift))


@layer
@supports_masking(remask_kernel=True)
def Monomial(degree: int):
    """Power, `f(x) = x^degree`.

    Raises:
      NotImplementedError: the degree is negative.

    >>> from nt_stax import Dense, Monomial, serial
    >>> _, _, kernel_fn = serial(Dense(512), Monomial(3))
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp"))
    [[15.]]
    """
    degree = _whole_degree("Monomial", degree)
    return elementwise(lambda x: x**degree, activations.Monomial(degree))


@layer
@supports_masking(remask_kernel=True)
def RectifiedMonomial(degree: int):
    """Power of positive inputs, `f(x) = x^degree` for `x >= 0`, and 0 for `x < 0` (Cho & Saul, 2009).

    Degree 1 is `Relu`, degree 0 a step.

    Raises:
      NotImplementedError: the degree is negative.

    >>> from nt_stax import Dense, RectifiedMonomial, serial
    >>> _, _, kernel_fn = serial(Dense(512), RectifiedMonomial(2))
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp"))  # half of that of Monomial(2)
    [[1.5]]
    """
    degree = _whole_degree("RectifiedMonomial", degree)
    activation = {0: activations.Step(0.0, 1.0, 1.0), 1: activations.ABRelu(0.0, 1.0)}.get(degree)
    activation = activation or activations.RectifiedMonomial(degree)
    return elementwise(lambda x: jnp.where(x >= 0, x**degree, 0), activation)


@layer
@supports_masking(remask_kernel=True)
def Polynomial(coef: Sequence[float]):
    """Polynomial, `f(x) = coef[0] + coef[1] x + coef[2] x^2 + ...`; zero if there are no coefficients.

    >>> from nt_stax import Dense, Polynomial, serial
    >>> _, _, kernel_fn = serial(Dense(512), Polynomial([1.0, 0.0, 2.0]))
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp"))  # E (1 + 2 u^2)^2
    [[17.]]
    """
    coefficients = tuple(coef)

    def fn(x):
        value = jnp.zeros_like(x)
        for coefficient in reversed(coefficients):
            value = value * x + coefficient
        return value

    return elementwise(fn, activations.Polynomial(coefficients))


@layer
@supports_masking(remask_kernel=True)
def Hermite(degree: int):
    """Normalized Hermite polynomial, `f(x) = He_degree(x) / sqrt(degree!)`, for inputs of variance 1.

    The covariance is that of the inputs to the power `degree`. This is exact for inputs of variance 1 only, and a
    warning says so. For others `Polynomial` takes the coefficients of the same function.

    Raises:
      NotImplementedError: the degree is negative.

    >>> import warnings
    >>> from nt_stax import Dense, Hermite, serial
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     _, _, kernel_fn = serial(Dense(512), Hermite(2))
    >>> x = jnp.array([[1.0, 1.0], [1.4, 0.2]])
    >>> print(kernel_fn(x, None, "nngp").round(4))
    [[1.   0.64]
     [0.64 1.  ]]
    """
    degree = _whole_degree("Hermite", degree)
    warnings.warn(
        "Hermite: the kernel is that of inputs of variance 1. See that the layers before it have such outputs, or use "
        "Polynomial with the same coefficients, whose kernel is exact for all variances.",
        stacklevel=_TO_CALLER,
    )

    def fn(x):
        before, value = jnp.zeros_like(x), jnp.ones_like(x)
        for n in range(degree):  # He_(n + 1) = x He_n - n He_(n - 1), normalized
            before, value = value, (x * value - n**0.5 * before) / (n + 1) ** 0.5
        return value

    return elementwise(fn, activations.Hermite(degree))


@layer
@supports_masking(remask_kernel=True)
def Elementwise(
    fn: Callable[[Any], Any] | None = None,
    nngp_fn: Callable[[Any, Any, Any], Any] | None = None,
    d_nngp_fn: Callable[[Any, Any, Any], Any] | None = None,
):
    """A nonlinearity of the user's, with its covariance given as a function. See arXiv:2209.04121 for many of them.

    Args:
      fn: `f`, from a number to a number. May be missing if the finite network is not needed.
      nngp_fn: `nngp_fn(cov12, var1, var2)` is `E f(u) f(v)` for `u, v` of variances `var1, var2` and covariance
        `cov12`, all of them numbers. If missing, the kernel comes from Hermite coefficients of `fn`, as that of
        `ElementwiseNumerical` with `deg=50`, which is accurate if `fn` is smooth.
      d_nngp_fn: its derivative with respect to `cov12`, which is `E f'(u) f'(v)`. Found by automatic differentiation,
        with a warning, if missing: this is slower, and may be NaN where `nngp_fn` is not differentiable, e.g. at equal
        inputs.

    What is compiled for a network serves another that is built of the same function objects. A lambda that is written
    anew, or made anew by each call of a function, is another function, and compiles again.

    Raises:
      ValueError: neither `fn` nor `nngp_fn` is given.
      NotImplementedError: `fn` is missing, and `apply_fn` is called.

    >>> from nt_stax import Dense, Elementwise, serial
    >>> square = Elementwise(
    ...     fn=lambda x: x**2,
    ...     nngp_fn=lambda cov12, var1, var2: var1 * var2 + 2 * cov12**2,
    ...     d_nngp_fn=lambda cov12, var1, var2: 4 * cov12)
    >>> _, _, kernel_fn = serial(Dense(512), square)
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp"))
    [[3.]]
    """
    if nngp_fn is None:
        if fn is None:
            raise ValueError("Elementwise needs `fn`, or `nngp_fn` for a kernel alone, or both; got neither.")
        return _numerical(fn, _Derivative(fn), DEFAULT_DEGREE)
    if d_nngp_fn is None:
        warnings.warn(
            "Elementwise without `d_nngp_fn`: the tangent kernel will differentiate `nngp_fn` automatically, which is "
            "slower and can be NaN at equal inputs.",
            stacklevel=_TO_CALLER,
        )
    return elementwise(_scalar_function(fn), activations.Elementwise(nngp_fn, d_nngp_fn))


@layer
@supports_masking(remask_kernel=True)
def ElementwiseNumerical(fn: Callable[[Any], Any], deg: int, df: Callable[[Any], Any] | None = None):
    """A nonlinearity of the user's, with its covariance computed from its Hermite coefficients.

    Args:
      fn: `f`, from a number to a number.
      deg: half the number of terms. Polynomials up to degree `2 deg - 1` are exact, and smooth functions accurate with
        few terms. With kinks the variance and the tangent kernel of equal inputs are accurate, with jumps neither.
      df: the derivative of `f`. Found by automatic differentiation, with a warning, if missing.

    Other functions, lambdas written anew among them, compile again: see `Elementwise`.

    >>> from nt_stax import Dense, ElementwiseNumerical, serial
    >>> _, _, kernel_fn = serial(Dense(512), ElementwiseNumerical(lambda x: x**2, deg=5, df=lambda x: 2 * x))
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp").round(4))
    [[3.]]
    """
    if deg < 1:
        raise ValueError(f"ElementwiseNumerical needs two terms at least, deg >= 1, got deg={deg}.")
    if df is None:
        warnings.warn(
            "ElementwiseNumerical without `df`: the tangent kernel will differentiate `fn` automatically.",
            stacklevel=_TO_CALLER,
        )
        df = _Derivative(fn)
    return _numerical(fn, df, deg)


def _numerical(fn: Callable[[Any], Any], df: Callable[[Any], Any], deg: int):
    entrywise = _Entrywise(fn)
    return elementwise(entrywise, activations.ElementwiseNumerical(entrywise, _Entrywise(df), deg))


def elementwise(fn: Callable[[Array], Array], activation: activations.Activation):
    """A layer without parameters that applies `fn` to every entry."""

    def init_fn(rng, input_shape):
        return input_shape, ()

    def apply_fn(params, inputs, **kwargs):
        return fn(inputs)

    return init_fn, apply_fn, step_rule(steps.Dual(activation), _REQUIREMENTS)


def by_coefficients(fn: Callable[[Array], Array], degree: int = DEFAULT_DEGREE):
    """Returns the layer of a function of which only Hermite coefficients are known, twice as many as the degree."""
    return elementwise(fn, activations.ElementwiseNumerical(fn, None, degree))


def _scalar_function(fn: Callable[[Any], Any] | None) -> Callable[[Array], Array]:
    return _no_function if fn is None else _Entrywise(fn)


# Equal where their functions are: what is compiled for one network serves another that is built of the same functions.


@dataclasses.dataclass(frozen=True)
class _Entrywise:
    """A function of numbers as a function of arrays."""

    fn: Callable[[Any], Any]

    def __call__(self, x: Array) -> Array:
        return jnp.vectorize(self.fn)(x)


@dataclasses.dataclass(frozen=True)
class _Derivative:
    """The derivative of a function of numbers."""

    fn: Callable[[Any], Any]

    def __call__(self, x: Array) -> Array:
        return jax.grad(self.fn)(x)


def _whole_degree(name: str, degree: float) -> int:
    if not 0 <= degree < math.inf or degree != int(degree):
        raise NotImplementedError(f"{name} needs a degree of at least 0, a whole number, got degree={degree}.")
    return int(degree)


def _no_exp_normalized(inputs):
    raise NotImplementedError("ExpNormalized has no finite network, only a kernel: it has no function to apply.")


def _no_function(inputs):
    raise NotImplementedError("This Elementwise layer has no finite network: give it `fn`, the function to be applied.")
