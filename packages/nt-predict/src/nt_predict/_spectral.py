"""The functions of a symmetric matrix that gradient flow needs, and their derivatives.

Gradient flow on a squared loss moves the outputs along an eigenvector of the kernel independently of all others, at the
rate of its eigenvalue λ. After time τ

* `DECAY`, exp(-λτ), is what is left of the distance to the labels;
* `FALL`, exp(-λτ) - 1, is the change of that distance;
* `GAIN`, (1 - exp(-λτ)) / λ, is the time integral of the distance. It drives the outputs at other points.

Eigenvalues are known up to rounding errors, of the kernel and of the decomposition. Modes below are *flat*: they count
as eigenvalue zero, of which the gain is the limit τ. For a positive semi-definite kernel of training *and* test points
flat modes do not reach the test points, so that a gain that grows with τ would only amplify rounding errors: it is
dropped from a time on, at infinite time in particular. What remains is the pseudo-inverse, the limit of the flow.
Modes of eigenvalues that are negative beyond rounding, which no kernel has, do not move.

The derivative of f(A) with respect to A is the Daleckii-Krein formula, V [f[λi, λj] * (V' dA V)] V' with the divided
differences of f: unlike a derivative through the eigenvectors it is finite for equal eigenvalues. Second derivatives
are right too, but go through the eigenvectors, and need distinct eigenvalues.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

# For matrices of deficient rank and sizes 4 to 1500, `eigh` is off by up to 2.4 ulp of the largest eigenvalue, and the
# rounding of the entries moves null eigenvalues by up to 3.2 ulp of the largest norm of a row.
_NULL_ULPS = 8.0

einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # no TF32: kernels are too ill-conditioned for it


class Spectrum(NamedTuple):
    """The eigendecomposition of a symmetric matrix.

    Attributes:
      values: (n,) eigenvalues, ascending.
      vectors: (n, n) eigenvectors, in columns.
      scale: (), the largest absolute eigenvalue; 1 for a matrix of zeros.
      noise: (), how large null eigenvalues may come out, in units of `scale`.
    """

    values: jax.Array
    vectors: jax.Array
    scale: jax.Array
    noise: jax.Array


class Modes(NamedTuple):
    """Eigenvalues in units of the largest one, and times in units of its inverse, with noise cut off.

    Attributes:
      rates: (modes,) at least 0; 0 for flat and for negative eigenvalues.
      negative: (modes,) whether the eigenvalue is negative beyond noise.
      times: (times,) finite.
      scale, noise: as those of the spectrum.
    """

    rates: jax.Array
    negative: jax.Array
    times: jax.Array
    scale: jax.Array
    noise: jax.Array


class SpectralFunction(NamedTuple):
    """A function of a symmetric matrix.

    Attributes:
      values: `Modes -> (times, modes)`, the function at the eigenvalues.
      differences: `Modes -> (times, modes, modes)`, its divided differences between any two eigenvalues.
    """

    values: Callable[[Modes], jax.Array]
    differences: Callable[[Modes], jax.Array]


def decompose(matrix: jax.Array) -> Spectrum:
    """Returns the eigendecomposition of a symmetric matrix."""
    return _decompose(matrix, jnp.finfo(matrix.dtype).eps)


def decompose_known(matrix: jax.Array) -> Spectrum:
    """Returns the eigendecomposition of a matrix of known values, computed in double precision.

    The errors of eigenvalues are in proportion to the largest one, which for kernels is some 1e4 times the smallest: in
    single precision three or four digits would be left of that.
    """
    if matrix.dtype == jnp.float64 or jax.default_backend() == "tpu":  # which has no double precision
        return decompose(matrix)
    with jax.enable_x64(True):
        spectrum = _decompose(matrix.astype(jnp.float64), jnp.finfo(matrix.dtype).eps)
        return Spectrum(*(part.astype(matrix.dtype) for part in spectrum))


def _decompose(matrix: jax.Array, eps_of_entries: Any) -> Spectrum:
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    largest = jnp.abs(values).max()
    scale = jnp.where(largest > 0, largest, 1)
    row = jnp.linalg.norm(jax.lax.stop_gradient(matrix / scale), axis=1).max()
    noise = _NULL_ULPS * (jnp.finfo(matrix.dtype).eps + float(eps_of_entries) * row)
    return Spectrum(values, vectors, scale, noise)


@partial(jax.jit, static_argnums=0)
def apply_spectrum(function: SpectralFunction, spectrum: Spectrum, times: jax.Array, rhs: jax.Array) -> jax.Array:
    """Returns `f(A, t) @ rhs`, shape (times, n, columns), from the eigendecomposition of a constant matrix."""
    values = function.values(_modes(spectrum, times))
    components = einsum("ij,ik->jk", spectrum.vectors, rhs)
    return einsum("ij,tjk->tik", spectrum.vectors, values[:, :, None] * components[None])


def few_times(spectrum: Spectrum, times: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a few of the times, and how the gains at all times are sums of those at these few.

    Gains at many times have a small numerical rank: a product with a matrix is then needed at the few times alone. They
    come from a QR decomposition with pivoting. The gain of a mode may be off by an eighth of a rounding error (eight in
    double precision) of the largest gain at the same time, in units of 1 / eigenvalue: in covariances, which are
    positive semi-definite for training and test points together, each mode of the kernel is as small as its eigenvalue.

    Returns:
      times (few,), and weights (times, few).
    """
    dtype = times.dtype
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):  # which has double precision
        values, scale, noise, times_in_double = (
            jnp.asarray(np.asarray(part, np.float64))
            for part in (spectrum.values, spectrum.scale, spectrum.noise, times)
        )
        modes = _modes(Spectrum(values, spectrum.vectors, scale, noise), times_in_double)
        gains = np.asarray(_gain(modes) * (modes.scale * jnp.maximum(modes.rates, modes.noise))[None]).T
    largest = np.abs(gains).max(axis=0)
    unit = np.where(largest > 0, largest, 1)
    decomposed: Any = scipy.linalg.qr(gains / unit, mode="r", pivoting=True)
    r, order = decomposed
    pivots = np.abs(np.diagonal(r))
    cutoff = max(jnp.finfo(dtype).eps / 8, 8 * np.finfo(np.float64).eps)
    rank = max(int(np.sum(pivots > cutoff * pivots[0])), 1)
    few, others = order[:rank], order[rank:]
    weights = np.zeros((len(times), rank))
    weights[few, np.arange(rank)] = 1
    if pivots[0] > 0:
        weights[others] = scipy.linalg.solve_triangular(r[:rank, :rank], r[:rank, rank:]).T
    weights *= unit[:, None] / unit[few]
    return times[few], jnp.asarray(weights, dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def apply_matrix(function: SpectralFunction, matrix: jax.Array, times: jax.Array, rhs: jax.Array) -> jax.Array:
    """Returns `f(A, t) @ rhs`, shape (times, n, columns), differentiable with respect to the symmetric matrix too."""
    return apply_spectrum(function, decompose(matrix), times, rhs)


@apply_matrix.defjvp
def _apply_matrix_jvp(function, primals, tangents):
    (matrix, times, rhs), (matrix_dot, times_dot, rhs_dot) = primals, tangents
    spectrum = decompose(matrix)
    result, result_dot = jax.jvp(partial(apply_spectrum, function, spectrum), (times, rhs), (times_dot, rhs_dot))
    differences = function.differences(_modes(spectrum, times))
    rotated = einsum("ai,ab,bj->ij", spectrum.vectors, matrix_dot, spectrum.vectors)
    components = einsum("ij,ik->jk", spectrum.vectors, rhs)
    change = einsum("tij,ij,jk->tik", differences, rotated, components)
    return result, result_dot + einsum("ai,tik->tak", spectrum.vectors, change)


def _modes(spectrum: Spectrum, times: jax.Array) -> Modes:
    rates = spectrum.values / spectrum.scale
    times = times * spectrum.scale
    # By then every mode that is not flat is over; a finite end keeps infinite times out of the arithmetic.
    end = 1000 / spectrum.noise
    return Modes(
        rates=jnp.where(rates > spectrum.noise, rates, 0),
        negative=rates < -spectrum.noise,
        times=jnp.where(times > end, end, times),
        scale=spectrum.scale,
        noise=spectrum.noise,
    )


def _decay(modes: Modes) -> jax.Array:
    return jnp.exp(-_exponents(modes))


def _fall(modes: Modes) -> jax.Array:
    return jnp.expm1(-_exponents(modes))


def _decay_differences(modes: Modes) -> jax.Array:
    high, low = _pairs(modes)
    return -modes.times[:, None, None] * jnp.exp(-low) * phi(high - low) / modes.scale


def _gain(modes: Modes) -> jax.Array:
    times = modes.times[:, None]
    return jnp.where(_stopped(modes), 0, times * phi(_exponents(modes)) / modes.scale)


def _gain_differences(modes: Modes) -> jax.Array:
    stopped = _stopped(modes)
    high, low = _pairs(modes)
    moving = -((modes.times[:, None, None] / modes.scale) ** 2) * _second_difference(high, low)
    # A stopped mode has rate 0 and gain 0.
    gain = _gain(modes)
    rates = (modes.rates[:, None] + modes.rates[None, :])[None] * modes.scale
    one_stopped = jnp.where(rates > 0, (gain[:, :, None] + gain[:, None, :]) / jnp.where(rates > 0, rates, 1), 0)
    return jnp.where(stopped[:, :, None] | stopped[:, None, :], one_stopped, moving)


def _exponents(modes: Modes) -> jax.Array:
    return modes.times[:, None] * modes.rates[None, :]


def _pairs(modes: Modes) -> tuple[jax.Array, jax.Array]:
    """Returns the larger and the smaller exponent of every pair of modes."""
    exponents = _exponents(modes)
    first, second = exponents[:, :, None], exponents[:, None, :]
    return jnp.maximum(first, second), jnp.minimum(first, second)


def _stopped(modes: Modes) -> jax.Array:
    """Returns (times, modes), True for modes that do not act on other points, or no longer."""
    # So far what a flat mode gains, times the noise of a kernel, is small.
    late = modes.times > modes.noise**-0.5
    return modes.negative[None, :] | (late[:, None] & (modes.rates == 0)[None, :])


def phi(z: jax.Array) -> jax.Array:
    """Returns (1 - exp(-z)) / z, 1 at 0."""
    small = jnp.abs(z) < 1e-3
    series = 1 - z / 2 * (1 - z / 3 * (1 - z / 4 * (1 - z / 5)))
    z = jnp.where(small, 1, z)
    return jnp.where(small, series, -jnp.expm1(-z) / z)


@jax.jit
def _second_difference(high: jax.Array, low: jax.Array) -> jax.Array:
    """Returns (phi(low) - phi(high)) / (high - low) for 0 <= low <= high, without cancellation."""
    # The second divided difference of exp at the nodes 0, -low, -high; its Taylor series is that of complete
    # homogeneous symmetric polynomials, and 18 terms are enough up to high = 1.
    small = high < 1
    x, y = jnp.where(small, high, 0), jnp.where(small, low, 0)
    polynomial, power = jnp.ones_like(x), jnp.ones_like(x)
    factor, series = 0.5, 0.5 * polynomial
    for order in range(1, 18):
        power = power * y
        polynomial = x * polynomial + power
        factor = -factor / (order + 2)
        series = series + factor * polynomial
    high = jnp.where(small, 1, high)
    low = jnp.where(small, 1, low)
    return jnp.where(small, series, (phi(low) - jnp.exp(-low) * phi(high - low)) / high)


DECAY = SpectralFunction(_decay, _decay_differences)
FALL = SpectralFunction(_fall, _decay_differences)
GAIN = SpectralFunction(_gain, _gain_differences)
